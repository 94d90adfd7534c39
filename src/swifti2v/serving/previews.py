"""Small pictures of a video that is being made."""

from pathlib import Path

import numpy as np
from PIL import Image

from swifti2v.media import Frames
from swifti2v.storage import whole_file

LONGEST_SIDE = 512
"""Pixels."""
SHEET_FRAMES = 4
"""Frames of a whole clip that are shown side by side."""


def save_frame(frame: Frames, path: Path) -> None:
    """Save one frame, ``[H, W, 3]``, as a JPEG of at most 512 pixels a side."""
    image = Image.fromarray(frame)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BOX)
    with whole_file(path) as unfinished:
        image.save(unfinished, format="JPEG", quality=80)


def save_sheet(frames: Frames, path: Path) -> None:
    """Save four frames of a clip ``[T, H, W, 3]`` side by side, as ``save_frame`` does."""
    shown = np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int)
    save_frame(np.concatenate(list(frames[shown]), axis=1), path)
