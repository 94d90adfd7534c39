"""The cost of a clip on its way through a streaming VAE, a piece at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder
from swifti2v.planning.costs import Count
from swifti2v.planning.counting import META, Meter

STEADY = 3
"""Latent frames after which each further one costs a causal VAE the same (it is so after two)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Tiles and placement with which a clip goes through the VAE."""

    tile: int | None = None
    """Longest side of a tile in latent cells; None for whole frames."""
    offloads_history: bool = False
    """See ``StreamingDecoder``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamWork:
    """A clip through encoder or decoder."""

    count: Count
    """``kept_bytes`` is the history that stays on the device."""
    pinned_bytes: float
    """Bytes of the history that waits in host memory."""


def count_encoder(
    vae: VideoVAE, size: tuple[int, int], sizes: Sequence[int], tiling: Tiling
) -> StreamWork:
    """Cost of encoding ``size`` (height, width) cells in pieces of ``sizes`` latent frames."""
    height, width = (side * vae.config["scale_factor_spatial"] for side in size)
    time = vae.config["scale_factor_temporal"]
    encoder = StreamingEncoder(vae, tile=tiling.tile, offloads_history=tiling.offloads_history)
    videos = [
        torch.empty(1, 3, time * length - (time - 1) * (i == 0), height, width, device=META)
        for i, length in enumerate(sizes)
    ]
    return _count_pieces(encoder, lambda i: encoder.encode(videos[i]), sizes, tiling)


def count_decoder(
    vae: VideoVAE, size: tuple[int, int], sizes: Sequence[int], tiling: Tiling
) -> StreamWork:
    """Cost of decoding latents of ``size`` (height, width) cells in pieces of ``sizes`` frames."""
    decoder = StreamingDecoder(vae, tile=tiling.tile, offloads_history=tiling.offloads_history)
    channels = vae.config["z_dim"]

    def decode(index: int) -> object:
        return decoder.decode(torch.empty(1, channels, sizes[index], *size, device=META))

    return _count_pieces(decoder, decode, sizes, tiling)


def _count_pieces(
    stream: StreamingEncoder | StreamingDecoder,
    run: Callable[[int], object],
    sizes: Sequence[int],
    tiling: Tiling,
) -> StreamWork:
    """Count until a piece is like all that follow, and multiply that one."""
    last = next((i for i in range(1, len(sizes)) if sum(sizes[:i]) >= STEADY), len(sizes) - 1)
    with torch.inference_mode(), Meter():
        run(0)  # constants that are made once belong to no clip
    stream.reset()
    costs = [Count()]
    with torch.inference_mode(), Meter() as meter:
        for index in range(last + 1):
            run(index)
            costs.append(meter.read())
    total, steady = costs[-1], costs[-1] - costs[-2]
    rest = sum(sizes[last + 1 :]) / sizes[last]
    return StreamWork(
        count=replace(
            total + steady * rest, peak_bytes=total.peak_bytes, kept_bytes=total.kept_bytes
        ),
        pinned_bytes=stream.pinned_bytes() if tiling.offloads_history else 0,
    )
