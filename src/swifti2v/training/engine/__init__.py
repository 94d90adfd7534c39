"""A loop that knows no video: a task, its draws, its optimizer, its checkpoints."""
