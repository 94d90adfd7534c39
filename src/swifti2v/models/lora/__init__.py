"""LoRAs: reading, merging, writing, and which model they belong to."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swifti2v.models.lora.merge import merge_lora

__all__ = ["merge_lora"]


def __getattr__(name: str) -> Any:
    """Import the function, and with it torch, only when it is asked for."""
    if name in __all__:
        from swifti2v.models.lora import merge

        return getattr(merge, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
