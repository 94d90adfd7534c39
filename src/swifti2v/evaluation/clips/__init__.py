"""Clips to measure: reading, pairing, metrics, means."""
