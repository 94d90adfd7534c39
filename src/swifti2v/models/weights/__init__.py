"""State dicts: files, names of weights, and number types."""
