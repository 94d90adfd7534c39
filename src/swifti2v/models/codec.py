"""A closed-form video codec with the interface of a causal video VAE, for the shipped nano model.

The first frame stands alone; every further latent frame holds four pixel frames. A latent cell
is an orthonormal cosine transform of 8x8 pixels of luma and 4x4 pixels of chroma over those four
frames. There is nothing to train, luma is kept exactly, chroma as 4:2:0 video keeps it.
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
def _constants(device: torch.device) -> _Constants:
    # Not buffers of the model: those would be rounded with it when it is cast to bfloat16.
    # Made outside inference mode, so that they can take part in a training graph as well.
    with torch.inference_mode(False), torch.no_grad():
        rgb_to_ycc = torch.tensor(_RGB_TO_YCC, dtype=torch.float32)
        own = (*map(cosine_basis, (4, 8, 4)), rgb_to_ycc, rgb_to_ycc.inverse())
        return _Constants(*(constant.to(device) for constant in own))


class BlockCodec(ModelMixin, ConfigMixin):
    """Block cosine transform behind the names of ``AutoencoderKLWan``.

    Channels are ordered luma, Cb, Cr, each ``[time, row, column]`` frequency. A frame that stands
    alone is coded as four equal frames, so the first latent frame of a still clip equals the rest.
    It computes in float32 whatever its dtype.

    Args:
        latents_mean: Mean of each of the 384 channels over natural video; latents are centred on it.
        latents_std: Divisor of each channel after centring; positive.
        z_dim: 384; written into the configuration for readers of ``AutoencoderKLWan`` files.
        scale_factor_temporal: 4, likewise.
        scale_factor_spatial: 8, likewise.

    Raises:
        LoadingError: A configuration of another codec, or statistics that do not fit 384 channels.
    """

    time_factor = 4
    space_factor = 8
    z_dim = space_factor**2 * time_factor * 3 // 2

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latents_mean: tuple[float, ...] = (0.0,) * z_dim,
        latents_std: tuple[float, ...] = (1.0,) * z_dim,
        z_dim: int = z_dim,
        scale_factor_temporal: int = time_factor,
        scale_factor_spatial: int = space_factor,
    ) -> None:
        fixed = (self.z_dim, self.time_factor, self.space_factor)
        given = (z_dim, scale_factor_temporal, scale_factor_spatial)
        if given != fixed:
            raise LoadingError(
                f"a BlockCodec has (z_dim, scale_factor_temporal, scale_factor_spatial) {fixed}, not "
                f"{given}: the configuration is not one of this codec"
            )
        if not len(latents_mean) == len(latents_std) == z_dim or min(latents_std) <= 0:
            raise LoadingError(
                f"latents_mean has {len(latents_mean)} and latents_std {len(latents_std)} values, the "
                f"smallest of latents_std is {min(latents_std, default=None)}: give {z_dim} of each, "
                "latents_std above 0"
            )
        super().__init__()  # type: ignore[no-untyped-call]
        # A model without parameters has no dtype of its own; this one carries it.
        self.register_buffer("one", torch.ones(1))

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Code the frames of one or more whole latent frames.

        Args:
            frames: ``[B, 3, T, H, W]`` in [-1, 1]; T is 1 (a frame that stands alone) or a multiple
                of 4; H and W are multiples of 8.

        Returns:
            ``[B, 384, F, H/8, W/8]`` float32, unscaled latents; F is 1 or T / 4.
        """
        constants = _constants(frames.device)
        frames = frames.float()
        if frames.shape[2] == 1:
            frames = frames.expand(-1, -1, self.time_factor, -1, -1)
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
            latents: ``[B, 384, F, h, w]`` unscaled latents.
            first: The latents are the first of a clip (F = 1): one frame, the mean of its four.

        Returns:
            ``[B, 3, T, 8h, 8w]`` float32; T is 1 or 4F; not clamped.
        """
        constants = _constants(latents.device)
        latents = latents.float()
        num_luma, num_chroma = self.z_dim * 2 // 3, self.z_dim // 6
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
