"""What a training takes: memory, time and packages."""
