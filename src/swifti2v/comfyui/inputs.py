"""Inputs and outputs that several nodes share, and the text of all other settings."""

from typing import Any

import yaml
from comfy_api.v0_0_2 import io

from swifti2v.errors import ConfigError

INPUTS_OF_THEIR_OWN = ("num_frames", "height", "width", "fps")
"""Settings that have an input, so that the text of ``settings`` may not name them."""


def photo_inputs() -> list[io.Input]:
    """Photo, and the way to fit it to another aspect."""
    return [
        io.Image.Input("image", tooltip="One photo."),
        io.Combo.Input(
            "fit",
            options=["crop", "pad"],
            default="crop",
            tooltip="Way to fit a photo of another aspect.",
        ),
    ]


def prompt_inputs() -> list[io.Input]:
    """Prompt and seed."""
    return [
        io.String.Input("prompt", multiline=True, tooltip="Text that says what happens."),
        io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=True),
    ]


def num_frames_input() -> io.Input:
    """Length of a new clip."""
    return io.Int.Input("num_frames", default=33, min=5, max=100_001, step=4, tooltip="4k + 1.")


def size_inputs(tooltip: str) -> list[io.Input]:
    """Width and height; 0 lets the side follow."""
    return [
        io.Int.Input(side, default=0, min=0, max=16_384, step=32, tooltip=tooltip)
        for side in ("width", "height")
    ]


def video_inputs() -> list[io.Input]:
    """Frame rate, and whether frames are returned beside the file."""
    return [
        io.Int.Input("fps", default=0, min=0, max=240, tooltip="0: the model's."),
        io.Boolean.Input(
            "return_frames",
            default=False,
            tooltip="Also hold all frames in memory as an IMAGE batch: 12 bytes a pixel.",
        ),
    ]


def settings_input() -> io.Input:
    """Text of all other settings."""
    return io.String.Input(
        "settings",
        default="",
        multiline=True,
        tooltip="Fields of GenerationConfig, one a line, such as stage2.segment_size: 5",
    )


def video_outputs() -> list[io.Output]:
    """The video's file, and the frames if they are asked for."""
    return [
        io.Video.Output(display_name="video"),
        io.Image.Output(display_name="frames", tooltip="Needs return_frames."),
    ]


def read_settings(text: str) -> dict[str, Any]:
    """Settings by name from the text of a ``settings`` input.

    Raises:
        ConfigError: The text is not a YAML mapping, or names a setting that has its own input.
    """
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"settings are not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError("settings must be 'name: value' lines, such as stage2.segment_size: 5")
    if named := [name for name in INPUTS_OF_THEIR_OWN if name in values]:
        raise ConfigError(f"settings name {named[0]}, which has its own input; set it there")
    return {str(name): value for name, value in values.items()}
