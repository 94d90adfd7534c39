"""Light decoders for a first look at a clip: TAEHV's small networks and pruned Wan VAEs.

They decode the latents of the VAE from which they were distilled and lose detail, so they are never
the default.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn import functional as F

from swifti2v.errors import LoadingError, ShapeError
from swifti2v.models.vae.frame_codec import VideoVAE, frame_codec
from swifti2v.models.vae.streaming import StreamingDecoder
from swifti2v.models.weights.files import load_weights, read_state_dict
from swifti2v.models.weights.names import shorten, wan_vae_state_dict

TRAINING_AIDS = "dynamic_feature_projection_heads."
"""Keys of a LightVAE file that its decoder does not use."""
LEVELS = 3
"""Times that a TAEHV decoder doubles height and width."""


class SoftClamp(nn.Module):
    """Keep latents within [-3, 3], smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the same layer's frame before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """``[B, C, h, w]`` each."""
        update: Tensor = self.conv(torch.cat([x, past], dim=1))
        return F.relu(update + x)


class WideMemoryBlock(nn.Module):
    """Memory block of the "super" decoders: a wide depthwise convolution and a widened layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width, bias=False),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.ReLU(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """``[B, C, h, w]`` each."""
        update: Tensor = self.conv(torch.cat([x, past], dim=1))
        return update + x


class GrowTime(nn.Module):
    """One frame to ``stride`` frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[B, C, h, w]`` to as many of the same shape."""
        return torch.chunk(self.conv(x), self.stride, dim=1)


class TinyDecoder(nn.Module):
    """Decoder of TAEHV for the latents of Wan, in either of its two layouts.

    Args:
        shapes: Shapes of its weights under the names of the published files; they tell the layout.

    Raises:
        LoadingError: They are of neither layout.

    Source:
        github.com/madebyollin/taehv, ``taehv.py`` (files ``taew2_1``, ``taew2_2``,
        ``taew2_2_super``; LightX2V's ``lighttaew2_1`` and ``lighttaew2_2`` have the first layout).
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        try:
            blocks = (
                _wide_layout(shapes) if "decoder.1.conv.0.weight" in shapes else _layout(shapes)
            )
            self.decoder = nn.Sequential(*blocks)
            last: Any = blocks[-1]
            self.patch = math.isqrt(last.out_channels // 3)
        except (KeyError, IndexError) as error:
            raise LoadingError(f"not a TAEHV decoder: {error} is missing or of odd shape") from None
        grows = [block for block in blocks if isinstance(block, GrowTime)]
        self.scale_factor_temporal = math.prod(block.stride for block in grows)
        self.scale_factor_spatial = 2**LEVELS * self.patch
        first: Any = next(block for block in blocks if isinstance(block, nn.Conv2d))
        self.z_dim: int = first.in_channels


def _layout(shapes: Mapping[str, torch.Size]) -> list[nn.Module]:
    width, z_dim = shapes["decoder.1.weight"][:2]
    blocks: list[nn.Module] = [SoftClamp(), nn.Conv2d(z_dim, width, 3, padding=1), nn.ReLU()]
    for _ in range(LEVELS):
        grow = len(blocks) + 4
        stride = shapes[f"decoder.{grow}.conv.weight"][0] // width
        following = shapes[f"decoder.{grow + 1}.weight"][0]
        blocks += [MemoryBlock(width) for _ in range(3)]
        blocks += [nn.Upsample(scale_factor=2), GrowTime(width, stride)]
        blocks += [nn.Conv2d(width, following, 3, padding=1, bias=False)]
        width = following
    out = shapes[f"decoder.{len(blocks) + 1}.weight"][0]
    return [*blocks, nn.ReLU(), nn.Conv2d(width, out, 3, padding=1)]


def _wide_layout(shapes: Mapping[str, torch.Size]) -> list[nn.Module]:
    width, z_dim = shapes["decoder.0.weight"][:2]
    blocks: list[nn.Module] = [nn.Conv2d(z_dim, width, 1, bias=False)]
    for _ in range(LEVELS):
        step = len(blocks) + 3
        following = shapes[f"decoder.{step}.weight"][0] // 4
        stride = shapes[f"decoder.{step + 3}.conv.weight"][0] // following
        blocks += [WideMemoryBlock(width) for _ in range(3)]
        blocks += [nn.Conv2d(width, 4 * following, 3, padding=1), nn.ReLU(), nn.PixelShuffle(2)]
        blocks += [GrowTime(following, stride)]
        width = following
    out = shapes[f"decoder.{len(blocks)}.weight"][0]
    return [*blocks, nn.Conv2d(width, out, 3, padding=1)]


class TinyStream:
    """A clip on its way through a ``TinyDecoder``, a frame at a time."""

    def __init__(self, network: TinyDecoder) -> None:
        self._network = network
        self._memory: dict[int, Tensor] = {}
        self._is_first = True

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See ``StreamingDecoder.decode``; the video is the same for any cut of the latents."""
        if latents.ndim != 5 or latents.shape[1] != self._network.z_dim:
            raise ShapeError(
                f"latents have shape {tuple(latents.shape)}; this light decoder takes "
                f"[B, {self._network.z_dim}, F, h, w]"
            )
        weight = next(self._network.parameters())
        frames: list[Tensor] = []
        for latent in latents.to(weight).unbind(dim=2):
            decoded = list(self._run(latent, 0))
            # Of a clip's first latent frame only the last frame is real.
            frames += decoded[-1:] if self._is_first else decoded
            self._is_first = False
        return torch.stack(frames, dim=2).float().clamp_(0, 1).mul_(2).sub_(1)

    def _run(self, x: Tensor, start: int) -> Iterator[Tensor]:
        blocks = self._network.decoder
        for index in range(start, len(blocks)):
            block = blocks[index]
            if isinstance(block, GrowTime):
                for frame in block(x):
                    yield from self._run(frame, index + 1)
                return
            if isinstance(block, MemoryBlock | WideMemoryBlock):
                past = self._memory.get(index, torch.zeros_like(x))
                self._memory[index], x = x, block(x, past)
            else:
                x = block(x)
        yield F.pixel_shuffle(x, self._network.patch)


class LightDecoder:
    """A light decoder in place of a VAE's own; see ``load_light_decoder``.

    Args:
        network: Network that decodes.
    """

    def __init__(self, network: TinyDecoder | AutoencoderKLWan) -> None:
        self.network = network

    def start(self) -> TinyStream | StreamingDecoder:
        """Begin a clip."""
        if isinstance(self.network, TinyDecoder):
            return TinyStream(self.network)
        return StreamingDecoder(self.network)


def load_light_decoder(
    path: Path | str, vae: VideoVAE, device: torch.device | None = None
) -> LightDecoder:
    """Load a light decoder for the latents of a Wan VAE.

    Args:
        path: A TAEHV file (``taew2_1``, ``taew2_2``, ``taew2_2_super``, ``lighttaew2_1``,
            ``lighttaew2_2``), or a Wan VAE of fewer channels (``lightvaew2_1``, LightVAE for Wan2.2)
            under original or diffusers names, of which the decoder alone is read.
        vae: The VAE that it stands in for; it says the number type, and may have no memory.
        device: Device that computes; by default that of ``vae``.

    Raises:
        LoadingError: The file is of another kind or damaged, or decodes other latents.
    """
    if not isinstance(vae, AutoencoderKLWan):
        raise LoadingError(
            f"{path}: this model's codec ({type(vae).__name__}) is computed in closed form and has "
            "no light decoder; leave it out"
        )
    state = read_state_dict(path)
    is_tiny = any(key.startswith(("decoder.0.", "decoder.1.")) for key in state)
    load: Any = _load_tiny if is_tiny else _load_pruned
    ready: Any = load(state, path, vae)
    ready.to(device=device or vae.device, dtype=frame_codec(vae).decoder.dtype)
    return LightDecoder(ready.eval().requires_grad_(False))


def _load_tiny(state: Mapping[str, Tensor], path: Path | str, vae: AutoencoderKLWan) -> TinyDecoder:
    weights = _take(state, ("decoder.",), ("encoder.",), path)
    network = TinyDecoder({key: tensor.shape for key, tensor in weights.items()})
    for name in ("z_dim", "scale_factor_spatial", "scale_factor_temporal"):
        _require_same(name, getattr(network, name), path, vae)
    load_weights(network, weights, source=str(path))
    return network


def _load_pruned(
    state: Mapping[str, Tensor], path: Path | str, vae: AutoencoderKLWan
) -> AutoencoderKLWan:
    ignored = ("encoder.", "quant_conv.", TRAINING_AIDS)
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(TRAINING_AIDS)}
    weights = _take(wan_vae_state_dict(kept), ("decoder.", "post_quant_conv."), ignored, path)
    if missing := {"decoder.conv_in.weight", "post_quant_conv.weight"} - weights.keys():
        raise LoadingError(f"{path} is not a complete decoder: it lacks {shorten(sorted(missing))}")
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    _require_same("z_dim", weights["post_quant_conv.weight"].shape[0], path, vae)
    config["decoder_base_dim"] = (
        weights["decoder.conv_in.weight"].shape[0] // config["dim_mult"][-1]
    )
    config["base_dim"] = 1  # of the encoder, which is never run
    network: AutoencoderKLWan = AutoencoderKLWan(**config)
    rest = {key: t for key, t in network.state_dict().items() if key.startswith(ignored[:2])}
    load_weights(network, rest | weights, source=str(path))
    return network


def _require_same(name: str, value: int, path: Path | str, vae: AutoencoderKLWan) -> None:
    if value != vae.config[name]:
        raise LoadingError(
            f"{path} decodes latents of another VAE: its {name} is {value}, this model's "
            f"{vae.config[name]}; Wan2.1's VAE has 16 latent channels, Wan2.2's 48"
        )


def _take(
    state: Mapping[str, Tensor], used: tuple[str, ...], ignored: tuple[str, ...], path: Path | str
) -> dict[str, Tensor]:
    """The tensors that are used, if all others are known."""
    if unknown := [key for key in state if not key.startswith((*used, *ignored))]:
        raise LoadingError(f"{path} is not a light decoder: unknown keys {shorten(unknown)}")
    return {key: tensor for key, tensor in state.items() if key.startswith(used)}
