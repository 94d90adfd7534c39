"""A closed-form video codec with the interface of a causal video VAE, for the shipped nano model.

The first frame stands alone; every further latent frame holds four pixel frames. A latent cell is a
lapped orthonormal cosine transform of n x n pixels of luma, Cb and Cr over those four frames: before
the transform of a cell, pixels on either side of a border between cells are mixed, so that an error
in a cell fades out over its border instead of ending there. n is 8, or 4 for small videos. There is
nothing to train, and nothing is lost.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

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
    """Channels of a cell of ``space_factor`` squared pixels of luma and two planes of chroma."""
    return space_factor**2 * TIME_FACTOR * 3


def cosine_basis(size: int) -> Tensor:
    """Orthonormal DCT-II matrix ``[size, size]`` in float32; row k is frequency k."""
    return _cosines(size, 0.0).float()


def _cosines(size: int, shift: float) -> Tensor:
    """DCT-II (shift 0) or DCT-IV (shift 1/2) matrix in float64."""
    k = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (k[None, :] + 0.5) * (k[:, None] + shift))
    if shift == 0:
        basis[0] *= math.sqrt(0.5)
    return basis * math.sqrt(2 / size)


def lapping(size: int) -> Tensor:
    """Orthonormal matrix ``[size, size]`` in float32 for the pixels around a border of two cells.

    Half of them lie on either side. Equal pixels are left equal.

    Source:
        Time-domain lapped transform (Tran, Liang and Tu, IEEE Trans. Signal Process. 51, 2003), in
        its orthonormal form, which equals Malvar's lapped orthogonal transform.
    """
    half = size // 2
    flip, eye = torch.eye(half, dtype=torch.float64).flip(0), torch.eye(half, dtype=torch.float64)
    middle = torch.eye(size, dtype=torch.float64)
    middle[half:, half:] = flip @ _cosines(half, 0.0).T @ _cosines(half, 0.5) @ flip
    butterfly = torch.cat([torch.cat([eye, flip], 1), torch.cat([flip, -eye], 1)])
    return (butterfly @ middle @ butterfly / 2).float()


@cache
def side_transform(side: int, space_factor: int, device: torch.device) -> Tensor:
    """Orthonormal matrix ``[side, side]`` of a whole row or column: borders mixed, cells transformed.

    Row ``k * side / n + i`` is frequency k of cell i.

    Args:
        side: Pixels, a multiple of ``space_factor``.
        space_factor: n, pixels of a cell's side.
        device: Device of the result.
    """
    n, cells = space_factor, side // space_factor
    # Made outside inference mode, so that it can take part in a training graph as well.
    with torch.inference_mode(False), torch.no_grad():
        mixed = torch.eye(side)
        mixed[n // 2 : -n // 2, n // 2 : -n // 2] = torch.kron(torch.eye(cells - 1), lapping(n))
        basis = torch.kron(torch.eye(cells), cosine_basis(n))  # cells, then frequencies
        by_frequency = basis.reshape(cells, n, side).transpose(0, 1).reshape(side, side)
        return (by_frequency @ mixed).to(device)


class _Constants(NamedTuple):
    """Factors of the codec, in float32."""

    time: Tensor
    rgb_to_ycc: Tensor
    ycc_to_rgb: Tensor


@cache
def _constants(device: torch.device) -> _Constants:
    # Not buffers of the model: those would be rounded with it when it is cast to bfloat16.
    with torch.inference_mode(False), torch.no_grad():
        rgb_to_ycc = torch.tensor(_RGB_TO_YCC, dtype=torch.float32)
        constants = (cosine_basis(TIME_FACTOR), rgb_to_ycc, rgb_to_ycc.inverse())
        return _Constants(*(constant.to(device) for constant in constants))


class BlockCodec(ModelMixin, ConfigMixin):
    """Lapped cosine transform behind the names of ``AutoencoderKLWan``.

    Channels are ordered luma, Cb, Cr, each ``[time, row, column]`` frequency. A frame that stands
    alone is coded as four equal frames, so the first latent frame of a still clip equals the rest.
    It computes in float32 whatever its dtype.

    Args:
        latents_mean: Mean of each channel over natural video, on which latents are centred; 0 if
            not given.
        latents_std: Divisor of each channel after centring, positive; 1 if not given.
        z_dim: Channels, ``count_channels(scale_factor_spatial)``; in the configuration for readers
            of ``AutoencoderKLWan`` files.
        scale_factor_temporal: 4; in the configuration for the same readers.
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
                "a BlockCodec has (z_dim, scale_factor_temporal, scale_factor_spatial) (192, 4, 4) or "
                f"(768, 4, 8), not {(z_dim, scale_factor_temporal, scale_factor_spatial)}: the "
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
        constants = _constants(frames.device)
        rows, columns = self._transforms(frames)
        frames = frames.float()
        if frames.shape[2] == 1:
            frames = frames.expand(-1, -1, TIME_FACTOR, -1, -1)
        planes = torch.einsum("kc,bcthw->bkthw", constants.rgb_to_ycc, frames)
        planes = rows @ planes @ columns.T  # [B, 3, T, n h, n w], frequencies before cells
        n, (batch, _, num_frames, height, width) = self.space_factor, planes.shape
        cells = constants.time @ planes.reshape(batch, 3, -1, TIME_FACTOR, height * width)
        cells = cells.reshape(batch, 3, -1, TIME_FACTOR, n, height // n, n, width // n)
        channels = cells.permute(0, 1, 3, 4, 6, 2, 5, 7)
        return channels.reshape(batch, -1, num_frames // TIME_FACTOR, height // n, width // n)

    def decode_frames(self, latents: Tensor, *, first: bool) -> Tensor:
        """Inverse of ``encode_frames``.

        Args:
            latents: ``[B, C, F, h, w]`` unscaled latents.
            first: The latents are the first of a clip (F = 1): one frame, the mean of its four.

        Returns:
            ``[B, 3, T, n h, n w]`` float32; T is 1 or 4F; not clamped.
        """
        constants = _constants(latents.device)
        n, (batch, _, num_frames, height, width) = self.space_factor, latents.shape
        cells = latents.float().reshape(batch, 3, TIME_FACTOR, n, n, num_frames, height, width)
        cells = cells.permute(0, 1, 5, 2, 3, 6, 4, 7).reshape(batch, 3, num_frames, TIME_FACTOR, -1)
        planes = (constants.time.T @ cells).reshape(batch, 3, -1, n * height, n * width)
        rows, columns = self._transforms(planes)
        planes = rows.T @ planes @ columns
        if first:
            planes = planes.mean(dim=2, keepdim=True)
        return torch.einsum("ck,bkthw->bcthw", constants.ycc_to_rgb, planes)

    def _transforms(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices of columns of pixels and of rows."""
        height, width = planes.shape[-2:]
        return (
            side_transform(height, self.space_factor, planes.device),
            side_transform(width, self.space_factor, planes.device),
        )
