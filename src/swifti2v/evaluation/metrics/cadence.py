"""Does a clip move evenly, or in jumps with the rhythm of the video VAE?"""

import numpy as np

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.frames import FramePieces
from swifti2v.evaluation.metrics.temporal import frame_changes

INVISIBLE_CHANGE = 1e-4
"""Value added above and below the ratio (1/40 of an 8-bit step), so that a still clip scores 1."""


def cadence(frames: FramePieces, time_factor: int = 4) -> float:
    """Largest over smallest mean change from frame to frame, by place within a latent frame.

    The step from the photo into the clip is left out: it shows the photo's detail, not motion.
    ``frames`` may be the clip's ``frame_changes``.

    Returns:
        1: as much changes at each place; 5: a clip that jumps once in a latent frame and hardly
        moves between. NaN where a place has fewer than two changes.

    Raises:
        ShapeError: Fewer than two frames, or ``time_factor`` is below 2.
    """
    if time_factor < 2:
        raise ShapeError(f"time_factor is {time_factor}; a rhythm needs at least 2")
    changes = frame_changes(frames)[1:].numpy()
    if len(changes) < 2 * time_factor:
        return float("nan")
    means = [float(np.mean(changes[place::time_factor])) for place in range(time_factor)]
    return (max(means) + INVISIBLE_CHANGE) / (min(means) + INVISIBLE_CHANGE)
