"""Video VAEs a piece at a time: causal encode and decode whose memory does not grow with the clip."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from swifti2v.errors import ConfigError, LoadingError, ShapeError
from swifti2v.models.frame_codec import (
    FrameCodec,
    Network,
    Part,
    VideoVAE,
    fetch_history,
    frame_codec,
    store_history,
)
from swifti2v.models.tiles import plan_tiles
from swifti2v.models.wan_layers import History, VaeLevers
from swifti2v.shapes import ScaleFactors

MIN_TILE = 4
"""Latent cells: smaller tiles are halo for the most part."""


def scale_factors(vae: VideoVAE, patch: int) -> ScaleFactors:
    """Pixels that a latent cell of ``vae`` and a token of ``patch`` x ``patch`` cells stand for."""
    config = vae.config
    return ScaleFactors(config["scale_factor_temporal"], config["scale_factor_spatial"], patch)


def normalize_latents(vae: VideoVAE, latents: Tensor) -> Tensor:
    """Scale the VAE's own latents to zero mean and unit variance in each channel.

    Args:
        vae: Its configuration holds ``latents_mean`` and ``latents_std``, one value a channel.
        latents: ``[B, C, F, h, w]`` as the VAE's encoder gives them; not changed.

    Returns:
        ``[B, C, F, h, w]`` float32.

    Raises:
        ShapeError: ``latents`` has another number of channels than the statistics.
    """
    mean, std = _statistics(vae, latents)
    return (latents.float() - mean) / std


def denormalize_latents(vae: VideoVAE, latents: Tensor) -> Tensor:
    """Inverse of ``normalize_latents``, in float32 as well."""
    mean, std = _statistics(vae, latents)
    return latents.float() * std + mean


def _statistics(vae: VideoVAE, latents: Tensor) -> Iterator[Tensor]:
    values = [vae.config["latents_mean"], vae.config["latents_std"]]
    counts = [len(value) for value in values]
    if latents.ndim != 5 or counts != [latents.shape[1]] * 2:
        raise ShapeError(
            f"latents of shape {tuple(latents.shape)} do not fit a VAE with {counts[0]} means and "
            f"{counts[1]} deviations: give [B, C, F, h, w] with one of each for every channel"
        )
    return (
        torch.tensor(value, dtype=torch.float32, device=latents.device)[:, None, None, None]
        for value in values
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)  # safetensors takes no other


class _Stage:
    """A part of a network with its tiles, each with a history of its own."""

    def __init__(self, part: Part, size: tuple[int, int], tile: int | None, num_slots: int) -> None:
        self._part = part
        own = tile if part.is_tiled else None
        self._tiles = plan_tiles(size, own, part.layers, part.samples)
        self.histories: list[History] = [[None] * num_slots for _ in self._tiles]
        self._size = tuple(side * part.samples for side in size)

    def run(
        self,
        frames: Sequence[Tensor],
        is_first: Sequence[bool],
        outputs: Sequence[Tensor] | None,
        device: torch.device | None,
    ) -> list[Tensor]:
        """Take latent frames through the part, all of them through one tile after the other.

        Args:
            frames: ``[B, C, T, H, W]`` each.
            is_first: Of its clip, for each.
            outputs: Where the results go; None makes room for them.
            device: Where a history is brought while frames go through its tile, afterwards it
                waits in host memory; None leaves it where it is.
        """
        made = list(outputs or ())
        for tile, history in zip(self._tiles, self.histories, strict=True):
            if device is not None:
                fetch_history(history, device)
            for index, (frame, first) in enumerate(zip(frames, is_first, strict=True)):
                result = self._part.run(frame, tile, history, first=first)
                if len(made) == index:
                    made.append(self._make_room(result))
                if made[index] is not result:
                    made[index][..., tile.rows[-1], tile.columns[-1]] = result
            if device is not None:
                store_history(history)
        return made

    def _make_room(self, result: Tensor) -> Tensor:
        if len(self._tiles) == 1:
            return result
        layout = torch.channels_last_3d if result.stride(1) == 1 else torch.contiguous_format
        return torch.empty(
            (*result.shape[:3], *self._size),
            dtype=result.dtype,
            device=result.device,
            memory_format=layout,
        )


class _Stream:
    """A clip on its way through a VAE, a latent frame at a time: size, place, causal history."""

    _kind: str
    """Prefix of the keys of a saved state."""

    def __init__(
        self,
        vae: VideoVAE,
        *,
        tile: int | None = None,
        offloads_history: bool = False,
        levers: VaeLevers | None = None,
    ) -> None:
        if tile is not None and tile < MIN_TILE:
            raise ConfigError(
                f"tile is {tile}; it must be None or at least {MIN_TILE} latent cells"
            )
        self._vae = vae
        self._network = self._choose(frame_codec(vae, levers))
        self._scale = scale_factors(vae, patch=1)
        self._z_dim: int = vae.config["z_dim"]
        self._tile = tile
        self._offloads_history = offloads_history
        self.reset()

    def reset(self) -> None:
        """Forget the clip; the next piece starts another one, of any size."""
        self._size: tuple[int, ...] = ()  # (B, h, w) once the first piece is in
        self._position = 0  # latent frames done
        self._stages: list[_Stage] = []

    def history(self) -> list[Tensor]:
        """What the causal convolutions remember, where it is."""
        return [entry for own in _histories(self._stages) for entry in own if entry is not None]

    def state_dict(self) -> dict[str, Tensor]:
        """Copy of all that the rest of the clip depends on, as flat as safetensors wants it.

        Encoder and decoder use different keys, so both fit into one file.
        """
        progress = [self._z_dim, self._tile or 0, self._position, *self._size]
        state = {f"{self._kind}.progress": torch.tensor(progress)}
        for index, history in enumerate(_histories(self._stages)):
            for slot, entry in enumerate(history):
                if entry is not None:
                    state[f"{self._kind}.history.{index}.{slot}"] = _copy(entry)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where ``state_dict`` was taken; ``state`` is copied.

        Keys of other prefixes are ignored.

        Raises:
            LoadingError: ``state`` is none of this class, or of another VAE or tile size; the
                clip in progress is kept.
        """
        progress = state.get(f"{self._kind}.progress")
        if progress is None:
            raise LoadingError(
                f"the state has no '{self._kind}.progress': give what state_dict of a "
                f"{type(self).__name__} returned"
            )
        z_dim, tile, position, *size = (int(number) for number in progress.tolist())
        if (z_dim, tile) != (self._z_dim, self._tile or 0):
            raise LoadingError(
                f"the state is of {z_dim} latent channels and tile {tile or None}, this "
                f"{type(self).__name__} has {self._z_dim} and {self._tile}: build it as saved"
            )
        stages = self._plan(tuple(size)) if size else []
        histories = _histories(stages)
        prefix = f"{self._kind}.history."
        for key in (key for key in state if key.startswith(prefix)):
            index, slot = (int(number) for number in key.removeprefix(prefix).split("."))
            if index >= len(histories) or slot >= len(histories[index]):
                raise LoadingError(f"the state has '{key}', which this VAE has no place for")
            histories[index][slot] = self._own(state[key])
        self._size, self._position, self._stages = tuple(size), position, stages

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self._vae.device, dtype=self._network.dtype, copy=True)

    def _choose(self, codec: FrameCodec) -> Network:
        """The network of the VAE that this class runs."""
        raise NotImplementedError

    def _plan(self, size: tuple[int, ...]) -> list[_Stage]:
        network = self._network
        cells = (size[1], size[2])
        return [_Stage(part, cells, self._tile, network.num_slots) for part in network.parts]

    def _require_size(self, *size: int) -> None:
        """Plan for the first piece of a clip; hold all others to its ``(B, h, w)``."""
        if not self._size:
            self._stages = self._plan(size)
            self._size = size
        elif size != self._size:
            raise ShapeError(
                f"a piece of batch and latent size {size} follows pieces of {self._size}: all pieces "
                "of a clip have one size; call reset() before the next clip"
            )

    def _num_frames_at(self, position: int) -> int:
        """Pixel frames that the latent frame at ``position`` holds."""
        return self._scale.time if position else 1

    def _run(
        self, frames: Sequence[Tensor], is_first: Sequence[bool], outputs: Sequence[Tensor]
    ) -> None:
        """Take latent frames through the network.

        A frame is finished before the next one starts, and all tiles keep their history on the
        device. If the history waits in host memory, all frames go through one tile before the
        next one starts instead: its history is fetched once.
        """
        device = self._vae.device if self._offloads_history else None
        width = max(len(frames), 1) if self._offloads_history else 1
        for start in range(0, len(frames), width):
            group = slice(start, start + width)
            hidden: Sequence[Tensor] = frames[group]
            for stage in self._stages:
                is_last = stage is self._stages[-1]
                target = outputs[group] if is_last else None
                hidden = stage.run(hidden, is_first[group], target, device)


def _histories(stages: Sequence[_Stage]) -> list[History]:
    return [history for stage in stages for history in stage.histories]


class StreamingEncoder(_Stream):
    """Encode a clip that arrives in pieces; the latents do not depend on how it was cut.

    The latents are those of the whole clip in one ``vae.encode`` up to rounding: 1e-5 of their
    norm in float32; in bfloat16 they are as near to the exact ones as diffusers' own. Nothing but
    the causal history and at most three frames is kept between pieces. The VAE's own caches are
    neither read nor changed. It computes in the dtype of the VAE's encoder.

    Args:
        vae: ``AutoencoderKLWan`` (Wan2.1 or Wan2.2) or ``BlockCodec``.
        tile: Longest side in latent cells of tiles that the layers of large frames go through one
            after the other, to save memory; None for whole frames. Each tile takes in what its
            values depend on, so the latents change by rounding only.
        offloads_history: Keep the causal history in host memory, pinned, while no frame goes
            through its layers; nothing but device memory and time depends on it. All frames of a
            piece then go through one tile before the next, otherwise all tiles of a frame.
        levers: How the layers of ``AutoencoderKLWan`` compute; all levers by default.

    Raises:
        ConfigError: ``tile`` is below 4.
        LoadingError: ``vae`` is of another class, or its configuration contradicts its layers.
    """

    _kind = "encoder"

    def reset(self) -> None:
        """Forget the clip; the next piece starts another one, of any size."""
        super().reset()
        self._pending: Tensor | None = None  # frames that do not fill a latent frame yet

    @torch.no_grad()
    def encode(self, video: Tensor, *, final: bool = False) -> Tensor:
        """Take in a piece and give the latent frames it completes.

        Args:
            video: ``[B, 3, T, H, W]`` in [-1, 1], the next T frames, on any device; H and W are
                multiples of the VAE's spatial factor.
            final: This is the last piece; do as ``finish`` does.

        Returns:
            ``[B, C, F, h, w]`` float32 on the VAE's device, the mean of the posterior, scaled to
            unit variance. F is 0 as long as no latent frame is complete.

        Raises:
            ShapeError: Sizes that do not fit the VAE or the pieces before, or a last piece that
                leaves frames over; nothing was taken in.
        """
        self._require_video(video)
        batch, _, num_frames, height, width = video.shape
        num_held = 0 if self._pending is None else self._pending.shape[2]
        num_latent_frames, num_left = self._count(num_held + num_frames)
        if final:
            self._require_complete(num_left)
        side = self._scale.space
        self._require_size(batch, height // side, width // side)
        size = (batch, self._z_dim, num_latent_frames, height // side, width // side)
        latents = torch.empty(size, device=self._vae.device)
        start = 0
        for index in range(num_latent_frames):
            stop = start + self._num_frames_at(self._position) - num_held
            chunk = self._join(video[:, :, start:stop])
            self._run([chunk], [self._position == 0], [latents[:, :, index : index + 1]])
            self._position += 1
            self._pending, num_held, start = None, 0, stop
        if start < num_frames:
            self._pending = self._join(video[:, :, start:]).clone()
        if final:
            self.reset()
        return normalize_latents(self._vae, latents)

    def finish(self) -> None:
        """End the clip and free its history; the next piece starts another clip.

        Raises:
            ShapeError: Frames are left that do not fill a latent frame; they are kept.
        """
        self._require_complete(0 if self._pending is None else self._pending.shape[2])
        self.reset()

    def state_dict(self) -> dict[str, Tensor]:
        """Copy of all that the rest of the clip depends on, as flat as safetensors wants it.

        Encoder and decoder use different keys, so both fit into one file.
        """
        state = super().state_dict()
        if self._pending is not None:
            state["encoder.pending"] = _copy(self._pending)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where ``state_dict`` was taken; ``state`` is copied.

        Keys of other prefixes are ignored.

        Raises:
            LoadingError: ``state`` is none of an encoder, or of another VAE or tile size; the
                clip in progress is kept.
        """
        super().load_state_dict(state)
        pending = state.get("encoder.pending")
        self._pending = None if pending is None else self._own(pending)

    def _choose(self, codec: FrameCodec) -> Network:
        return codec.encoder

    def _join(self, frames: Tensor) -> Tensor:
        """The frames held back and ``frames`` behind them, as the VAE wants them."""
        frames = frames.to(device=self._vae.device, dtype=self._network.dtype)
        return frames if self._pending is None else torch.cat([self._pending, frames], dim=2)

    def _count(self, num_frames: int) -> tuple[int, int]:
        """Latent frames that ``num_frames`` further frames complete, and frames left over."""
        first = 1 if self._position == 0 and num_frames else 0
        num_latent_frames, num_left = divmod(num_frames - first, self._scale.time)
        return num_latent_frames + first, num_left

    def _require_video(self, video: Tensor) -> None:
        side = self._scale.space
        if video.ndim != 5 or video.shape[1] != 3:
            raise ShapeError(f"video has shape {tuple(video.shape)}; give [B, 3, T, H, W]")
        height, width = video.shape[3:]
        if height % side or width % side or not height or not width:
            raise ShapeError(
                f"frames of {height} x {width} pixels do not fit this VAE: crop or resize both "
                f"sides to multiples of {side}"
            )

    def _require_complete(self, num_left: int) -> None:
        time = self._scale.time
        if num_left:
            raise ShapeError(
                f"{num_left} frames are left that do not fill a latent frame: a clip has {time}k + 1 "
                f"frames; add {time - num_left} or leave out the last {num_left}"
            )


class StreamingDecoder(_Stream):
    """Decode latents that arrive in pieces; the video does not depend on how they were cut.

    The video is that of all latents in one ``vae.decode`` up to rounding, see
    ``StreamingEncoder``. The VAE's own caches are neither read nor changed. It computes in the
    dtype of the VAE's decoder.

    Args:
        vae: ``AutoencoderKLWan`` (Wan2.1 or Wan2.2) or ``BlockCodec``.
        tile: As for ``StreamingEncoder``.
        offloads_history: As for ``StreamingEncoder``; the history of a tile is fetched once for
            each piece.
        levers: As for ``StreamingEncoder``.

    Raises:
        ConfigError: ``tile`` is below 4.
        LoadingError: ``vae`` is of another class, or its configuration contradicts its layers.
    """

    _kind = "decoder"

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Give the frames of the next latent frames.

        Args:
            latents: ``[B, C, F, h, w]``, scaled to unit variance, on any device; not changed.

        Returns:
            ``[B, 3, T, H, W]`` float32 on the VAE's device, clamped to [-1, 1]. The first latent
            frame of a clip gives one frame, each other one the VAE's temporal factor (4).

        Raises:
            ShapeError: Sizes that do not fit the VAE or the pieces before; nothing was taken in.
        """
        if latents.ndim != 5 or latents.shape[1] != self._z_dim or 0 in latents.shape[3:]:
            raise ShapeError(
                f"latents have shape {tuple(latents.shape)}; give [B, {self._z_dim}, F, h, w] of this "
                "VAE"
            )
        batch, _, num_latent_frames, height, width = latents.shape
        self._require_size(batch, height, width)
        last = self._position + num_latent_frames
        num_frames = sum(self._num_frames_at(place) for place in range(self._position, last))
        side = self._scale.space
        size = (batch, 3, num_frames, height * side, width * side)
        video = torch.empty(size, device=self._vae.device)
        lengths = [self._num_frames_at(place) for place in range(self._position, last)]
        own = denormalize_latents(self._vae, latents.to(self._vae.device))
        self._run(
            torch.split(own.to(self._network.dtype), 1, dim=2) if num_latent_frames else (),
            [place == 0 for place in range(self._position, last)],
            torch.split(video, lengths, dim=2),
        )
        self._position = last
        return video.clamp_(-1, 1)

    def _choose(self, codec: FrameCodec) -> Network:
        return codec.decoder
