"""All that only the small model needs."""
