"""From Stage I to Stage II: the hybrid reference, built and encoded a piece at a time."""

from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from swifti2v.errors import ShapeError
from swifti2v.media import Frames, frames_to_video, resize_video
from swifti2v.models.codec import BlockCodec
from swifti2v.models.vae import StreamingEncoder

Upsampling = Literal["lanczos", "bicubic", "bilinear"]


class HybridReference:
    """Upsampled motion reference whose first frame is the photo, encoded only as far as asked.

    Neither the upsampled clip nor its latents are ever held whole: latents before the oldest
    frame that a later segment can still need are dropped with ``forget_before``.

    Args:
        motion_reference: ``[T, h, w, 3]`` uint8, Stage I's output or the user's own clip.
        photo: ``[1, 3, 1, H, W]`` in [-1, 1], at the output size.
        vae: Stage II's VAE.
        upsampling: Resize kernel.
        tile: Longest side of a spatial VAE tile in latent cells, or none.
        offloads_history: See ``StreamingEncoder``.
        starts_with_photo: Without, its first frame is the motion reference's own, enlarged.

    Raises:
        ShapeError: T is not ``time * k + 1`` or the clip's aspect is not the photo's.

    Source:
        SwiftI2V, arXiv:2605.06356, section 3.1 (pixel-space transition).
    """

    def __init__(
        self,
        motion_reference: Frames,
        photo: Tensor,
        vae: AutoencoderKLWan | BlockCodec,
        upsampling: Upsampling = "lanczos",
        tile: int | None = None,
        offloads_history: bool = False,
        *,
        starts_with_photo: bool = True,
    ) -> None:
        _, low_height, low_width, _ = motion_reference.shape
        height, width = photo.shape[-2:]
        if low_height * width != low_width * height:
            raise ShapeError(
                f"the motion reference is {low_width}x{low_height}, the output {width}x{height}: "
                "the aspects differ; crop the clip or choose an output size of its aspect"
            )
        self.motion_reference = motion_reference
        self.photo = photo
        self.upsampling = upsampling
        self.starts_with_photo = starts_with_photo
        self._vae, self._tile = vae, tile
        self._encoder = StreamingEncoder(vae, tile=tile, offloads_history=offloads_history)
        self._offloads_history = offloads_history
        self._time = int(vae.config["scale_factor_temporal"])
        self._latents: dict[int, Tensor] = {}
        self._encoded = 0

    @property
    def num_latent_frames(self) -> int:
        """F of the whole clip."""
        return (len(self.motion_reference) - 1) // self._time + 1

    def latents(self, frames: tuple[int, ...]) -> Tensor:
        """Reference latents ``[1, C, len(frames), h, w]`` of the frames asked for.

        Raises:
            ShapeError: A frame is past the end or was forgotten.
        """
        if self._encoded <= max(frames):
            self._encode_through(max(frames))
        missing = [frame for frame in frames if frame not in self._latents]
        if missing:
            raise ShapeError(f"reference latents of frames {missing} are no longer held")
        return torch.cat([self._latents[frame] for frame in frames], dim=2)

    def anchor(self) -> Tensor:
        """Latents ``[1, C, 1, h, w]`` of the photo alone."""
        if self.starts_with_photo:
            return self.latents((0,))  # z_x equals frame 0 of z_ref
        return StreamingEncoder(self._vae, tile=self._tile).encode(self.photo)

    def forget_before(self, frame: int) -> None:
        """Drop latents of frames below ``frame``, but never the anchor's."""
        for index in [i for i in self._latents if 0 < i < frame]:
            del self._latents[index]

    def pixels(self, latent_frame: int) -> Tensor:
        """Frames ``[1, 3, t, H, W]`` of the hybrid reference that one latent frame holds."""
        if latent_frame == 0 and self.starts_with_photo:
            return self.photo
        start = max(0, (latent_frame - 1) * self._time + 1)
        stop = latent_frame * self._time + 1
        piece = self.motion_reference[start:stop]
        if len(piece) < stop - start:
            raise ShapeError(
                f"latent frame {latent_frame} is past the end of a motion reference of "
                f"{len(self.motion_reference)} frames"
            )
        height, width = self.photo.shape[-2:]
        video = frames_to_video(piece).to(self.photo.device)
        return resize_video(video, height, width, self.upsampling)

    def _encode_through(self, last: int) -> None:
        """Encode up to ``last``: all at once if the history waits elsewhere, to fetch it once."""
        places = range(self._encoded, last + 1)
        width = len(places) if self._offloads_history else 1
        for start in places[::width]:
            group = places[start - places[0] : start - places[0] + width]
            pieces = [self.pixels(place) for place in group]
            video = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
            del pieces
            latents = torch.split(self._encoder.encode(video), 1, dim=2)
            self._latents |= dict(zip(group, latents, strict=True))
        self._encoded = last + 1

    def __repr__(self) -> str:
        shape: Any = self.motion_reference.shape
        return f"HybridReference({shape}, {self._encoded}/{self.num_latent_frames} encoded)"
