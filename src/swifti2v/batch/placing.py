"""Host memory of an actor, predicted before a cluster is asked for a place for it."""

import json
from collections.abc import Sequence
from dataclasses import replace

from swifti2v.batch.rows import ClipRow, Machine
from swifti2v.jobs.layers import resolve_config
from swifti2v.planning.devices import DEVICES, PRECISIONS, Precision
from swifti2v.planning.plans import estimate
from swifti2v.planning.stored import find_costs


def predict_host_bytes(rows: Sequence[ClipRow], machine: Machine, *, is_cpu: bool) -> int:
    """Most host memory of an actor that makes any of the clips and keeps their models.

    Args:
        rows: The clips; those that differ in photo, prompt and seed alone are looked at once.
        machine: The way in which they are computed. Where it leaves the placement to a memory budget,
            the one that takes most host memory counts.
        is_cpu: Whether actors compute on cores, where all memory is the host's.

    Raises:
        ConfigError: See ``find_costs``.
        LoadingError: The configuration of a component is not on this machine and cannot be had.
        ShapeError: A size or frame count does not fit the model.
    """
    kinds = {
        (row.model, row.motion is None, json.dumps(row.changes, sort_keys=True)): row
        for row in rows
    }
    return max((_predict(row, machine, is_cpu=is_cpu) for row in kinds.values()), default=0)


def _predict(row: ClipRow, machine: Machine, *, is_cpu: bool) -> int:
    config = resolve_config(row.model, ((f"clip {row.id}", row.changes),))
    usual: Precision = "float32" if is_cpu else "bfloat16"
    precision = next((name for name in PRECISIONS if name == machine.dtype), usual)
    placement = machine.placement or ("offloaded" if machine.memory else "resident")
    costs = find_costs(row.model, config, precision, with_stage1=row.motion is None)
    work = costs.count(config.stage2.vae_tile, offloads_history=placement == "offloaded")
    device = replace(DEVICES["h100"], is_cpu=is_cpu)  # its speed does not matter
    return int(estimate(work, device, precision, placement, keeps=True).host_bytes)
