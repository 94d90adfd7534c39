"""Training windows of Stage II: crops of clips and pictures in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swifti2v.config import Stage2Config, settings
from swifti2v.errors import ConfigError, InputError
from swifti2v.media import Frames
from swifti2v.pipelines.carrying import CROP_MARGIN
from swifti2v.pipelines.course import draw_course
from swifti2v.segments import Segment
from swifti2v.shapes import FrameSize, latent_frames, pixel_frames
from swifti2v.training.data.camera_motion import Scene, draw_view, render_move
from swifti2v.training.data.crops import cut_clip, cut_pair, draw_crop, show_pair
from swifti2v.training.data.motion_prompts import draw_prompt
from swifti2v.training.engine.draws import Draw, choose, draw_share
from swifti2v.training.nano.clip_references import START_INTERVAL, ClipReferences, carry_known
from swifti2v.training.nano.material import Material
from swifti2v.training.stages.batches import Stage2Frames
from swifti2v.training.windows import WindowConfig, draw_window


@settings
class MixConfig:
    """Shares of the kinds of samples."""

    clips: float = 1.0
    """Clips and their own small versions."""
    pictures: float = 0.0
    """A camera that moves over large pictures, and the small version of that."""
    transition: float = 0.0
    """Stage-transition samples: clips and what Stage I made of their small versions."""
    uncarried: float = 0.0
    """Part of the pictures whose reference has no detail of the photo, as where things come into
    view; in [0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.uncarried <= 1:
            raise ConfigError(f"mix.uncarried is {self.uncarried}; it must be in [0, 1]")
        shares = self.shares()
        if min(shares) < 0 or sum(shares) <= 0:
            raise ConfigError(
                f"mix is {shares} for clips, pictures, transition; none may be below 0, and one "
                "must be above"
            )

    def shares(self) -> tuple[float, float, float]:
        """Clips, pictures, transition."""
        return self.clips, self.pictures, self.transition


@dataclass(frozen=True, slots=True)
class TransitionClip:
    """A clip and what Stage I made of its small version."""

    name: str
    """Name for messages."""
    frames: Frames
    """``[T, H, W, 3]``, the truth."""
    low: Frames
    """``[T, h, w, 3]``."""
    prompt: str
    """Text that describes the clip."""


class MaterialSource:
    """Square crops of what is held in memory, their side a multiple of 16.

    Half of them is mirrored. Lengths come with the part of the steps that take each; where a step
    asks for more frames than all clips of a kind have, the other kinds take its share.

    Raises:
        InputError: The mix wants what is not there.
    """

    def __init__(
        self,
        material: Material,
        transition: Sequence[TransitionClip],
        mix: MixConfig,
        crop: int,
        downscale: int,
        lengths: Mapping[int, float],
        windows: WindowConfig,
        stage2: Stage2Config,
    ) -> None:
        self.lengths, self.windows, self.stage2 = lengths, windows, stage2
        self.material, self.transition, self.mix = material, transition, mix
        self.crop, self.downscale = crop, downscale
        self._references = ClipReferences(material.clips, downscale, self.stage2)
        there = {
            "clips": len(material.clips),
            "pictures": len(material.pictures),
            "transition": len(transition),
        }
        for (name, number), share in zip(there.items(), mix.shares(), strict=True):
            if share > 0 and number == 0:
                raise InputError(
                    f"mix.{name} is {share}, but there are no {name}; add some, or set it 0"
                )

    def load(self, draw: Draw) -> Stage2Frames:
        """See ``FrameSource``.

        Raises:
            InputError: No clip is long enough.
        """
        rng = draw.shared()
        num_frames = draw_share(self.lengths, rng)
        segment = draw_window(self.windows, self.stage2, latent_frames(num_frames), rng)
        return self.cut(draw, segment, num_frames)

    def cut(self, draw: Draw, segment: Segment, num_frames: int) -> Stage2Frames:
        """One window of each sample of a micro-batch, of clips of ``num_frames`` frames."""
        covered = tuple(sorted({0, *segment.window}))  # the photo is the first of all frames
        frames = [pixel for latent in covered for pixel in pixel_frames(latent)]
        pieces = [self._draw_piece(rng, frames, num_frames) for rng in draw.samples()]
        names, videos, references, prompts = zip(*pieces, strict=True)
        return Stage2Frames(
            ids=names,
            num_replaced=0,
            segment=segment,
            latent_frames=covered,
            video=torch.stack(videos),
            reference=torch.stack(references),
            prompts=prompts,
        )

    def _draw_piece(
        self, rng: np.random.Generator, frames: list[int], num_frames: int
    ) -> tuple[str, Tensor, Tensor, str]:
        """Name, video and reference ``[3, T, crop, crop]``, and prompt."""
        shares = self._shares(num_frames)
        kind = int(rng.choice(3, p=shares / shares.sum()))
        if kind == 2:
            return self._cut_transition(rng, frames, num_frames)
        draw = self._render_picture if kind == 1 else self._cut_clip
        name, video, reference = draw(rng, frames, num_frames)
        if rng.random() < 0.5:
            video, reference = video.flip(-1), reference.flip(-1)
        return name, video, reference, ""

    def _shares(self, num_frames: int) -> NDArray[np.float64]:
        """Shares of clips, pictures and transition samples among those that are long enough."""
        long_enough = (
            max(map(len, self.material.clips), default=0) >= num_frames,
            True,
            max((len(clip.frames) for clip in self.transition), default=0) >= num_frames,
        )
        shares = np.where(long_enough, self.mix.shares(), 0.0)
        if not shares.any():
            raise InputError(f"no training clip has {num_frames} frames; add longer clips")
        return shares

    def _cut_clip(
        self, rng: np.random.Generator, frames: list[int], num_frames: int
    ) -> tuple[str, Tensor, Tensor]:
        index = _draw_long(self.material.clips, num_frames, rng)
        clip = self.material.clips[index]
        num_starts = (len(clip) - num_frames) // START_INTERVAL + 1
        start = START_INTERVAL * int(rng.integers(num_starts))
        crop = draw_crop(clip.shape[1:3], self.crop, self.downscale, rng)
        video = cut_clip(clip, crop, [start + frame for frame in frames])
        reference = self._references.read(index, start, frames, crop)
        return f"clip {index}", video[0], reference[0]

    def _render_picture(
        self, rng: np.random.Generator, frames: list[int], num_frames: int
    ) -> tuple[str, Tensor, Tensor]:
        index = int(rng.integers(len(self.material.pictures)))
        scene, size = Scene(self.material.pictures[index], None, None), self.material.size
        view, move = draw_view(scene.picture.shape[:2], size, rng), draw_prompt(rng).move
        course = draw_course(num_frames, int(rng.integers(2**62)))
        crop = draw_crop(size, self.crop, self.downscale, rng)
        outer = crop.grow(CROP_MARGIN * self.downscale, FrameSize(*size))
        video, way = render_move(scene, view, move, course.at(frames), size, outer)
        photo, _ = render_move(scene, view, move, course.at([0]), size)
        detail = "none" if rng.random() < self.mix.uncarried else self.stage2.reference_detail
        stage2 = replace(self.stage2, reference_detail=detail)
        reference = carry_known(video, photo, way, outer, self.downscale, stage2)
        part = crop.within(outer)
        inner = (..., part.rows, part.columns)
        return f"picture {index}", video[inner], reference[inner]

    def _cut_transition(
        self, rng: np.random.Generator, frames: list[int], num_frames: int
    ) -> tuple[str, Tensor, Tensor, str]:
        index = _draw_long([clip.frames for clip in self.transition], num_frames, rng)
        clip, low = self.transition[index], self.downscale
        crop = draw_crop(clip.frames.shape[1:3], self.crop, low, rng)
        part, small = cut_pair(clip.name, clip.frames, clip.low, frames, crop, low)
        assert small is not None  # there is one of the clip
        pair = torch.from_numpy(part), torch.from_numpy(small)
        video, reference = show_pair(*pair, low, self.stage2)
        return clip.name, video[0], reference[0], clip.prompt


def _draw_long(clips: Sequence[Frames], num_frames: int, rng: np.random.Generator) -> int:
    return choose([index for index, clip in enumerate(clips) if len(clip) >= num_frames], rng)
