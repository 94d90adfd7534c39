"""The run of ``generate``, ``refine`` and ``upscale``: progress on stderr, the account on stdout."""

import json
from collections.abc import Sequence
from dataclasses import replace

import typer
import yaml

from swifti2v.cli.flags import naming_flags
from swifti2v.cli.processes import join, start_processes
from swifti2v.cli.report import ProgressDisplay
from swifti2v.config import to_dict
from swifti2v.jobs.check import Job, check
from swifti2v.jobs.interruption import Interruption
from swifti2v.jobs.load import load, outline
from swifti2v.jobs.request import ClipRequest
from swifti2v.jobs.resolve import Resolved, resolve
from swifti2v.jobs.run import run
from swifti2v.models.loading.availability import (
    RemoteFiles,
    download_commands,
    find_missing_weights,
)


def run_command(request: ClipRequest, *, dry_run: bool, as_json: bool) -> None:
    """Make a clip and report; ``dry_run`` checks and describes the run alone."""
    interruption = Interruption()
    with interruption.catch():
        if dry_run:
            typer.echo(describe_plan(_plan(_resolve(request)), as_json=as_json))
            return
        start_processes(request)
        with join(request) as (shared, is_first):
            job = _check(_resolve(shared))
            if not is_first:
                run(job, interruption=interruption, is_first=False)
                return
            for note in job.notes if as_json else ():
                typer.echo(f"note: {note}", err=True)
            typer.echo(f"seed: {job.settings.seed}", err=True)
            with ProgressDisplay(len(job.pipe.plan(job.settings.config))) as display:
                report = run(job, display.on_progress, display.on_segment, interruption)
    typer.echo(report.to_json() if as_json else "\n".join([*report.to_lines(), *job.notes]))


def _resolve(request: ClipRequest) -> Resolved:
    with naming_flags(request.layers):
        return resolve(request)


def _check(resolved: Resolved) -> Job:
    pipe = load(resolved, keeps=False)  # this process makes one clip
    with naming_flags():
        return check(resolved, pipe)


def _plan(resolved: Resolved) -> Job:
    """A job to look at; the weights need not be on this machine."""
    settings = resolved.settings
    missing = find_missing_weights(settings.model, with_stage1=settings.motion is None)
    if not missing:
        return _check(resolved)
    with naming_flags():
        job = check(resolved, outline(resolved))
    return replace(job, notes=(*job.notes, _describe_missing(missing)))


def describe_plan(job: Job, *, as_json: bool) -> str:
    """Describe a run without making it: settings, sizes and segments, as YAML or JSON."""
    config = job.settings.config
    low = config.stage1.downscale
    plan = {
        "settings": to_dict(job.settings),
        "sizes": {
            "output": [config.width, config.height],
            "motion_reference": [config.width // low, config.height // low]
            if job.motion is None
            else [job.motion.shape[2], job.motion.shape[1]],
            "num_frames": config.num_frames,
        },
        "segments": [list(latent_range) for latent_range in job.pipe.plan(config)],
        "notes": list(job.notes),
    }
    if as_json:
        return json.dumps(plan)
    return yaml.safe_dump(
        json.loads(json.dumps(plan)), sort_keys=False, allow_unicode=True
    ).rstrip()


def _describe_missing(missing: Sequence[RemoteFiles]) -> str:
    repos = ", ".join(dict.fromkeys(files.repo_id for files in missing))
    return (
        f"weights of {repos} are not on this machine, so sizes and settings were checked, the "
        f"prompt's length and LoRAs were not; get them with: {'; '.join(download_commands(missing))}"
    )
