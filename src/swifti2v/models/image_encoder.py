"""The photo as CLIP sees it, which Wan 2.1's image-to-video models attend to.

All of it, squashed to a square, as in Wan 2.1's own code. The image processors of diffusers'
repositories cut out the middle square (55 % of a 20:11 photo): their size, mean and standard
deviation count, their crop does not.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from swifti2v.errors import LoadingError, NumericalError, ShapeError


def make_image_processor(side: int) -> CLIPImageProcessorPil:
    """The image processor of Wan 2.1: CLIP's mean and standard deviation, the whole picture.

    Args:
        side: S of the pixels, as the image encoder takes them.
    """
    return CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False)


def load_image_processor(directory: Path) -> CLIPImageProcessorPil:
    """Load a CLIP image processor from its ``preprocessor_config.json``, without its crop.

    ``save_pretrained`` writes the layout that diffusers reads, which then takes the whole picture
    as well (its resize smooths, so pixels differ by a few hundredths of a standard deviation).

    Raises:
        LoadingError: The file is missing or cannot be read.
    """
    if not (directory / "preprocessor_config.json").is_file():
        raise LoadingError(f"{directory} holds no preprocessor_config.json of an image processor")
    try:
        processor: Any = CLIPImageProcessorPil.from_pretrained(directory)
    except (OSError, ValueError, TypeError) as error:
        raise LoadingError(f"cannot read the image processor in {directory}: {error}") from error
    whole = make_image_processor(_side(processor))
    whole.image_mean, whole.image_std = processor.image_mean, processor.image_std
    return whole


def describe_picture(image_processor: CLIPImageProcessorPil) -> dict[str, Any]:
    """Settings that decide the pixels an image encoder sees, as plain values for a cache's key."""
    return {
        "picture": "whole, bicubic",
        "side": _side(image_processor),
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
    }


def preprocess_for_clip(image_processor: CLIPImageProcessorPil, image: Image.Image) -> Tensor:
    """Squash the whole picture to a square (bicubic, without smoothing) and normalise it.

    Args:
        image_processor: Holds size, mean and standard deviation.
        image: Any size and mode; it is taken as RGB, an alpha channel is dropped.

    Returns:
        ``[1, 3, S, S]`` float32.

    Raises:
        ShapeError: The image has no pixels.

    Source:
        Wan 2.1, ``CLIPModel.visual``.
    """
    if 0 in image.size:
        raise ShapeError(f"the image is {image.width} x {image.height} pixels: it must have some")
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # [H, W, 3], a copy
    picture = pixels.permute(2, 0, 1)[None].float() / 255
    side = _side(image_processor)
    square = F.interpolate(picture, size=(side, side), mode="bicubic", align_corners=False)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (image_processor.image_mean, image_processor.image_std)
    )
    return (square - mean) / std


def _side(image_processor: CLIPImageProcessorPil) -> int:
    size: Any = image_processor.size
    return int(size.height or size.shortest_edge)


@torch.no_grad()
def encode_image(
    image_encoder: CLIPVisionModel, image_processor: CLIPImageProcessorPil, image: Image.Image
) -> Tensor:
    """Encode the photo into CLIP's second-to-last hidden states.

    Args:
        image_encoder: CLIP's vision model; it stays as it is.
        image_processor: Made for it (``load_image_processor``, ``make_image_processor``).
        image: The photo, any size and mode.

    Returns:
        ``[1, L, D]`` in the encoder's dtype and on its device, L = patches + 1 (class token
        first): the states before the last layer, without the final norm.

    Raises:
        LoadingError: The processor's pixels are not as many as the encoder takes.
        ShapeError: The image has no pixels.
        NumericalError: The encoder returned NaN or infinity.

    Source:
        Wan 2.1 image-to-video; diffusers ``WanImageToVideoPipeline.encode_image``.
    """
    pixels = preprocess_for_clip(image_processor, image)
    side = image_encoder.config.image_size
    if tuple(pixels.shape[-2:]) != (side, side):
        raise LoadingError(
            f"the image processor makes {pixels.shape[-1]} x {pixels.shape[-2]} pixels, but the "
            f"image encoder takes {side} x {side}: load both from the same checkpoint"
        )
    pixels = pixels.to(image_encoder.dtype)
    if image_encoder.device.type != "meta":  # weights offloaded piecewise: hooks move the inputs
        pixels = pixels.to(image_encoder.device)
    states = image_encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
    embeds: Tensor = states[-2]
    if not embeds.isfinite().all():
        raise NumericalError(f"the image encoder returned NaN or infinity in {embeds.dtype}")
    return embeds
