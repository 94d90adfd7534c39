"""A drawn photo, and a clip of a camera that moves over it: real motion without a file."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from swifti2v.media import image_to_tensor
from swifti2v.pipelines.camera_moves import MOVES
from swifti2v.pipelines.course import draw_course
from swifti2v.pipelines.displacement import move_photo

MOTION = "pan right"
"""Move of the camera, which the prompt asks for."""
SEED = 0
"""Seed of the photo and of the camera's course."""


def draw_photo(height: int, width: int) -> Image.Image:
    """A photo of natural statistics: energy falls with frequency as in landscapes, with hard edges."""
    generator = np.random.default_rng(SEED)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    layers = []
    for share in (1.0, 0.35, 0.35):  # brightness, and two of colour
        noise = np.fft.rfft2(generator.standard_normal((height, width)))
        layer = np.fft.irfft2(noise / frequency**1.3, (height, width))
        layers.append(share * layer / layer.std())
    light, warm, green = layers
    colour = np.stack([light + warm, light + green, light - warm], axis=-1)
    pixels = np.clip(118 + 42 * colour, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = generator.integers(0, (width, height))
        side = int(generator.integers(height // 16, height // 5))
        fill = tuple(int(value) for value in generator.integers(20, 236, 3))
        shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
        shape((x, y, x + side, y + side), fill=fill)
    return image


def draw_clip(photo: Image.Image, num_frames: int) -> Tensor:
    """The clip ``[1, 3, T, H, W]`` in [-1, 1]; its first frame is the photo.

    Args:
        photo: RGB.
        num_frames: T.
    """
    height, width = photo.height, photo.width
    row, column = (torch.arange(side) + 0.5 - side / 2 for side in (height, width))
    points = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=-1)
    course = draw_course(num_frames, SEED)
    places = MOVES[MOTION].displace(course, torch.tensor(0.5), points, (height, width))
    displacement = places.permute(3, 0, 1, 2)[None]
    return move_photo(image_to_tensor(photo), displacement)
