"""The networks of both stages, how they are loaded and how they are fed piece by piece."""
