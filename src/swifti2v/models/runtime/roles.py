"""Names of placements and of components that a run frees; importing them needs no PyTorch."""

from typing import Literal

Placement = Literal["resident", "streamed", "offloaded"]
"""See ``swifti2v.models.runtime.placement.place``."""
RELEASED = ("text_encoder", "image_encoder", "stage1_transformer", "stage1_vae")
"""Roles that a run needs no more once the motion reference is there."""
