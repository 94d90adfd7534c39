"""What someone asks for."""

from typing import Literal

Command = Literal["generate", "refine", "upscale"]
"""What makes a clip: from a photo, from a small clip and a photo, or from a clip alone."""
