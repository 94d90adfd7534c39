"""Metrics as pure functions, one idea a file."""
