"""The ten dimensions of VBench-I2V: which weigh into which score, and how they are normalised."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from swifti2v.errors import InputError

Group = Literal["i2v", "quality", "unscored"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """One dimension."""

    group: Group
    """Score to which it adds; ``unscored`` ones are listed but add nothing."""
    num_prompts: int
    """Entries of the whole suite that are measured for it."""
    weight: float = 1.0
    """Weight within its group."""
    low: float = 0.0
    """Value that counts as 0."""
    high: float = 1.0
    """Value that counts as 1."""

    def normalize(self, value: float) -> float:
        """A value on the scale from ``low`` to ``high``."""
        return (value - self.low) / (self.high - self.low)


DIMENSIONS = {
    "i2v_subject": Dimension(group="i2v", num_prompts=246, low=0.1462),
    "i2v_background": Dimension(group="i2v", num_prompts=109, low=0.2615),
    "camera_motion": Dimension(group="i2v", num_prompts=763, weight=0.1),
    "subject_consistency": Dimension(group="quality", num_prompts=246, low=0.1462),
    "background_consistency": Dimension(group="quality", num_prompts=109, low=0.2615),
    "motion_smoothness": Dimension(group="quality", num_prompts=246, low=0.706, high=0.9975),
    "dynamic_degree": Dimension(group="quality", num_prompts=246, weight=0.5),
    "aesthetic_quality": Dimension(group="quality", num_prompts=355),
    "imaging_quality": Dimension(group="quality", num_prompts=355),
    "temporal_flickering": Dimension(group="unscored", num_prompts=355),
}
"""Dimensions by name. Source: ``scripts/constant.py`` and the suite of VBench."""
LITE = (
    "i2v_subject",
    "i2v_background",
    "subject_consistency",
    "background_consistency",
    "dynamic_degree",
    "aesthetic_quality",
    "temporal_flickering",
)
"""Dimensions whose models have clean licences. The models of the other three (CoTracker, AMT,
MUSIQ's weights in pyiqa) are for non-commercial use only; they run in the official code alone."""
CAMERA = "camera_motion"


def choose_dimensions(names: Iterable[str] | None, available: Iterable[str]) -> tuple[str, ...]:
    """Requested dimensions, in the order of ``available``; None requests all of them.

    Raises:
        InputError: A name is not in ``available``.
    """
    available = tuple(available)
    if names is None:
        return available
    asked = set(names)
    for name in sorted(asked - set(available)):
        if name in DIMENSIONS:
            raise InputError(
                f"dimension {name} is not part of this: its model is for non-commercial use only "
                "and runs in the official code ('swifti2v vbench run')"
            )
        raise InputError(f"dimension {name!r} is unknown; there are {', '.join(available)}")
    if not asked:
        raise InputError(f"no dimension was named; there are {', '.join(available)}")
    return tuple(name for name in available if name in asked)
