"""Costs of a training's samples before the transformer sees them: reading, encoding, memory, disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from statistics import fmean
from typing import Any, NamedTuple

from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.planning.costs import Count
from swifti2v.planning.counting import META
from swifti2v.planning.streams import STEADY, Tiling, count_encoder
from swifti2v.segments import plan_segments
from swifti2v.shapes import LatentShape, PixelShape, ScaleFactors, pixel_frames
from swifti2v.training.windows import WindowConfig

MEGAPIXEL_SECONDS = 0.019
"""Seconds of one core to decode a million pixels of H.264: 5.6 s for 81 frames of 2560x1408
(docs/training.md)."""
NUM_ENCODED = 2
"""Clips that are encoded for a sample: the true one, and its reference or condition."""
PIXEL_BYTES = 4
"""Bytes of a colour's value on the device, while clips are encoded."""
ENTRY_BYTES = 2
"""Bytes of a value in a cache of latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedPlan:
    """Costs of a phase's largest sample until its latents are there."""

    bucket: PixelShape
    """Size of the clip."""
    entry_bytes: int
    """Bytes of the sample's latents in a cache."""
    mean_frames: float = 0
    """Frames that are read, on average over the windows; 0 where latents are read from a cache."""
    most_frames: int = 0
    """Most frames that are read."""
    frame_bytes: int = 0
    """Bytes of a frame as it is handed to the device."""
    encode_flops: float = 0
    """FLOP of the VAE, on average over the windows; see ``NUM_ENCODED``."""
    encode_bytes: float = 0
    """Most device memory that the VAE takes beside its weights."""

    @property
    def cpu_seconds(self) -> float:
        """Seconds of one core to decode a clip of the bucket's size, H.264."""
        return self.mean_frames * self.bucket.height * self.bucket.width / 1e6 * MEGAPIXEL_SECONDS

    @property
    def host_bytes(self) -> int:
        """Host memory of a sample that waits for the device."""
        return self.most_frames * self.frame_bytes

    @property
    def piece_bytes(self) -> int:
        """Host memory of the frames that a process has read, before they are cut."""
        return self.most_frames * self.bucket.height * self.bucket.width * 3


class FeedWishes(NamedTuple):
    """Wishes of a training for its clips."""

    crop: int | None = None
    """Side of the squares that are cut out; None takes whole frames."""
    windows: WindowConfig | None = None
    """Windows of the samples; None takes whole clips."""
    pixel_bytes: int = 3
    """Bytes of a pixel as it is handed to the device."""
    reads_latents: bool = False
    """Whether latents are read from a cache."""
    keeps_pieces: bool = False
    """Whether a cache holds the latents of whole pieces, not of windows."""


def plan_feed(bucket: PixelShape, vae: Any, scale: ScaleFactors, wishes: FeedWishes) -> FeedPlan:
    """Costs of a sample of ``bucket`` that ``vae``, on the meta device, encodes.

    Raises:
        ShapeError: The clip does not fit the model.
    """
    side = wishes.crop
    shape = bucket if side is None else bucket._replace(height=side, width=side)
    latents = LatentShape.from_pixel_shape(shape, scale, int(vae.config["z_dim"]))
    plans = _list_windows(wishes.windows, latents.num_frames)
    work = _Encoding(vae, (latents.height, latents.width))
    kept = latents.num_frames if wishes.keeps_pieces else max(len(w) for p in plans for w in p)
    entry_bytes = NUM_ENCODED * prod(latents._replace(num_frames=kept)) * ENTRY_BYTES
    if wishes.reads_latents:
        return FeedPlan(bucket=bucket, entry_bytes=entry_bytes)

    def count_read(window: Sequence[int]) -> int:
        return pixel_frames(max(window), scale.time).stop

    def count_encoded(window: Sequence[int]) -> int:
        return len({0, *window}) if isinstance(vae, BlockCodec) else 1 + max(window)

    last = max((window for plan in plans for window in plan), key=max)
    pixels = count_read(last) * shape.height * shape.width * 3
    return FeedPlan(
        bucket=bucket,
        entry_bytes=entry_bytes,
        mean_frames=_mean(plans, count_read),
        most_frames=count_read(last),
        frame_bytes=shape.height * shape.width * wishes.pixel_bytes,
        encode_flops=NUM_ENCODED * _mean(plans, lambda window: work.flops(count_encoded(window))),
        encode_bytes=work.peak_bytes(count_encoded(last)) + NUM_ENCODED * pixels * PIXEL_BYTES,
    )


def _list_windows(config: WindowConfig | None, num_latent_frames: int) -> list[list[Sequence[int]]]:
    """Windows of each plan that ``draw_window`` chooses from; without windows, all frames."""
    if config is None:
        return [[range(num_latent_frames)]]
    return [
        [segment.window for segment in plan_segments(num_latent_frames, size, context)]
        or [range(num_latent_frames)]
        for size, context in product(config.segment_sizes, config.context_sizes)
    ]


def _mean(plans: list[list[Sequence[int]]], measure: Callable[[Sequence[int]], float]) -> float:
    return fmean(fmean(map(measure, plan)) for plan in plans)


class _Encoding:
    """Work of encoding clips of one size, counted for a few lengths: each frame takes the same."""

    def __init__(self, vae: Any, cells: tuple[int, int]) -> None:
        self._vae, self._cells = vae.to(META).eval(), cells
        self._counts: dict[int, Count] = {}

    def flops(self, num_latent_frames: int) -> float:
        """FLOP of so many latent frames."""
        if num_latent_frames <= STEADY + 1:
            return self._count(num_latent_frames).flops
        first, second = self._count(STEADY), self._count(STEADY + 1)
        return first.flops + (num_latent_frames - STEADY) * (second.flops - first.flops)

    def peak_bytes(self, num_latent_frames: int) -> float:
        """Most live memory of so many latent frames."""
        return self._count(min(num_latent_frames, STEADY + 1)).peak_bytes

    def _count(self, number: int) -> Count:
        if number not in self._counts:
            work = count_encoder(self._vae, self._cells, [1] * number, Tiling())
            self._counts[number] = work.count
        return self._counts[number]
