"""Reading ``--lora``."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.cli.loras import parse_lora
from swifti2v.errors import InputError
from swifti2v.jobs.input_files import InputFiles
from swifti2v.models.loading.sources import LoraSource


@given(
    st.floats(-4, 4),
    st.sampled_from(["a.safetensors", "d/b c.pt", "C:/x/y.safetensors"]),
    st.booleans(),
)
def test_every_form_reads_back(strength: float, path: str, allow_partial: bool) -> None:
    end = ":partial" if allow_partial else ""
    plain = LoraSource(path=path, strength=strength, allow_partial=allow_partial)
    assert parse_lora(f"{path}:{strength!r}{end}") == plain
    assert parse_lora(f"stage2={path}{end}") == replace(plain, stage="stage2", strength=1.0)
    assert parse_lora(f"{path}{end}", "stage2").stage == "stage2"


@pytest.mark.parametrize(
    "text", ["", ":0.5", ":partial", "a.safetensors:", "a.safetensors:x", "a:nan", "a:inf:partial"]
)  # fmt: skip
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=rf"{re.escape(repr(text))} is not PATH\[:STRENGTH\]"):
        parse_lora(text)


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"LoRA no\.safetensors does not exist"):
        InputFiles().lora(parse_lora("no.safetensors:0.5:partial"))
