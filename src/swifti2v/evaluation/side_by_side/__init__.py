"""Blind comparison of two sets of videos by people: a local page, and the tally of its results."""
