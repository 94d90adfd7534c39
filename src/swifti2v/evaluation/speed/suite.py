"""The parts of ``swifti2v bench speed``, in the order in which they run."""

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from swifti2v.errors import ConfigError
from swifti2v.evaluation.speed.clips import time_clips, time_lengths
from swifti2v.evaluation.speed.end_to_end import time_end_to_end
from swifti2v.evaluation.speed.kernels import time_kernels
from swifti2v.evaluation.speed.models import Subject
from swifti2v.evaluation.speed.published import compare_published
from swifti2v.evaluation.speed.rows import Row, add_ratios
from swifti2v.evaluation.speed.timing import Protocol
from swifti2v.evaluation.speed.transformers import (
    compare_transformers,
    pull_levers,
    time_stage1,
)
from swifti2v.evaluation.speed.vaes import compare_vaes

BenchPart = Callable[[Subject, Protocol], Iterator[Row]]
PARTS: dict[str, BenchPart] = {
    "kernels": time_kernels,
    "stage1": time_stage1,
    "stage2": compare_transformers,
    "levers": pull_levers,
    "vae": compare_vaes,
    "clip": partial(time_clips, against=False),
    "lengths": time_lengths,
    "end_to_end": time_end_to_end,
    "published": compare_published,
}
USUAL = ("stage1", "stage2", "levers", "vae", "clip", "lengths")
"""Parts that every machine can run."""


def require_parts(names: Sequence[str]) -> None:
    """Refuse unknown parts, before anything runs.

    Raises:
        ConfigError: Naming those there are.
    """
    if unknown := [name for name in names if name not in PARTS]:
        raise ConfigError(f"part {', '.join(unknown)} is unknown; use {', '.join(PARTS)}")


def run_parts(
    names: Sequence[str],
    subject: Subject,
    protocol: Protocol,
    on_row: Callable[[Row], None],
    *,
    against: bool,
) -> list[Row]:
    """Run parts of the benchmark, one after the other.

    Raises:
        ConfigError: See ``require_parts``.
    """
    require_parts(names)
    rows: list[Row] = []
    parts: dict[str, BenchPart] = {**PARTS, "clip": partial(time_clips, against=against)}
    for name in names:
        for row in parts[name](subject, protocol):
            rows.append(row)
            on_row(add_ratios(rows)[-1])
        gc.collect()
        if subject.device.type == "cuda":
            torch.cuda.empty_cache()
    return add_ratios(rows)
