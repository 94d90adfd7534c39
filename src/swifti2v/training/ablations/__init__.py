"""Trainings of Stage II with one thing changed."""
