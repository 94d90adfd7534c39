"""Layers of settings are checked one by one, their sum as a whole."""

import pytest

from swifti2v.errors import ConfigError
from swifti2v.jobs.layers import resolve_config

LONG = ("long.yaml", {"num_frames": 481})
LATER = ("options", {"later_prompts": [[241, "zoom in"]]})


@pytest.mark.parametrize("layers", [(LONG, LATER), (LATER, LONG)])
def test_a_prompt_may_come_late_where_another_layer_makes_the_clip_long(layers):
    config = resolve_config("nano", layers)
    assert (config.num_frames, config.later_prompts) == (481, ((241, "zoom in"),))


def test_a_prompt_after_the_end_is_measured_by_the_clip_that_is_made():
    with pytest.raises(ConfigError, match="frame 241, but the last of 33 frames"):
        resolve_config("nano", [LATER])
    with pytest.raises(ConfigError, match=r"^options: later_prompts has 10, which is not 4k \+ 1"):
        resolve_config("nano", [("options", {"later_prompts": [[10, "b"]]})])
