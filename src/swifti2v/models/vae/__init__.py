"""Video VAEs, and their streaming."""

from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder

__all__ = ["StreamingDecoder", "StreamingEncoder"]
