"""LoRAs: reading, merging, writing, and which model they belong to."""

from swifti2v.models.lora.merge import merge_lora

__all__ = ["merge_lora"]
