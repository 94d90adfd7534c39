"""Costs of a training step: samples a second and peak memory, each setting in its own process."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from swifti2v.errors import ConfigError, SwiftI2VError
from swifti2v.units import MB

NUM_WARM_UP = 2
"""Steps that are not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Cost of one setting."""

    settings: Mapping[str, Any]
    """Changes to the configuration by dotted path."""
    samples_per_second: float
    """Median over the steps after the first two."""
    peak_rss_bytes: int
    """Most host memory of the process, weights and libraries included."""
    peak_device_bytes: int
    """Most GPU memory; 0 on a CPU."""


def combine(choices: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """Yield every combination of the values given for each setting."""
    for values in product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def parse_choices(text: str) -> tuple[str, list[str]]:
    """Read ``a.b=1,2,4``; a value in brackets may hold commas.

    Raises:
        ConfigError: No equals sign, or no value.
    """
    name, equals, rest = text.partition("=")
    values, depth, current = [], 0, ""
    for letter in rest:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            values.append(current)
            current = ""
        else:
            current += letter
    values.append(current)
    if not equals or not name or "" in values:
        raise ConfigError(f"--vary {text!r} is not of the form a.b=1,2,4")
    return name, values


def measure_throughput(
    part: str,
    config: Path | None,
    choices: Mapping[str, Sequence[str]],
    directory: Path,
    num_steps: int,
    on_result: Callable[[Throughput], None] | None = None,
) -> list[Throughput]:
    """Train at least 3 steps with every combination of settings, each in a directory of its own.

    Raises:
        ConfigError: Too few steps, or a relay, which is two trainings.
        SwiftI2VError: A training failed; its own message is passed on.
    """
    if num_steps <= NUM_WARM_UP:
        raise ConfigError(f"{num_steps} steps are too few; the first {NUM_WARM_UP} do not count")
    if part == "relay":
        raise ConfigError("a relay is two trainings of Stage II; measure stage2 instead")
    results = []
    for number, settings in enumerate(combine(choices)):
        result = _measure(part, config, settings, directory / f"run-{number:03d}", num_steps)
        results.append(result)
        if on_result is not None:
            on_result(result)
    return results


def render_throughput(results: Sequence[Throughput]) -> str:
    """A Markdown table, one row a setting."""
    names = list(results[0].settings)
    has_gpu = any(result.peak_device_bytes for result in results)
    titles = [f"`{name}`" for name in names] + ["samples/s", "peak RSS, MB"]
    titles += ["peak GPU memory, MB"] if has_gpu else []
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for result in results:
        cells = [str(result.settings[name]) for name in names]
        cells += [f"{result.samples_per_second:.2f}", f"{result.peak_rss_bytes / MB:.0f}"]
        cells += [f"{result.peak_device_bytes / MB:.0f}"] if has_gpu else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _measure(
    part: str, config: Path | None, settings: Mapping[str, str], directory: Path, num_steps: int
) -> Throughput:
    command = [sys.executable, "-m", "swifti2v", "train", part, "--output-dir", str(directory)]
    command += [] if config is None else ["--config", str(config)]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    command += ["--max-steps", str(num_steps)]
    directory.parent.mkdir(parents=True, exist_ok=True)
    log = directory.with_suffix(".log")
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        # Of this child alone; getrusage would give the largest of all children so far.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise SwiftI2VError(f"{dict(settings)}: the training failed: {''.join(last)} (see {log})")
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines][NUM_WARM_UP:]
    return Throughput(
        settings=settings,
        samples_per_second=statistics.median(step["samples_per_second"] for step in steps),
        peak_rss_bytes=usage.ru_maxrss * 1024,
        peak_device_bytes=max(step["peak_device_bytes"] for step in steps),
    )
