"""Runs of nodes: ComfyUI's progress and cancel, the video's file, errors as ComfyUI shows them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import comfy.model_management
import folder_paths
from comfy_api.v0_0_2 import ComfyAPISync, InputImpl, io
from comfy_execution.graph import ExecutionBlocker
from PIL import Image

from swifti2v.config import GenerationConfig
from swifti2v.errors import SwiftI2VError

if TYPE_CHECKING:
    from swifti2v.media import Frames
    from swifti2v.pipelines.decoding import SegmentOutput
    from swifti2v.pipelines.progress import Progress


class NodeProgress:
    """ComfyUI's progress bar and its cancel button, served after each model call.

    Args:
        num_steps: Model calls of the run.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._num_done = 0
        self._execution = ComfyAPISync().execution

    def __call__(self, progress: "Progress") -> None:
        """Count a step; raise ComfyUI's own exception if the user has cancelled the run."""
        del progress
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._num_done += 1
        self._execution.set_progress(self._num_done, self._num_steps)

    def show(self, frame: "Frames") -> None:
        """Show a frame ``[H, W, 3]`` on the node."""
        self._execution.set_progress(
            self._num_done, self._num_steps, preview_image=Image.fromarray(frame)
        )


def make_outputs(
    segments: "Iterator[SegmentOutput]",
    config: GenerationConfig,
    progress: NodeProgress,
    wants_frames: bool,
) -> io.NodeOutput:
    """Write the segments to a file of ComfyUI's temporary folder as they are made."""
    from swifti2v.comfyui import clips

    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"swifti2v_{uuid4().hex}.mp4"
    images = clips.write(segments, config, path, progress.show, wants_images=wants_frames)
    if images is None:
        images = ExecutionBlocker("turn on return_frames to get the frames of this node")
    return io.NodeOutput(InputImpl.VideoFromFile(str(path)), images)


@contextmanager
def whole_message() -> Iterator[None]:
    """Add the notes of an error to its message: ComfyUI shows the message alone."""
    try:
        yield
    except SwiftI2VError as error:
        if notes := getattr(error, "__notes__", ()):
            raise type(error)("; ".join([str(error), *notes])) from error
        raise
