"""How ``--lora`` is read."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swifti2v.cli.loras import LoraArgument, parse_lora
from swifti2v.errors import InputError


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.floats(-4, 4),
    st.sampled_from(["a.safetensors", "d/b c.pt", "C:/x/y.safetensors"]),
    st.booleans(),
)
def test_every_form_reads_back(
    tmp_path: Path, strength: float, name: str, allow_partial: bool
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    end = ":partial" if allow_partial else ""
    assert parse_lora(f"{path}:{strength!r}{end}") == ("stage1", path, strength, allow_partial)
    assert parse_lora(f"stage2={path}{end}") == ("stage2", path, 1.0, allow_partial)
    assert parse_lora(f"{path}{end}", "stage2").stage == "stage2"


@pytest.mark.parametrize(
    "text", ["", ":0.5", ":partial", "a.safetensors:", "a.safetensors:x", "a:nan", "a:inf:partial"]
)  # fmt: skip
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=rf"{re.escape(repr(text))} is not PATH\[:STRENGTH\]"):
        parse_lora(text)


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"LoRA no\.safetensors does not exist"):
        parse_lora("no.safetensors:0.5:partial")


def test_the_choice_reaches_what_is_loaded() -> None:
    source = LoraArgument("stage1", Path("a.pt"), 0.5, True).to_source()
    assert (source.path, source.strength, source.allow_partial) == ("a.pt", 0.5, True)
