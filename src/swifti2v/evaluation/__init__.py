"""Metrics, baselines and the tables made of them."""
