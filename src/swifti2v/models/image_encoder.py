"""The photo as CLIP sees it, which Wan 2.1's image-to-video models attend to."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from swifti2v.errors import LoadingError, NumericalError, ShapeError


def load_image_processor(directory: Path) -> CLIPImageProcessorPil:
    """Load a CLIP image processor from its ``preprocessor_config.json``.

    Always the Pillow version, so that the pixels do not depend on whether torchvision is
    installed; ``save_pretrained`` writes the layout that diffusers reads.

    Raises:
        LoadingError: The file is missing or cannot be read.
    """
    if not (directory / "preprocessor_config.json").is_file():
        raise LoadingError(f"{directory} holds no preprocessor_config.json of an image processor")
    try:
        processor = CLIPImageProcessorPil.from_pretrained(directory)
    except (OSError, ValueError, TypeError) as error:
        raise LoadingError(f"cannot read the image processor in {directory}: {error}") from error
    assert isinstance(processor, CLIPImageProcessorPil)
    return processor


def preprocess_for_clip(image_processor: CLIPImageProcessorPil, image: Image.Image) -> Tensor:
    """Resize the shorter edge (bicubic), crop the centre and normalise.

    Args:
        image_processor: Holds size, mean and standard deviation.
        image: Any size and mode; it is taken as RGB, an alpha channel is dropped.

    Returns:
        ``[1, 3, S, S]`` float32.

    Raises:
        ShapeError: The image has no pixels.
    """
    if 0 in image.size:
        raise ShapeError(f"the image is {image.width} x {image.height} pixels: it must have some")
    pixels = image_processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert isinstance(pixels, Tensor)
    return pixels


@torch.no_grad()
def encode_image(
    image_encoder: CLIPVisionModel, image_processor: CLIPImageProcessorPil, image: Image.Image
) -> Tensor:
    """Encode the photo into CLIP's second-to-last hidden states.

    Args:
        image_encoder: CLIP's vision model; it stays as it is.
        image_processor: Made for it (``load_image_processor``).
        image: The photo, any size and mode.

    Returns:
        ``[1, L, D]`` in the encoder's dtype and on its device, L = patches + 1 (class token
        first): the states before the last layer, without the final norm.

    Raises:
        LoadingError: The processor's crop is not the size the encoder takes.
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
