"""Output of frozen encoders, kept in files."""
