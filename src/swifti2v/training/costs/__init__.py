"""Costs of a training: memory, time and packages."""
