"""Photos of the suite at the size of a clip: crops of a ratio, scaled and cut evenly."""

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from swifti2v.errors import InputError, MediaError, ShapeError

RATIOS = ("1-1", "8-5", "7-4", "16-9")
"""Crops that the suite comes with; its own tool makes others between 1-1 and 16-9."""
LOWEST, HIGHEST = 1.0, 1.7778
"""Widths over heights that the suite's boxes allow."""
MAX_CUT = 0.05
"""Part of a side that may be cut to go from the crop to the clip; 2560x1408 takes 2.2 %."""
SAME_ASPECT = 0.01
"""Crops have whole pixels: their aspect is the ratio's up to rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoFit:
    """Fitting of a crop to the first frame; part of the results."""

    ratio: str
    """Ratio of the crop, such as ``16-9``."""
    scaled_width: int
    """Pixels after scaling."""
    scaled_height: int
    """Pixels after scaling."""
    cut_columns: int
    """Pixels then cut on the left and on the right, together."""
    cut_rows: int
    """Pixels then cut at the top and at the bottom, together."""


def parse_ratio(text: str) -> float:
    """Width over height of ``W-H``.

    Raises:
        InputError: Another form, or an aspect that the suite has no crops of.
    """
    width, _, height = text.partition("-")
    if not (width.isdecimal() and height.isdecimal() and int(height)):
        raise InputError(f"ratio {text!r} is not of the form W-H, as 16-9")
    aspect = int(width) / int(height)
    if not LOWEST <= aspect < HIGHEST:
        raise InputError(f"ratio {text} is outside the suite's range, 1-1 to 16-9")
    return aspect


def plan_photo_fit(ratio: str, height: int, width: int) -> PhotoFit:
    """Scale a crop to cover the clip and cut the rest, evenly on both sides.

    Its aspect ratio is ``W-H``. 2560x1408 is 20:11, wider than any crop: 16-9 becomes 2560x1440,
    and 16 rows go at either end.

    Raises:
        InputError: The ratio cannot be.
        ShapeError: More than 5 % of a side would be cut; the message names a better ratio.
    """
    aspect = parse_ratio(ratio)
    if _cut(aspect, width / height) > MAX_CUT:
        cuts = {name: _cut(parse_ratio(name), width / height) for name in RATIOS}
        best = min(RATIOS, key=lambda name: cuts[name])
        remedy = f"--ratio {best}" if cuts[best] <= MAX_CUT else "another output size"
        raise ShapeError(
            f"{width}x{height} from a crop of {ratio} loses {_cut(aspect, width / height):.0%} of a "
            f"side; use {remedy}"
        )
    scaled_width = max(width, round(height * aspect))
    scaled_height = max(height, round(width / aspect))
    return PhotoFit(
        ratio=ratio,
        scaled_width=scaled_width,
        scaled_height=scaled_height,
        cut_columns=scaled_width - width,
        cut_rows=scaled_height - height,
    )


def _cut(crop_aspect: float, clip_aspect: float) -> float:
    """Part of a side that is lost from one aspect to another."""
    return 1 - min(crop_aspect, clip_aspect) / max(crop_aspect, clip_aspect)


def check_photo(path: Path, ratio: str) -> None:
    """Refuse a crop of another ratio, by its header alone.

    Raises:
        MediaError: It is no image, or of another aspect.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, ValueError) as error:
        raise MediaError(f"photo {path} cannot be read ({error}); download it again") from None
    if not math.isclose(width / height, parse_ratio(ratio), rel_tol=SAME_ASPECT):
        raise MediaError(
            f"photo {path} is {width}x{height}, not {ratio}; --images must hold the suite's crops"
        )
