"""Log of a running training: a line a step, validations, the noise levels so far."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from swifti2v.storage import write_whole
from swifti2v.training.engine.noise_histogram import SigmaHistogram
from swifti2v.training.engine.trackers import MetricsFile, Tracker

NOISE_LEVELS_NAME = "noise_levels.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One line of ``metrics.jsonl``."""

    step: int
    """Number of the step, from 1, over all phases."""
    phase: str
    """Name of the phase."""
    loss: float
    """Mean over the step's samples."""
    lr: float
    """Learning rate of the step."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    seconds: float
    """Seconds of training so far, over all resumed runs."""
    step_seconds: float
    """Seconds of this step, without those of ``wait_seconds``."""
    wait_seconds: float
    """Seconds in which this step waited for samples, on the first rank."""
    seconds_left: float
    """Until the run ends, at the pace of this phase."""
    samples_per_second: float
    """Samples a second in this step, over all ranks."""
    tokens_per_second: float
    """Tokens a second in this step, over all ranks; 0 if the model is not a video transformer."""
    flops: float
    """FLOP of this step, over all ranks, see ``count_flops``; 0 if the model is not a video
    transformer."""
    mfu: float
    """Part of the devices' peak arithmetic that ``flops`` used; 0 where either is not known."""
    num_replaced: int
    """Samples of this step, on the first rank, that could not be read."""
    peak_device_bytes: int
    """Most GPU memory held so far on the first rank; 0 on a CPU."""


OnStep = Callable[[StepMetrics], None]
"""Called after each step on the first rank; raising in it stops, after a checkpoint."""


class RunLog:
    """The files and trackers of a run; they are the first rank's, others write nothing.

    The files are ``metrics.jsonl``, ``validation.jsonl`` and ``noise_levels.json``; what a killed
    run wrote of steps after ``step`` is dropped.
    """

    def __init__(
        self, directory: Path, step: int, *, is_first: bool, trackers: Sequence[Tracker] = ()
    ) -> None:
        self._directory = directory
        self._trackers = trackers if is_first else ()
        self._lines = MetricsFile(directory / "metrics.jsonl") if is_first else None
        if self._lines is not None:
            self._lines.cut(step)

    def log_step(self, metrics: StepMetrics) -> None:
        """A step is finished."""
        if self._lines is None:
            return
        values = asdict(metrics)
        del values["step"]
        self._lines.log(metrics.step, values)
        for tracker in self._trackers:
            tracker.log(metrics.step, {k: v for k, v in values.items() if not isinstance(v, str)})

    def log_validation(self, step: int, metrics: Mapping[str, float], pictures: Path) -> None:
        """A validation is finished; the PNG files of ``pictures`` go to the trackers."""
        if self._lines is None:
            return
        own = MetricsFile(self._directory / "validation.jsonl")
        try:
            own.cut(step - 1)  # a killed run may have been further
            own.log(step, metrics)
        finally:
            own.close()
        for tracker in self._trackers:
            tracker.log(step, {f"validation/{name}": value for name, value in metrics.items()})
            for path in sorted(pictures.glob("*.png")):
                tracker.log_image(step, path.stem, path)

    def log_noise_levels(self, step: int, histogram: SigmaHistogram) -> None:
        """Write how often each range of noise levels was trained at so far."""
        if self._lines is None:
            return
        counts = histogram.to_dict()
        text = json.dumps({"step": step, "counts": counts}, indent=2) + "\n"
        write_whole(self._directory / NOISE_LEVELS_NAME, text)
        for tracker in self._trackers:
            tracker.log(step, {f"noise_levels/{name}": count for name, count in counts.items()})

    def close(self) -> None:
        """Write what is left; nothing can be logged afterwards."""
        for tracker in (*self._trackers, *([self._lines] if self._lines is not None else [])):
            tracker.close()
