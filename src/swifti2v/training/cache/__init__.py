"""What frozen encoders gave, kept in files."""
