"""One latent frame of any supported video VAE at a time: the layers under the streaming classes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    patchify,
    unpatchify,
)
from torch import Tensor

from swifti2v.errors import LoadingError
from swifti2v.models.runtime.pinning import allocate_pinned, plan_pieces
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.causal_conv import CausalConv, History, Slots, VaeLevers
from swifti2v.models.vae.tiles import Tile, crop_output
from swifti2v.models.vae.wan_layers import (
    AttentionLayer,
    Downsample,
    FrameLayer,
    MiddleBlock,
    ResidualBlock,
    ResidualDownBlock,
    UpBlock,
)

VideoVAE = AutoencoderKLWan | BlockCodec
WHOLE_SAMPLES = 2
"""Layers of at most twice the latent grid see whole frames, as their attention must; there they
take little memory. Those of larger frames can work in tiles."""


class LayerGroup(NamedTuple):
    """Layers one after the other, over whole frames or over tiles of them."""

    layers: tuple[FrameLayer, ...]
    is_tiled: bool
    samples: int
    """Outputs along a latent cell."""

    def run(self, x: Tensor, tile: Tile, history: History, *, first: bool) -> Tensor:
        """Take a latent frame through the layers.

        Args:
            x: ``[B, C, T, H, W]``, the whole frame.
            tile: The part of it to compute, planned for these layers.
            history: History of this tile; updated.
            first: The frame is the first of its clip.

        Returns:
            Output of the tile; nothing else of the frame is computed.
        """
        x = x[..., tile.rows[0], tile.columns[0]]
        for index, layer in enumerate(self.layers):
            x = crop_output(layer(x, history, first=first), layer, tile, index)
        return x


class Network(NamedTuple):
    """Encoder or decoder: takes and gives one latent frame at a time, unscaled and not clamped."""

    parts: tuple[LayerGroup, ...]
    num_slots: int
    """Length of a history."""
    dtype: torch.dtype
    """Number type in which it computes."""


class FrameCodec(NamedTuple):
    """Both networks of a VAE."""

    encoder: Network
    """``[B, 3, T, H, W]`` to ``[B, C, 1, h, w]``; T = 1 starts a clip."""
    decoder: Network
    """``[B, C, 1, h, w]`` to ``[B, 3, T, H, W]``; T = 1 starts a clip."""


class _Patchify:
    grows = 1

    def __init__(self, patch: int) -> None:
        self.shrinks = patch

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        return start * self.shrinks, stop * self.shrinks

    def __call__(self, x: Tensor, history: History, *, first: bool) -> Tensor:
        del history, first
        frames: Tensor = patchify(x, self.shrinks)  # type: ignore[no-untyped-call]
        return frames


class _Unpatchify:
    shrinks = 1

    def __init__(self, patch: int) -> None:
        self.grows = patch

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        return start // self.grows, -(-stop // self.grows)

    def __call__(self, x: Tensor, history: History, *, first: bool) -> Tensor:
        del history, first
        frames: Tensor = unpatchify(x, self.grows)  # type: ignore[no-untyped-call]
        return frames


class _Pointwise:
    """``quant_conv`` or ``post_quant_conv``; of the result the first channels are kept."""

    grows = shrinks = 1

    def __init__(self, conv: Any, channels: int) -> None:
        self._conv, self._channels = conv, channels

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def __call__(self, x: Tensor, history: History, *, first: bool) -> Tensor:
        del history, first
        output: Tensor = self._conv(x)
        return output[:, : self._channels]


class _BlockEncode:
    grows = 1

    def __init__(self, codec: BlockCodec) -> None:
        self._codec, self.shrinks = codec, codec.space_factor

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        return start * self.shrinks, stop * self.shrinks

    def __call__(self, x: Tensor, history: History, *, first: bool) -> Tensor:
        del history, first
        return self._codec.encode_frames(x)


class _BlockDecode:
    shrinks = 1

    def __init__(self, codec: BlockCodec) -> None:
        self._codec, self.grows = codec, codec.space_factor

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        return start // self.grows, -(-stop // self.grows)

    def __call__(self, x: Tensor, history: History, *, first: bool) -> Tensor:
        del history
        return self._codec.decode_frames(x, first=first)


def _block_codec(codec: BlockCodec) -> FrameCodec:
    """Codec without history or tiles: a cell reaches into its neighbours; no tensor is large."""
    encode = LayerGroup((_BlockEncode(codec),), is_tiled=False, samples=1)
    decode = LayerGroup((_BlockDecode(codec),), is_tiled=False, samples=codec.space_factor)
    return FrameCodec(*(Network((part,), 0, codec.dtype) for part in (encode, decode)))


def _require_scale(vae: AutoencoderKLWan) -> None:
    config = vae.config
    computed = (
        2 ** sum(config["temperal_downsample"]),
        2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1),
    )
    declared = (config["scale_factor_temporal"], config["scale_factor_spatial"])
    if computed != declared:
        raise LoadingError(
            f"the VAE declares scale factors {declared} for time and space, but its layers make "
            f"{computed}: correct scale_factor_temporal and scale_factor_spatial in its config.json"
        )


def _wan_encoder(vae: Any, levers: VaeLevers, whole: int) -> Network:
    slots, encoder = Slots(), vae.encoder
    makers: dict[type, Callable[[Any, Slots, VaeLevers], FrameLayer]] = {
        WanResidualBlock: ResidualBlock,
        WanResample: Downsample,
        WanResidualDownBlock: ResidualDownBlock,
    }
    layers: list[FrameLayer] = [_Patchify(vae.config["patch_size"] or 1)]
    layers.append(CausalConv(encoder.conv_in, slots, levers))
    for block in encoder.down_blocks:
        if isinstance(block, WanAttentionBlock):
            layers.append(AttentionLayer(block))
        else:
            layers.append(makers[type(block)](block, slots, levers))
    layers.append(MiddleBlock(encoder.mid_block, slots, levers))
    layers.append(CausalConv(encoder.conv_out, slots, levers, encoder.norm_out))
    layers.append(_Pointwise(vae.quant_conv, vae.config["z_dim"]))
    place = len(layers)
    samples = 1
    while place and samples * layers[place - 1].shrinks <= whole:
        place -= 1
        samples *= layers[place].shrinks
    tiled = LayerGroup(tuple(layers[:place]), is_tiled=True, samples=samples)
    rest = LayerGroup(tuple(layers[place:]), is_tiled=False, samples=1)
    return Network((tiled, rest), slots.count, encoder.conv_in.weight.dtype)


def _wan_decoder(vae: Any, levers: VaeLevers, whole: int) -> Network:
    slots, decoder = Slots(), vae.decoder
    layers: list[FrameLayer] = [_Pointwise(vae.post_quant_conv, vae.config["z_dim"])]
    layers.append(CausalConv(decoder.conv_in, slots, levers))
    layers.append(MiddleBlock(decoder.mid_block, slots, levers))
    layers += [UpBlock(block, slots, levers) for block in decoder.up_blocks]
    layers.append(CausalConv(decoder.conv_out, slots, levers, decoder.norm_out))
    layers.append(_Unpatchify(vae.config["patch_size"] or 1))
    place, samples = 0, 1
    while place < len(layers) and samples * layers[place].grows <= whole:
        samples *= layers[place].grows
        place += 1
    start = LayerGroup(tuple(layers[:place]), is_tiled=False, samples=samples)
    scale = vae.config["scale_factor_spatial"]
    tiled = LayerGroup(tuple(layers[place:]), is_tiled=True, samples=scale)
    return Network((start, tiled), slots.count, decoder.conv_in.weight.dtype)


def frame_codec(
    vae: VideoVAE, levers: VaeLevers | None = None, whole: int = WHOLE_SAMPLES
) -> FrameCodec:
    """The layers of ``vae`` as the streaming classes run them.

    Args:
        vae: Its weights are used where they are; it is not changed.
        levers: Optimizations of the layers; all of them by default.
        whole: Samples along a latent cell up to which layers see the whole frame.

    Raises:
        LoadingError: ``vae`` is of another class, or its configuration contradicts its layers.
    """
    if isinstance(vae, BlockCodec):
        return _block_codec(vae)
    if not isinstance(vae, AutoencoderKLWan):
        raise LoadingError(
            f"a VAE of class {type(vae).__name__} cannot be streamed: use AutoencoderKLWan or "
            "BlockCodec"
        )
    _require_scale(vae)
    levers = levers or VaeLevers()
    return FrameCodec(_wan_encoder(vae, levers, whole), _wan_decoder(vae, levers, whole))


def set_dtypes(vae: VideoVAE, encode: torch.dtype, decode: torch.dtype) -> None:
    """Cast encoder and decoder, each with its number type, in place.

    Raises:
        LoadingError: ``vae`` is a ``BlockCodec``, which computes in float32 whatever its dtype.
    """
    if isinstance(vae, BlockCodec):
        raise LoadingError(
            "encode_dtype or decode_dtype is given for a BlockCodec, which always computes in "
            "float32: leave them out"
        )
    for modules, dtype in (
        ((vae.encoder, vae.quant_conv), encode),
        ((vae.decoder, vae.post_quant_conv), decode),
    ):
        for module in modules:
            module.to(dtype)


def store_history(history: History) -> None:
    """Move a history to host memory, in place; pinned, if it comes from a GPU.

    Its entries share pieces of pinned memory, see ``swifti2v.models.runtime.pinning``.
    """
    entries = {slot: entry for slot, entry in enumerate(history) if entry is not None}
    if not any(entry.is_cuda for entry in entries.values()):
        history[:] = [None if e is None else e.to("cpu", copy=True) for e in history]
        return
    slots, sizes = plan_pieces([entry.nbytes for entry in entries.values()])
    pieces = [allocate_pinned(size) for size in sizes]
    for (slot, entry), place in zip(entries.items(), slots, strict=True):
        room = pieces[place.piece][place.offset : place.offset + entry.nbytes].view(entry.dtype)
        layout = torch.empty_like(entry, device="meta")
        history[slot] = room.as_strided(layout.shape, layout.stride()).copy_(entry)


def pinned_history_bytes(history: History) -> int:
    """Host memory that ``store_history`` takes for a history from a GPU."""
    return sum(plan_pieces([entry.nbytes for entry in history if entry is not None])[1])


def fetch_history(history: History, device: torch.device) -> None:
    """Bring back what ``store_history`` moved, in place."""
    for slot, entry in enumerate(history):
        if entry is not None:
            history[slot] = entry.to(device, non_blocking=True)
