"""Names of placements, and the components that each part of a run needs; importing them needs no PyTorch."""

from typing import Literal

Placement = Literal["resident", "streamed", "offloaded"]
"""See ``swifti2v.models.runtime.placement.place``."""
TEXT = ("text_encoder",)
IMAGE = ("image_encoder",)
STAGE1 = ("stage1_transformer", "stage1_vae")
STAGE2 = ("stage2_transformer", "stage2_vae")
PARTS = (TEXT, IMAGE, STAGE1, STAGE2)
"""Components that are in memory together when a run is staged, part after part; see
``swifti2v.models.runtime.staging``."""
