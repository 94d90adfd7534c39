"""Scaling of frames and photos for each feature extractor, with VBench's filters.

The consistency dimensions scale 2K frames down without a low-pass filter, as the official code
does: aliasing counts against a clip. Written with torch's own resize, so that the result does
not depend on torchvision's version.

Source: VBench, ``vbench/utils.py`` and ``vbench2_beta_i2v/utils.py``.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Transform: TypeAlias = Callable[[Tensor], Tensor]
"""``[1, 3, H, W]`` float in 0 .. 255 to ``[1, 3, h, w]`` as an extractor takes it."""

SIDE = 224
"""Pixels along a side that the extractors were trained at."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and deviation of colours."""


def dino_frame(pixels: Tensor) -> Tensor:
    """Frame for subject consistency: short side 224, not cropped, aliased."""
    return normalize(resize_short(pixels, SIDE, "bilinear", antialias=False), IMAGENET)


def dino_centre(pixels: Tensor) -> Tensor:
    """Frame for I2V subject: short side 256, filtered, centre 224 x 224."""
    return normalize(crop_centre(resize_short(pixels, 256, "bicubic", antialias=True)), IMAGENET)


def dino_photo(image: Image.Image) -> Tensor:
    """Photo for I2V subject, scaled by Pillow."""
    short = min(image.size)
    size = tuple(256 if side == short else int(256 * side / short) for side in image.size)
    small = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    return normalize(crop_centre(photo_to_pixels(small)), IMAGENET)


def clip_frame(pixels: Tensor) -> Tensor:
    """Frame for CLIP: short side 224, aliased, centre 224 x 224."""
    return normalize(crop_centre(resize_short(pixels, SIDE, "bicubic", antialias=False)), CLIP)


def dreamsim_frame(pixels: Tensor) -> Tensor:
    """Frame for DreamSim, which normalises colours itself: squashed to 224 x 224, filtered."""
    size = (SIDE, SIDE)
    return F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True) / 255


def dreamsim_photo(image: Image.Image) -> Tensor:
    """Photo for DreamSim, scaled by Pillow."""
    return photo_to_pixels(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255


def frame_to_pixels(frame: NDArray[np.uint8], device: torch.device) -> Tensor:
    """``[H, W, 3]`` uint8 to ``[1, 3, H, W]`` float32 in 0 .. 255."""
    return torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float()


def photo_to_pixels(image: Image.Image) -> Tensor:
    """An RGB photo as ``frame_to_pixels`` gives a frame, on the CPU."""
    return frame_to_pixels(np.array(image.convert("RGB")), torch.device("cpu"))


def resize_short(
    pixels: Tensor, side: int, mode: Literal["bilinear", "bicubic"], *, antialias: bool
) -> Tensor:
    """Scale ``[B, 3, H, W]`` so that the short side has ``side`` pixels, the other rounded down."""
    height, width = pixels.shape[-2:]
    short = min(height, width)
    size = [side if length == short else int(side * length / short) for length in (height, width)]
    return F.interpolate(pixels, size, mode=mode, align_corners=False, antialias=antialias)


def crop_centre(pixels: Tensor) -> Tensor:
    """The middle 224 x 224 of ``[B, 3, H, W]``."""
    height, width = pixels.shape[-2:]
    top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
    return pixels[..., top : top + SIDE, left : left + SIDE]


def normalize(pixels: Tensor, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Scale 0 .. 255 to zero mean and unit deviation of a colour statistic."""
    mean, deviation = (pixels.new_tensor(values)[:, None, None] for values in colours)
    return (pixels / 255 - mean) / deviation
