"""Processes that share a clip, each with a GPU of its own: ``--context-parallel``."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import typer

from swifti2v.errors import InputError
from swifti2v.jobs.request import RANDOM, ClipRequest, draw_seed

FORM = re.compile(r"ulysses:([1-9]\d?)")


def parse_processes(text: str | None) -> int:
    """Number of processes of ``ulysses:N``; 1 without a text.

    Raises:
        typer.BadParameter: The text is of another form.
    """
    found = FORM.fullmatch(text or "ulysses:1")
    if found is None:
        raise typer.BadParameter(
            f"{text!r} is not ulysses:N, such as ulysses:2", param_hint="--context-parallel"
        )
    return int(found[1])


def start_processes(request: ClipRequest) -> None:
    """Begin this command again in each of the processes that the request wants; it does not return.

    It does return where a launcher started this process, or where one process is enough.
    """
    if request.num_processes == 1 or "WORLD_SIZE" in os.environ:
        return
    words = sys.argv[1:]
    if _draws_seed(request):
        words += ["--seed", str(draw_seed())]  # of several, the last one counts
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    number = str(request.num_processes)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launcher, number, "-m", "swifti2v", *words])


@contextmanager
def join(request: ClipRequest) -> Iterator[tuple[ClipRequest, bool]]:
    """Take part in the processes of a request.

    Yields:
        The request with the device of this process, and whether it is the first one.

    Raises:
        InputError: Each process would draw a seed of its own.
    """
    if request.num_processes == 1:
        yield request, True
        return
    if _draws_seed(request):
        raise InputError("several processes need the same seed; give --seed")
    from swifti2v.jobs.devices import choose_device
    from swifti2v.models.context_parallel import join_processes

    device = choose_device(request.device)
    if device.type == "cuda":
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    with join_processes(request.num_processes, device) as is_first:
        yield replace(request, device=str(device)), is_first


def _draws_seed(request: ClipRequest) -> bool:
    """Whether neither the request nor the run that it repeats or continues has a seed."""
    is_open = request.seed is None and request.like is None and not request.resume
    return is_open or request.seed == RANDOM
