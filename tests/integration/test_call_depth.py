"""How many functions of this package stand between a call and the attention kernel of Stage II."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import swifti2v
from swifti2v import SwiftI2VPipeline
from swifti2v.media import load_image
from tests.helpers.command_line import generate, succeed

PACKAGE = Path(swifti2v.__file__).parent
INLINED = ("<listcomp>", "<dictcomp>", "<setcomp>")
"""Functions to Python 3.11 only."""


class CallChains(TorchFunctionMode):
    """Keeps the functions of this package that led to each call of the attention kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.chains: set[tuple[str, ...]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.chains.add(tuple(own_functions(sys._getframe())))
        return func(*args, **(kwargs or {}))

    def longest(self) -> tuple[str, ...]:
        """The longest way to Stage II's transformer."""
        return max((c for c in self.chains if "Stage2Pipeline.stream" in c), key=len)


def own_functions(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        code = frame.f_code
        if PACKAGE in Path(code.co_filename).parents and code.co_name not in INLINED:
            yield code.co_qualname
        frame = frame.f_back


def num_calls(chain: tuple[str, ...]) -> int:
    return len(chain) - 1


def test_a_pipeline_is_at_most_ten_calls_from_its_kernel(model, photo):
    pipe = SwiftI2VPipeline.from_pretrained(model, device="cpu")
    for guidance_scale in (1, 2):
        with CallChains() as seen:
            pipe(load_image(photo), "zoom", guidance_scale=guidance_scale)
        assert seen.longest()[-1] == "SwiftI2VPipeline.__call__"
        assert num_calls(seen.longest()) <= 10, seen.longest()


@pytest.mark.slow
def test_a_command_is_at_most_thirteen_calls_from_its_kernel(model, photo, tmp_path):
    for guidance_scale in (1, 2):
        more = ("--guidance-scale", guidance_scale)
        with CallChains() as seen:
            succeed(generate(model, photo, tmp_path / "clip.mp4", *more))
        assert "generate" in seen.longest()
        assert num_calls(seen.longest()) <= 13, seen.longest()
