"""The account of a finished run."""

import json
import resource
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

from swifti2v.pipelines.progress import TimedStage
from swifti2v.proc import read_bytes

if TYPE_CHECKING:
    from swifti2v.pipelines.decoding import SegmentOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentReport:
    """One segment of the account."""

    index: int
    """Place in the clip, from 0."""
    latent_range: tuple[int, int]
    """Latent frames generated, half open."""
    seconds: float
    """Seconds from the end of the segment before to the end of this one."""

    @classmethod
    def of(cls, segment: "SegmentOutput") -> "SegmentReport":
        """Make the account of a finished segment."""
        seconds = round(segment.seconds, 3)
        return cls(index=segment.index, latent_range=segment.latent_range, seconds=seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """The account of a finished run; ``--json`` prints exactly these fields."""

    output: str
    """Absolute path of the video."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    num_frames: int
    """Frames in the video."""
    fps: int | float
    """Frames a second."""
    seed: int
    """Seed of the initial noise."""
    model: str
    """Name of the model."""
    segments: list[SegmentReport]
    """Segments in order."""
    seconds: dict[str, float]
    """Seconds of each stage, in all, and until the first segment was finished."""
    peak_rss_bytes: int
    """Most memory the process held."""
    peak_device_bytes: int | None
    """Most memory held on the GPU; None without one."""

    def to_json(self) -> str:
        """Return the account as one line of JSON."""
        return json.dumps(asdict(self))

    def to_lines(self) -> list[str]:
        """Return the account in lines for people; the first is the path alone."""
        first, total = self.seconds["first_segment"], self.seconds["total"]
        return [
            self.output,
            f"{self.width}x{self.height}, {self.num_frames} frames at {self.fps:.5g} fps, "
            f"model {self.model}, seed {self.seed}, {total:.1f} s (first segment {first:.1f} s)",
        ]


def peak_rss_bytes() -> int:
    """Most memory this process has held so far."""
    held = read_bytes("self/status", "VmHWM")
    if held is not None:  # the account below begins with the memory of the process that started it
        return held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def stage_seconds(measured: dict[str, float], total: float, first_segment: float) -> dict[str, Any]:
    """Seconds of every stage, 0 for one that did not run."""
    stages = {stage: round(measured.get(stage, 0.0), 3) for stage in get_args(TimedStage)}
    return {**stages, "total": round(total, 3), "first_segment": round(first_segment, 3)}
