"""The cost of a clip on its way through a streaming VAE, a piece at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from swifti2v.models.frame_codec import VideoVAE
from swifti2v.models.vae import StreamingDecoder, StreamingEncoder
from swifti2v.planning.counting import META, Count, Meter
from swifti2v.planning.models import num_bytes, pinned_bytes

STEADY = 3
"""Latent frames after which each further one costs a causal VAE the same (it is so after two)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileWork:
    """One tile of a clip through encoder or decoder, its causal history on the device."""

    count: Count
    """``kept_bytes`` is the history."""
    num_pieces: int
    """How often the tile is taken up again."""
    moved_bytes: float
    """Of the history, when it is copied."""
    pinned_bytes: float
    """Of the history, when it waits in host memory."""

    def times(self, num_tiles: int, *, offloads_history: bool) -> Count:
        """All tiles of the clip, one after the other; the history of those that wait is kept."""
        one = self.count
        if not offloads_history:
            kept = num_tiles * one.kept_bytes
            peak = one.peak_bytes + kept - one.kept_bytes
            return replace(one * num_tiles, peak_bytes=peak, kept_bytes=kept)
        moved = self.moved_bytes * (2 * self.num_pieces - 1)  # nothing is fetched at the start
        transfer = num_tiles * (one.transfer_bytes + moved)
        return replace(one * num_tiles, kept_bytes=0, transfer_bytes=transfer)


def count_encoder(vae: VideoVAE, tile: tuple[int, int], num_frames: int) -> TileWork:
    """Cost of encoding ``num_frames`` latent frames of ``tile`` (height, width) cells one by one."""
    height, width = (side * vae.config["scale_factor_spatial"] for side in tile)
    pieces = [
        torch.empty(1, 3, length, height, width, device=META)
        for length in (1, vae.config["scale_factor_temporal"])
    ]
    encoder = StreamingEncoder(vae)
    return _count_pieces(encoder, lambda i: encoder.encode(pieces[i > 0]), [1] * num_frames)


def count_decoder(vae: VideoVAE, tile: tuple[int, int], sizes: Sequence[int]) -> TileWork:
    """Cost of decoding latents of ``tile`` (height, width) cells in pieces of ``sizes`` frames."""
    decoder, channels = StreamingDecoder(vae), vae.config["z_dim"]

    def decode(index: int) -> object:
        return decoder.decode(torch.empty(1, channels, sizes[index], *tile, device=META))

    return _count_pieces(decoder, decode, sizes)


def _count_pieces(
    stream: StreamingEncoder | StreamingDecoder,
    run: Callable[[int], object],
    sizes: Sequence[int],
) -> TileWork:
    """Count until a piece is like all that follow, and multiply that one."""
    last = next((i for i in range(1, len(sizes)) if sum(sizes[:i]) >= STEADY), len(sizes) - 1)
    costs = [Count()]
    with torch.inference_mode(), Meter() as meter:
        for index in range(last + 1):
            run(index)
            costs.append(meter.read())
        history = list(stream.state_dict().values())
    total, steady = costs[-1], costs[-1] - costs[-2]
    rest = sum(sizes[last + 1 :]) / sizes[last]
    return TileWork(
        count=replace(
            total + steady * rest, peak_bytes=total.peak_bytes, kept_bytes=total.kept_bytes
        ),
        num_pieces=len(sizes),
        moved_bytes=sum(map(num_bytes, history)),
        pinned_bytes=sum(map(pinned_bytes, history)),
    )
