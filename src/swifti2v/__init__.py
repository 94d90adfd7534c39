"""One photo and a prompt become a native 2K video: SwiftI2V and ViBe."""

from typing import TYPE_CHECKING, Any

from swifti2v import errors
from swifti2v.segments import Segment, plan_segments
from swifti2v.shapes import PixelShape
from swifti2v.version import __version__

if TYPE_CHECKING:
    from swifti2v.pipelines.two_stage import SwiftI2VPipeline

__all__ = [
    "PixelShape",
    "Segment",
    "SwiftI2VPipeline",
    "__version__",
    "errors",
    "plan_segments",
]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and with it torch and diffusers, only when it is asked for."""
    if name == "SwiftI2VPipeline":
        from swifti2v.pipelines.two_stage import SwiftI2VPipeline

        return SwiftI2VPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
