"""The model card: marks, measurements, tables."""
