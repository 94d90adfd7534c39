"""Pixel and latent shapes, and every rule that ties them together."""

from typing import NamedTuple

from swifti2v.errors import ShapeError


class ScaleFactors(NamedTuple):
    """How many pixels one latent cell, and one transformer token, stand for."""

    time: int
    """Pixel frames a latent frame holds (the first latent frame holds one)."""
    space: int
    """Pixels along a side of a latent cell."""
    patch: int
    """Latent cells along a side of a transformer token."""

    @property
    def side(self) -> int:
        """Pixels along a side of a token: height and width must be multiples of it."""
        return self.space * self.patch


class PixelShape(NamedTuple):
    """Size of a clip in pixels."""

    num_frames: int
    height: int
    width: int

    def require_fit(self, scale: ScaleFactors) -> None:
        """Refuse a shape that the model cannot hold exactly.

        Raises:
            ShapeError: The frame count is not ``time * k + 1``, or a side is not a multiple
                of ``scale.side``; the message names the nearest values that fit.
        """
        if self.num_frames < 1 or (self.num_frames - 1) % scale.time:
            lower = max(0, (self.num_frames - 1) // scale.time) * scale.time + 1
            raise ShapeError(
                f"num_frames {self.num_frames} does not fit: it must be {scale.time}k + 1; "
                f"the nearest are {lower} and {lower + scale.time}"
            )
        for name, side in (("height", self.height), ("width", self.width)):
            if side < 1 or side % scale.side:
                lower = max(1, side // scale.side) * scale.side
                raise ShapeError(
                    f"{name} {side} does not fit: it must be a multiple of {scale.side}; "
                    f"the nearest are {lower} and {lower + scale.side}"
                )


class LatentShape(NamedTuple):
    """Size of a clip in latent cells."""

    channels: int
    num_frames: int
    height: int
    width: int

    @classmethod
    def from_pixel_shape(
        cls, pixels: PixelShape, scale: ScaleFactors, channels: int
    ) -> "LatentShape":
        """Latent size of a clip.

        Raises:
            ShapeError: ``pixels`` does not fit ``scale`` (see ``PixelShape.require_fit``).
        """
        pixels.require_fit(scale)
        return cls(
            channels,
            (pixels.num_frames - 1) // scale.time + 1,
            pixels.height // scale.space,
            pixels.width // scale.space,
        )

    def to_pixel_shape(self, scale: ScaleFactors) -> PixelShape:
        """Size of the decoded clip."""
        return PixelShape(
            (self.num_frames - 1) * scale.time + 1,
            self.height * scale.space,
            self.width * scale.space,
        )
