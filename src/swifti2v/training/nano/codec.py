"""The nano model's codec: its statistics."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from swifti2v.errors import InputError
from swifti2v.media import Frames, frames_to_video, resize_video
from swifti2v.models.vae.block_codec import BlockCodec, count_channels

PIECES_PER_CLIP = 6
MIN_DEVIATION = 1e-3
"""Floor of a channel's deviation, below that of natural video (0.0018 at the least)."""


def mean_channels(num_channels: int) -> tuple[int, int, int]:
    """Channels with a mean: the block averages of luma, Cb and Cr."""
    return 0, num_channels // 3, num_channels * 2 // 3


@torch.no_grad()
def fit_codec(
    clips: Sequence[Frames], space_factor: int = 8, downscale: int = 1, seed: int = 0
) -> BlockCodec:
    """Measure the codec's statistics on random pieces of clips.

    Clips are ``[T, H, W, 3]`` uint8, T at least 5, and are scaled down to the codec's videos. The
    divisor of a channel is not its deviation s but s / (0.3 * (s / 0.05) ** 0.25): scaled so, weak
    channels (fine detail) keep less power than strong ones, as they matter less.

    Raises:
        InputError: A clip is too short.
    """
    kind = {"z_dim": count_channels(space_factor), "scale_factor_spatial": space_factor}
    codec, rng = BlockCodec(**kind), np.random.default_rng(seed)
    if not clips or min(len(clip) for clip in clips) < 5:
        raise InputError("the codec's statistics need clips of at least 5 frames; add longer clips")
    total = squares = torch.zeros(kind["z_dim"], dtype=torch.float64)
    count = 0
    for clip in clips:
        for _ in range(PIECES_PER_CLIP):
            start = int(rng.integers(len(clip) - 4))
            video = frames_to_video(clip[start : start + 4])
            height, width = (side // downscale for side in video.shape[-2:])
            latents = codec.encode_frames(resize_video(video, height, width, "area"))
            values = latents[0].double().flatten(1)  # [C, cells]
            total, squares = total + values.sum(1), squares + values.square().sum(1)
            count += values.shape[1]
    mean = total / count
    deviation = (squares / count - mean**2).clamp(min=0).sqrt().clamp(min=MIN_DEVIATION).float()
    divisor = deviation / (0.3 * (deviation / 0.05) ** 0.25)
    kept = torch.zeros(len(mean))
    kept[list(mean_channels(len(mean)))] = 1
    fitted: BlockCodec = BlockCodec(
        latents_mean=_to_config(mean * kept), latents_std=_to_config(divisor), **kind
    )
    return fitted


def _to_config(values: Tensor) -> tuple[float, ...]:
    # Six digits are exact for float32's purposes here and keep the configuration readable.
    return tuple(float(f"{value:.6g}") for value in values.tolist())
