"""A clip on its way through a video VAE, a latent frame at a time."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swifti2v.errors import ConfigError, LoadingError, ShapeError
from swifti2v.models.vae.causal_conv import History, VaeLevers
from swifti2v.models.vae.frame_codec import (
    FrameCodec,
    LayerGroup,
    Network,
    VideoVAE,
    fetch_history,
    frame_codec,
    pinned_history_bytes,
    store_history,
)
from swifti2v.models.vae.tiles import plan_tiles
from swifti2v.shapes import ScaleFactors

MIN_TILE = 4
"""Latent cells: smaller tiles are halo for the most part."""


def copy_of(tensor: Tensor) -> Tensor:
    """A copy in a layout that safetensors takes."""
    return tensor.clone(memory_format=torch.contiguous_format)


class _Stage:
    """A part of a network with its tiles, each with a history of its own."""

    def __init__(
        self, part: LayerGroup, size: tuple[int, int], tile: int | None, num_slots: int
    ) -> None:
        self._part = part
        tile_size = tile if part.is_tiled else None
        self._tiles = plan_tiles(size, tile_size, part.layers, part.samples)
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
            is_first: Whether each is the first of its clip.
            outputs: Where the results go; None makes room for them.
            device: Where a history is brought while frames go through its tile, afterwards it
                waits in host memory; None leaves it where it is.
        """
        results = list(outputs or ())
        for tile, history in zip(self._tiles, self.histories, strict=True):
            if device is not None:
                fetch_history(history, device)
            for index, (frame, first) in enumerate(zip(frames, is_first, strict=True)):
                result = self._part.run(frame, tile, history, first=first)
                if len(results) == index:
                    results.append(self._make_room(result))
                if results[index] is not result:
                    results[index][..., tile.rows[-1], tile.columns[-1]] = result
            if device is not None:
                store_history(history)
        return results

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


class Stream:
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
        config = vae.config
        self._scale = ScaleFactors(
            config["scale_factor_temporal"], config["scale_factor_spatial"], 1
        )
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
        """Tensors that the causal convolutions remember, on the device that holds them."""
        return [t for history in _histories(self._stages) for t in history if t is not None]

    def pinned_bytes(self) -> int:
        """Host memory that the history takes while it waits there, if it comes from a GPU."""
        return sum(pinned_history_bytes(history) for history in _histories(self._stages))

    def state_dict(self) -> dict[str, Tensor]:
        """Copy of all that the rest of the clip depends on, as flat as safetensors wants it.

        Encoder and decoder use different keys, so both fit into one file.
        """
        progress = [self._z_dim, self._tile or 0, self._position, *self._size]
        state = {f"{self._kind}.progress": torch.tensor(progress)}
        for index, history in enumerate(_histories(self._stages)):
            for slot, entry in enumerate(history):
                if entry is not None:
                    state[f"{self._kind}.history.{index}.{slot}"] = copy_of(entry)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where ``state_dict`` was taken; ``state`` is copied.

        Keys of other prefixes are ignored.

        Raises:
            LoadingError: ``state`` belongs to another class, VAE or tile size; the
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
