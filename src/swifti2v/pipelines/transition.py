"""The hybrid reference between Stage I and Stage II, built and encoded a piece at a time."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from swifti2v.config import Stage2Config
from swifti2v.errors import ShapeError
from swifti2v.media import Frames, frames_to_video, resize_video
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.streaming import StreamingEncoder
from swifti2v.pipelines.carrying import (
    CROP_MARGIN,
    GivenMotion,
    MotionFinder,
    MotionSearch,
    find_detail,
)
from swifti2v.shapes import Crop, FrameSize, latent_frames, pixel_frames


class Growth(Protocol):
    """Makes the frames of a clip as far as they are needed."""

    num_made: int
    """Frames that are there."""

    def make_through(self, num_frames: int) -> None:
        """Make so many frames, or more."""


@dataclass(frozen=True, slots=True)
class MotionReference:
    """A low-resolution clip that says how things move: Stage I's output, or the user's own clip."""

    frames: Frames
    """``[T, h, w, 3]`` uint8."""
    displacement: Tensor | None = None
    """``[T, 2, a, b]`` float32 from every frame to frame 0, right and down in pixels of ``frames``, at
    the centres of a x b equal cells of the frame; None where nobody knows."""
    growth: Growth | None = field(default=None, compare=False)
    """Makes frames that are not there yet; None where all are."""

    @property
    def num_made(self) -> int:
        """Frames that are there."""
        return len(self.frames) if self.growth is None else self.growth.num_made

    def wait_for(self, num_frames: int) -> None:
        """Have so many frames made."""
        if self.growth is not None:
            self.growth.make_through(num_frames)


class ReferenceFrames:
    """Frames of the hybrid reference: the motion reference enlarged, with the photo in front.

    With ``reference_detail`` carried, every other frame has the photo's detail where the motion
    reference moved it. A frame depends on itself, on frame 0 and on the photo alone, so it does not
    matter which frames were read before it.

    Args:
        motion_reference: Detail is carried along its displacement; where it has none, that is
            searched.
        photo: ``[1, 3, 1, H, W]`` in [-1, 1], at the output size.
        config: Its ``upsampling``, ``reference_start`` and ``reference_detail`` are read.
        find_motion: Takes the place of displacement and search; None chooses between them.

    Raises:
        ShapeError: The clip's aspect is not the photo's, or the displacement is of another clip.
        NumericalError: The displacement is not finite.
    """

    def __init__(
        self,
        motion_reference: MotionReference,
        photo: Tensor,
        config: Stage2Config,
        find_motion: MotionFinder | None = None,
    ) -> None:
        frames, displacement = motion_reference.frames, motion_reference.displacement
        _, low_height, low_width, _ = frames.shape
        height, width = photo.shape[-2:]
        if low_height * width != low_width * height:
            raise ShapeError(
                f"the motion reference is {low_width}x{low_height}, the output {width}x{height}: "
                "the aspects differ; crop the clip or choose an output size of its aspect"
            )
        self.motion_reference, self.photo = frames, photo
        self.upsampling = config.upsampling
        self.starts_with_photo = config.reference_start == "photo"
        self._search: MotionSearch | None = None
        self._find_motion: MotionFinder | None = None
        if config.reference_detail == "none":
            return
        if find_motion is not None:
            self._find_motion = find_motion
        elif displacement is not None:
            self._find_motion = GivenMotion(displacement, frames)
        else:
            self._search = MotionSearch(frames, photo, lambda: motion_reference.num_made)
            self._find_motion = self._search

    def read(self, start: int, stop: int) -> Tensor:
        """Frames ``[1, 3, stop - start, H, W]`` from ``start`` on; not clamped."""
        if self.starts_with_photo and (start, stop) == (0, 1):
            return self.photo
        return self._read(range(start, stop))

    def read_crop(self, places: Sequence[int], crop: Crop) -> Tensor:
        """A part ``[1, 3, N, h, w]`` of some frames, as it is in the whole ones.

        Args:
            places: The N frames.
            crop: Corner and sides in whole pixels of the motion reference, of which the output is a
                whole multiple.
        """
        frame = FrameSize(*self.photo.shape[-2:])
        outer = crop.grow(CROP_MARGIN * frame.height // self.motion_reference.shape[1], frame)
        part = crop.within(outer)
        return self._read(places, outer)[..., part.rows, part.columns]

    def _read(self, places: Sequence[int], crop: Crop | None = None) -> Tensor:
        """Return some frames, or a crop of them."""
        photo, parts = self.photo, self.motion_reference[list(places)]
        shown = photo
        if crop is not None:
            low = crop.divide(photo.shape[-2] // self.motion_reference.shape[1])
            parts = parts[:, low.rows, low.columns]
            shown = photo[..., crop.rows, crop.columns]
        small = frames_to_video(parts).to(photo.device)
        video = resize_video(small, shown.shape[-2], shown.shape[-1], self.upsampling)
        for number, place in enumerate(places):
            frame = slice(number, number + 1)
            if place == 0 and self.starts_with_photo:
                video[:, :, frame] = shown
            elif self._find_motion is not None:
                motion = self._find_motion(place).to(photo.device)
                detail = find_detail(small[:, :, frame], photo, motion, self.upsampling, crop)
                video[:, :, frame] += detail
        return video

    def close(self) -> None:
        """End the search for motion; nothing can be read afterwards."""
        if self._search is not None:
            self._search.close()


def make_reference(
    motion_reference: MotionReference, photo: Tensor, config: Stage2Config | None = None
) -> Tensor:
    """All frames of a hybrid reference at once, for short clips: see ``ReferenceFrames``.

    Returns:
        ``[1, 3, T, H, W]``, not clamped.
    """
    with closing(ReferenceFrames(motion_reference, photo, config or Stage2Config())) as frames:
        return frames.read(0, len(motion_reference.frames))


class HybridReference:
    """Upsampled motion reference whose first frame is the photo, encoded only as far as asked.

    Neither the upsampled clip nor its latents are ever held whole: latents before the oldest
    frame that a later segment can still need are dropped with ``forget_before``.

    Args:
        motion_reference: See ``ReferenceFrames``; T is ``time * k + 1``.
        photo: See ``ReferenceFrames``.
        vae: Stage II's VAE.
        config: See ``ReferenceFrames``; its ``vae_tile`` is read as well.
        offloads_history: See ``StreamingEncoder``.

    Raises:
        ShapeError: The motion reference or the displacement does not fit.
        NumericalError: The displacement is not finite.

    Source:
        SwiftI2V, arXiv:2605.06356, section 3.1 (pixel-space transition).
    """

    def __init__(
        self,
        motion_reference: MotionReference,
        photo: Tensor,
        vae: AutoencoderKLWan | BlockCodec,
        config: Stage2Config | None = None,
        *,
        offloads_history: bool = False,
    ) -> None:
        config = config or Stage2Config()
        self.frames = ReferenceFrames(motion_reference, photo, config)
        self._motion = motion_reference
        self._vae, self._tile = vae, config.vae_tile
        self._encoder = StreamingEncoder(vae, tile=self._tile, offloads_history=offloads_history)
        self._offloads_history = offloads_history
        self._time = int(vae.config["scale_factor_temporal"])
        self._latents: dict[int, Tensor] = {}
        self._encoded = 0

    @property
    def num_latent_frames(self) -> int:
        """F of the whole clip."""
        return latent_frames(len(self.frames.motion_reference), self._time)

    def wait_for(self, frames: tuple[int, ...]) -> None:
        """Have the motion reference made as far as latent frames read it."""
        self._motion.wait_for(pixel_frames(max(frames), self._time).stop)

    def latents(self, frames: tuple[int, ...]) -> Tensor:
        """Reference latents ``[1, C, len(frames), h, w]`` of the frames asked for.

        Raises:
            ShapeError: A frame is past the end or was forgotten.
        """
        if self._encoded <= max(frames):
            self._encode_through(max(frames))
        missing = [frame for frame in frames if frame not in self._latents]
        if missing:
            raise ShapeError(f"reference latents of frames {missing} are no longer held")
        return torch.cat([self._latents[frame] for frame in frames], dim=2)

    def anchor(self) -> Tensor:
        """Latents ``[1, C, 1, h, w]`` of the photo alone."""
        if self.frames.starts_with_photo:
            return self.latents((0,))  # z_x equals frame 0 of z_ref
        return StreamingEncoder(self._vae, tile=self._tile).encode(self.frames.photo)

    def forget_before(self, frame: int) -> None:
        """Drop latents of frames below ``frame``, but never the anchor's."""
        for index in [i for i in self._latents if 0 < i < frame]:
            del self._latents[index]

    def pixels(self, latent_frame: int) -> Tensor:
        """Frames ``[1, 3, t, H, W]`` of the hybrid reference that one latent frame holds."""
        frames = pixel_frames(latent_frame, self._time)
        num_frames = len(self.frames.motion_reference)
        if frames.stop > num_frames:
            raise ShapeError(
                f"latent frame {latent_frame} is past the end of a motion reference of "
                f"{num_frames} frames"
            )
        return self.frames.read(frames.start, frames.stop)

    def close(self) -> None:
        """End the searches for frames that nobody will request."""
        self.frames.close()

    def _encode_through(self, last: int) -> None:
        """Encode up to ``last``: all at once if the history waits elsewhere, to fetch it once."""
        places = range(self._encoded, last + 1)
        width = len(places) if self._offloads_history else 1
        for start in places[::width]:
            group = places[start - places[0] : start - places[0] + width]
            pieces = [self.pixels(place) for place in group]
            video = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
            del pieces
            latents = torch.split(self._encoder.encode(video), 1, dim=2)
            self._latents |= dict(zip(group, latents, strict=True))
        self._encoded = last + 1

    def __repr__(self) -> str:
        shape: Any = self.frames.motion_reference.shape
        return f"HybridReference({shape}, {self._encoded}/{self.num_latent_frames} encoded)"
