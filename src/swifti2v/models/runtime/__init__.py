"""Placement and speed of a model's computation."""
