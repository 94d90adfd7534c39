"""Where the images of a relay come from: a manifest's files, or pictures in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from swifti2v.errors import ConfigError, InputError
from swifti2v.media import Frames
from swifti2v.training.data.clips import ManifestClips
from swifti2v.training.data.crops import cut_clip, draw_crop
from swifti2v.training.engine.draws import Draw


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBatch:
    """Images as videos of one frame."""

    ids: tuple[str, ...]
    """Of the b samples."""
    num_replaced: int
    """Samples that could not be read and were replaced."""
    video: Tensor
    """``[b, 3, 1, H, W]`` in [-1, 1]."""
    prompts: tuple[str, ...]
    """Captions of the b samples."""


class ImageSource(Protocol):
    """Loads images."""

    def load(self, draw: Draw) -> ImageBatch:
        """The samples of a micro-batch, all of one size."""


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
        """See ``ImageSource``."""
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


class PictureCrops:
    """Square crops of pictures in memory, half of them mirrored.

    Args:
        pictures: ``[H, W, 3]`` uint8 each, of any size.
        crop: Side in pixels.

    Raises:
        InputError: No picture is large enough.
    """

    def __init__(self, pictures: Sequence[Frames], crop: int) -> None:
        self.pictures = [picture for picture in pictures if min(picture.shape[:2]) >= crop]
        self.crop = crop
        if not self.pictures:
            raise InputError(
                f"none of {len(pictures)} pictures is {crop} px large; add larger ones"
            )

    def load(self, draw: Draw) -> ImageBatch:
        """See ``ImageSource``."""
        names, videos = [], []
        for rng in draw.samples():
            index = int(rng.integers(len(self.pictures)))
            picture = self.pictures[index]
            place = draw_crop((picture.shape[0], picture.shape[1]), self.crop, 1, rng)
            video = cut_clip(picture[None], place)
            videos.append(video.flip(-1) if rng.random() < 0.5 else video)
            names.append(f"picture {index}")
        prompts = ("",) * len(names)
        return ImageBatch(
            ids=tuple(names), num_replaced=0, video=torch.cat(videos), prompts=prompts
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
