"""Video VAEs a piece at a time: causal encode and decode whose memory does not grow with the clip."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from swifti2v.errors import ShapeError
from swifti2v.models.vae.frame_codec import FrameCodec, Network, VideoVAE
from swifti2v.models.vae.state import Stream, copy_of
from swifti2v.shapes import ScaleFactors


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


class StreamingEncoder(Stream):
    """Encode a clip that arrives in pieces; the latents do not depend on how it was cut.

    The latents are those of the whole clip in one ``vae.encode`` up to rounding: 1e-5 of their
    norm in float32; in bfloat16 they are as near to the exact ones as diffusers' own. Nothing but
    the causal history and at most three frames is kept between pieces. The VAE's own caches are
    neither read nor changed. It computes in the dtype of the VAE's encoder.

    Args:
        vae: ``AutoencoderKLWan`` (Wan2.1 or Wan2.2) or ``BlockCodec``.
        tile: Longest side in latent cells of tiles that the layers of large frames go through one
            after the other, to save memory; None for whole frames. Each tile reads all inputs of
            its values, so the latents change by rounding only.
        offloads_history: Keep the causal history in host memory, pinned, while no frame goes
            through its layers; nothing but device memory and time depends on it. All frames of a
            piece then go through one tile before the next, otherwise all tiles of a frame.
        levers: Optimizations of the layers of ``AutoencoderKLWan``; all of them by default.

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
        width = max(num_latent_frames, 1) if self._offloads_history else 1
        for group in torch.split(latents, width, dim=2):
            before, chunks = self._position, []
            for _ in range(group.shape[2]):
                stop = start + self._num_frames_at(self._position) - num_held
                chunks.append(self._join(video[:, :, start:stop]))
                self._position += 1
                self._pending, num_held, start = None, 0, stop
            is_first = [place == 0 for place in range(before, self._position)]
            if chunks:
                self._run(chunks, is_first, torch.split(group, 1, dim=2))
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
            state["encoder.pending"] = copy_of(self._pending)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where ``state_dict`` was taken; ``state`` is copied.

        Keys of other prefixes are ignored.

        Raises:
            LoadingError: ``state`` belongs to a decoder, or to another VAE or tile size; the
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


class StreamingDecoder(Stream):
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
        scaled = denormalize_latents(self._vae, latents.to(self._vae.device))
        self._run(
            torch.split(scaled.to(self._network.dtype), 1, dim=2) if num_latent_frames else (),
            [place == 0 for place in range(self._position, last)],
            torch.split(video, lengths, dim=2),
        )
        self._position = last
        return video.clamp_(-1, 1)

    def _choose(self, codec: FrameCodec) -> Network:
        return codec.decoder
