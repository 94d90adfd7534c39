"""Video VAEs, and their streaming."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder

__all__ = ["StreamingDecoder", "StreamingEncoder"]


def __getattr__(name: str) -> Any:
    """Import the streaming classes, and with them torch, only when they are asked for."""
    if name in __all__:
        from swifti2v.models.vae import streaming

        return getattr(streaming, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
