"""Display of a training: a bar on a terminal, lines elsewhere."""

import io
import re
from collections import deque

from rich.console import Console

from swifti2v.cli.training_display import TrainingDisplay, to_facts
from swifti2v.training.engine.run_log import StepMetrics


def metrics(step: int, **changes: float) -> StepMetrics:
    values: dict[str, float] = {
        "loss": 0.5, "lr": 1e-4, "grad_norm": 1.0, "seconds": 2.0 * step, "step_seconds": 2.0, "wait_seconds": 0.5,
        "seconds_left": 3600.0, "samples_per_second": 4.0, "tokens_per_second": 0.0, "flops": 0.0,
        "mfu": 0.0,
    }  # fmt: skip
    return StepMetrics(
        step=step, phase="main", num_replaced=0, peak_device_bytes=0, **{**values, **changes}
    )


def show(*, is_terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=160, color_system=None)
    with TrainingDisplay(console) as display:
        for step in (1, 2):
            display("text", metrics(step))
        display.of("stage2")(metrics(1, seconds_left=6.0))
    return stream.getvalue()


def test_a_pipe_gets_a_line_for_each_part_and_no_bar(capsys):
    assert show(is_terminal=False) == ""
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"{part}: step 1, 2 s, loss 0.5000, learning rate 1.0e-04, 4.00 samples/s"
        for part in ("text", "stage2")
    ]


def test_a_terminal_gets_bars(capsys):
    shown = show(is_terminal=True)
    assert capsys.readouterr().err == ""
    assert "text, main" in shown
    last = re.findall(r"stage2, main.*", shown)[-1]
    assert "step 1, loss 0.5000, 0.50 steps/s, 4.00 samples/s, 0:00:06 left" in last


def test_rates_are_means_over_steps_and_what_is_not_known_is_left_out():
    steps = deque(
        [
            metrics(1, step_seconds=1.0, samples_per_second=8.0, mfu=0.2),
            metrics(2, step_seconds=3.0, samples_per_second=8 / 3, mfu=0.4),
        ]
    )
    assert to_facts(steps) == (
        "step 2, loss 0.5000, 0.50 steps/s, 4.00 samples/s, 1:00:00 left, MFU 30%"
    )
