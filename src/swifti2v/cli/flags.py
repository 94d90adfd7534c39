"""Settings by the flags that change them, for errors that reach the command line."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from swifti2v.config import SHORTHANDS
from swifti2v.errors import SwiftI2VError
from swifti2v.jobs.layers import Layer

NAMED = {
    "num_frames": "--num-frames",
    "height": "--height",
    "width": "--width",
    "fps": "--fps",
    "negative_prompt": "--negative-prompt",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "segment_size": "--segment-size",
    "context_size": "--context-size",
    "strength": "--strength",
    "crf": "--crf",
    "codec": "--codec",
    "ten_bit": "--ten-bit",
    "max_crop_share": "--max-crop",
}
"""Settings that have a flag of their own; the others go by their path, as ``--set`` takes it."""
FLAGS = NAMED | {
    path: flag for name, flag in NAMED.items() for path in SHORTHANDS.get(name, ()) if name != path
}
PATTERN = re.compile(
    rf"(?<![\w.=-])({'|'.join(re.escape(name) for name in sorted(FLAGS, key=len, reverse=True))})"
    r"(?= is | does not |: | '?[\d-])"
)
"""A setting that a sentence is about: its value or a verb follows."""
COMMAND_LINE = "command line"
"""Source of settings that come from flags, see ``ClipOptions.layers``."""


@contextmanager
def naming_flags(layers: Iterable[Layer] = ()) -> Iterator[None]:
    """Let errors of the block name the flags of settings, but not those about other layers."""
    others = tuple(f"{source}: " for source, _ in layers if source != COMMAND_LINE)
    try:
        yield
    except SwiftI2VError as error:
        text = str(error).removeprefix(f"{COMMAND_LINE}: ").removeprefix("settings: ")
        if text.startswith(others):
            raise
        error.args = (PATTERN.sub(lambda found: FLAGS[found[0]], text),)
        raise
