"""A closed-form video codec with the interface of a causal video VAE, for the shipped nano model.

The first frame stands alone; every further latent frame holds four pixel frames. A latent cell
is an orthonormal cosine transform of n x n pixels of luma and n/2 x n/2 pixels of chroma over those
four frames; n is 8, or 4 for small videos. There is nothing to train, luma is kept exactly, chroma
as 4:2:0 video keeps it.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor
from torch.nn import functional as F

from swifti2v.errors import LoadingError

# RGB in [-1, 1] to Y, Cb, Cr (ITU-R BT.709, full range, all three centred on 0).
_KR, _KB = 0.2126, 0.0722
_RGB_TO_YCC = (
    (_KR, 1 - _KR - _KB, _KB),
    (-_KR / (2 * (1 - _KB)), -(1 - _KR - _KB) / (2 * (1 - _KB)), 0.5),
    (0.5, -(1 - _KR - _KB) / (2 * (1 - _KR)), -_KB / (2 * (1 - _KR))),
)


TIME_FACTOR = 4
"""Pixel frames of a latent frame."""


def count_channels(space_factor: int) -> int:
    """Channels of a cell of ``space_factor`` squared pixels: luma and two halved chroma planes."""
    return space_factor**2 * TIME_FACTOR * 3 // 2


def cosine_basis(size: int) -> Tensor:
    """Orthonormal DCT-II matrix ``[size, size]`` in float32; row k is frequency k."""
    k = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (k[None, :] + 0.5) * k[:, None])
    basis[0] *= math.sqrt(0.5)
    return (basis * math.sqrt(2 / size)).float()


class _Constants(NamedTuple):
    """What the codec multiplies by, in float32."""

    time: Tensor
    luma: Tensor
    chroma: Tensor
    rgb_to_ycc: Tensor
    ycc_to_rgb: Tensor


@cache
def _constants(space_factor: int, device: torch.device) -> _Constants:
    # Not buffers of the model: those would be rounded with it when it is cast to bfloat16.
    # Made outside inference mode, so that they can take part in a training graph as well.
    with torch.inference_mode(False), torch.no_grad():
        rgb_to_ycc = torch.tensor(_RGB_TO_YCC, dtype=torch.float32)
        sizes = (TIME_FACTOR, space_factor, space_factor // 2)
        own = (*map(cosine_basis, sizes), rgb_to_ycc, rgb_to_ycc.inverse())
        return _Constants(*(constant.to(device) for constant in own))


class BlockCodec(ModelMixin, ConfigMixin):
    """Block cosine transform behind the names of ``AutoencoderKLWan``.

    Channels are ordered luma, Cb, Cr, each ``[time, row, column]`` frequency. A frame that stands
    alone is coded as four equal frames, so the first latent frame of a still clip equals the rest.
    It computes in float32 whatever its dtype.

    Args:
        latents_mean: Mean of each channel over natural video, on which latents are centred; 0 if
            not given.
        latents_std: Divisor of each channel after centring, positive; 1 if not given.
        z_dim: Channels, ``count_channels(scale_factor_spatial)``; in the configuration for readers
            of ``AutoencoderKLWan`` files.
        scale_factor_temporal: 4, likewise.
        scale_factor_spatial: n, side of a cell in pixels; 8 or 4.

    Raises:
        LoadingError: A configuration of another codec, or statistics that do not fit the channels.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        z_dim: int = count_channels(8),
        scale_factor_temporal: int = TIME_FACTOR,
        scale_factor_spatial: int = 8,
    ) -> None:
        sides = {side: count_channels(side) for side in (4, 8)}
        if scale_factor_temporal != TIME_FACTOR or sides.get(scale_factor_spatial) != z_dim:
            raise LoadingError(
                "a BlockCodec has (z_dim, scale_factor_temporal, scale_factor_spatial) (96, 4, 4) or "
                f"(384, 4, 8), not {(z_dim, scale_factor_temporal, scale_factor_spatial)}: the "
                "configuration is not one of this codec"
            )
        mean = (0.0,) * z_dim if latents_mean is None else latents_mean
        deviation = (1.0,) * z_dim if latents_std is None else latents_std
        if not len(mean) == len(deviation) == z_dim or min(deviation) <= 0:
            raise LoadingError(
                f"latents_mean has {len(mean)} and latents_std {len(deviation)} values, the smallest "
                f"of latents_std is {min(deviation, default=None)}: give {z_dim} of each, "
                "latents_std above 0"
            )
        statistics = {"latents_mean": tuple(mean), "latents_std": tuple(deviation)}
        self.register_to_config(**statistics)  # type: ignore[no-untyped-call]
        super().__init__()  # type: ignore[no-untyped-call]
        self.space_factor = scale_factor_spatial
        # A model without parameters has no dtype of its own; this one carries it.
        self.register_buffer("one", torch.ones(1))

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Code the frames of one or more whole latent frames.

        Args:
            frames: ``[B, 3, T, H, W]`` in [-1, 1]; T is 1 (a frame that stands alone) or a multiple
                of 4; H and W are multiples of n.

        Returns:
            ``[B, C, F, H/n, W/n]`` float32, unscaled latents; F is 1 or T / 4.
        """
        constants = _constants(self.space_factor, frames.device)
        frames = frames.float()
        if frames.shape[2] == 1:
            frames = frames.expand(-1, -1, TIME_FACTOR, -1, -1)
        ycc = torch.einsum("kc,bcthw->bkthw", constants.rgb_to_ycc, frames)
        luma = _forward_plane(ycc[:, 0], constants.luma, constants.time)
        halved = F.avg_pool3d(ycc[:, 1:], (1, 2, 2))
        chroma = [
            _forward_plane(plane, constants.chroma, constants.time) for plane in halved.unbind(1)
        ]
        return torch.cat([luma, *chroma], dim=1)

    def decode_frames(self, latents: Tensor, *, first: bool) -> Tensor:
        """Inverse of ``encode_frames``.

        Args:
            latents: ``[B, C, F, h, w]`` unscaled latents.
            first: The latents are the first of a clip (F = 1): one frame, the mean of its four.

        Returns:
            ``[B, 3, T, n h, n w]`` float32; T is 1 or 4F; not clamped.
        """
        constants = _constants(self.space_factor, latents.device)
        latents = latents.float()
        num_luma, num_chroma = latents.shape[1] * 2 // 3, latents.shape[1] // 6
        luma, *chroma = torch.split(latents, [num_luma, num_chroma, num_chroma], dim=1)
        planes = [_inverse_plane(luma, constants.luma, constants.time)]
        for plane in chroma:
            small = _inverse_plane(plane, constants.chroma, constants.time)
            planes.append(small.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2))
        ycc = torch.stack(planes, dim=1)  # [B, 3, 4F, H, W]
        if first:
            ycc = ycc.mean(dim=2, keepdim=True)
        return torch.einsum("ck,bkthw->bcthw", constants.ycc_to_rgb, ycc)


def _forward_plane(plane: Tensor, basis: Tensor, basis_time: Tensor) -> Tensor:
    """``[B, T, H, W]`` to ``[B, 4 n n, T / 4, H / n, W / n]`` with n = len(basis)."""
    n = basis.shape[0]
    batch, num_frames, height, width = plane.shape
    blocks = plane.reshape(batch, num_frames // 4, 4, height // n, n, width // n, n)
    blocks = torch.einsum("kt,bftyixj->bfkyixj", basis_time, blocks)
    blocks = torch.einsum("pi,bfkyixj->bfkypxj", basis, blocks)
    blocks = torch.einsum("qj,bfkypxj->bkpqfyx", basis, blocks)
    return blocks.flatten(1, 3)


def _inverse_plane(coefficients: Tensor, basis: Tensor, basis_time: Tensor) -> Tensor:
    """Inverse of ``_forward_plane``."""
    n = basis.shape[0]
    batch, _, num_frames, height, width = coefficients.shape
    blocks = coefficients.reshape(batch, 4, n, n, num_frames, height, width)
    blocks = torch.einsum("kt,bkpqfyx->btpqfyx", basis_time, blocks)
    blocks = torch.einsum("pi,btpqfyx->btiqfyx", basis, blocks)
    blocks = torch.einsum("qj,btiqfyx->bftyixj", basis, blocks)
    return blocks.flatten(5, 6).flatten(3, 4).flatten(1, 2)
