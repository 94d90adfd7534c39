"""References of Stage II for clips in memory, made once for whole frames and read in crops."""

from collections.abc import Sequence
from functools import cached_property, lru_cache

from torch import Tensor
from torch.nn import functional as F

from swifti2v.config import Stage2Config
from swifti2v.media import Frames, downscale, frames_to_video, resize_video, video_to_frames
from swifti2v.pipelines.carrying import (
    Motion,
    estimate_motion,
    grey_levels,
    look_up,
    move_detail,
)
from swifti2v.pipelines.transition import MotionReference, ReferenceFrames
from swifti2v.shapes import Crop

START_INTERVAL = 16
"""The photo of a training clip is one of its frames at multiples of this."""
NUM_KEPT = 4096
"""Frames whose motion is kept; at 640x384 about 2 GB."""


class ClipReferences:
    """Hybrid references of clips, ``[T, H, W, 3]`` uint8 each, and their own small versions.

    Motion is searched in whole frames, as in sampling, and kept, so that a step searches little.
    """

    def __init__(self, clips: Sequence[Frames], downscale: int, stage2: Stage2Config) -> None:
        self.clips, self.downscale, self.stage2 = clips, downscale, stage2
        self._find_motion = lru_cache(maxsize=NUM_KEPT)(self._search)

    def read(self, clip: int, start: int, places: Sequence[int], crop: Crop) -> Tensor:
        """Read the reference of a crop of a clip's frames, ``[1, 3, N, h, w]``, not clamped.

        Places count from ``start``, the photo. The crop lies on multiples of ``downscale``.
        """
        photo = frames_to_video(self.clips[clip][start : start + 1])
        small = MotionReference(self._small[clip][start:])

        def find_motion(place: int) -> Motion:
            return self._find_motion(clip, start, place)

        return ReferenceFrames(small, photo, self.stage2, find_motion).read_crop(places, crop)

    def _search(self, clip: int, start: int, place: int) -> Motion:
        small = self._small[clip]
        photo = grey_levels(frames_to_video(self.clips[clip][start : start + 1]))
        return estimate_motion(small[start + place], small[start], photo)

    @cached_property
    def _small(self) -> list[Frames]:
        return [downscale(clip, self.downscale) for clip in self.clips]


def carry_known(
    video: Tensor,
    photo: Tensor,
    displacement: Tensor,
    crop: Crop,
    downscale: int,
    stage2: Stage2Config,
) -> Tensor:
    """Make the reference of Stage II, ``[3, N, h, w]``, for a crop of a clip whose motion is known.

    ``video`` is the crop ``[3, N, h, w]`` in [-1, 1], frame 0 the photo's; ``photo`` the whole
    first frame ``[3, 1, H, W]``; ``displacement`` ``[2, N, h, w]`` says where each point was in it,
    in pixels. The reference is not clamped.
    """
    height, width = video.shape[-2:]
    small = resize_video(video[None], height // downscale, width // downscale, "area")
    small = frames_to_video(video_to_frames(small))
    reference = resize_video(small, height, width, stage2.upsampling)
    if stage2.reference_detail == "carried":
        low_size = (photo.shape[-2] // downscale, photo.shape[-1] // downscale)
        rounded = video_to_frames(resize_video(photo[None], *low_size, "area"))
        first = frames_to_video(rounded)[:, :, 0]
        low_corner = (crop.top // downscale, crop.left // downscale)
        low_way = F.avg_pool2d(displacement, downscale) / downscale
        for index in range(1, video.shape[1]):
            frame = slice(index, index + 1)
            low, _ = look_up(first, low_way[None, :, index], low_corner)
            reference[:, :, frame] += move_detail(
                small[:, :, frame],
                photo[None],
                displacement[None, :, index],
                (crop.top, crop.left),
                stage2.upsampling,
                low=low,
            )
    if stage2.reference_start == "photo":
        reference[:, :, :1] = video[None, :, :1]
    return reference[0]
