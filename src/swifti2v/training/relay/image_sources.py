"""Images of manifests, as a relay trains on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swifti2v.errors import ConfigError
from swifti2v.training.data.clips import ManifestClips
from swifti2v.training.data.crops import cut_clip
from swifti2v.training.engine.draws import Draw
from swifti2v.training.stages.batches import PromptedBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBatch(PromptedBatch):
    """Images as videos of one frame."""

    video: Tensor
    """``[b, 3, 1, H, W]`` in [-1, 1]."""


class ManifestImages:
    """Images of manifests at the size of their bucket, or squares of them.

    Args:
        clips: Their buckets have one frame.
        crop: Side of a random square that is cut out; None takes whole images.

    Raises:
        ConfigError: A bucket is one of clips, or smaller than the square.
    """

    def __init__(self, clips: ManifestClips, crop: int | None) -> None:
        self.clips, self.crop = clips, crop
        for bucket in clips.plan.shares:
            require_image_bucket(bucket, crop)

    def load(self, draw: Draw) -> ImageBatch:
        """See ``FrameSource``."""
        pieces = self.clips.pieces(draw, self.crop)
        loaded, num_replaced = self.clips.take(pieces, self.clips.read)
        return ImageBatch(
            ids=tuple(image.id for image in loaded),
            num_replaced=num_replaced,
            video=torch.cat(
                [
                    cut_clip(image.frames, piece.crop)
                    for image, piece in zip(loaded, pieces, strict=True)
                ]
            ),
            prompts=tuple(image.prompt for image in loaded),
        )


def require_image_bucket(bucket: Sequence[int], crop: int | None) -> None:
    """Refuse a bucket that holds no images, or smaller ones than are to be cut out.

    Args:
        bucket: ``(num_frames, height, width)``.
        crop: Side of a square, or None.

    Raises:
        ConfigError: As said.
    """
    num_frames, height, width = bucket
    if num_frames != 1:
        raise ConfigError(
            f"bucket {num_frames}x{height}x{width} is one of clips; a relay takes images, such as "
            f"1x{height}x{width}"
        )
    if crop is not None and crop > min(height, width):
        raise ConfigError(
            f"crop {crop} is larger than the bucket {width}x{height}; take a smaller one"
        )
