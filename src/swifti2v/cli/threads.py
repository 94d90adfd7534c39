"""Limit threads to those the container may use: PyTorch itself counts the machine's cores."""

import os
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def limit_threads(root: Path = CONTROL_GROUPS) -> None:
    """Hold OpenMP, before it is loaded, to the processor time that the container is given.

    More threads than that wait for each other's share of time: on 64 cores of which a container may
    use 2, PyTorch would start 64. ``OMP_NUM_THREADS`` is kept where it is set.
    """
    quota = read_quota(root)
    if quota is not None and quota < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(quota))))


def read_quota(root: Path) -> float | None:
    """Processors' worth of time that control groups (version 2 or 1) allow; None for no limit."""
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = (
                (root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        allowed = float(quota) / float(period)  # "max" is no number; -1 is no limit
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return allowed if allowed > 0 else None
