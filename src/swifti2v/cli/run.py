"""Run a prepared clip: both stages, the work dir and the outputs, with an account at the end."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import typer
import yaml

from swifti2v.cli.memory import suggest_plan
from swifti2v.cli.options import ClipOptions
from swifti2v.cli.outputs import ContactSheet, make_writer
from swifti2v.cli.prepare import Run, prepare
from swifti2v.cli.report import (
    ProgressDisplay,
    RunReport,
    SegmentReport,
    peak_rss_bytes,
    stage_seconds,
)
from swifti2v.config import to_dict
from swifti2v.errors import SwiftI2VError
from swifti2v.jobs.interruption import Interruption
from swifti2v.media.writer import FrameWriter
from swifti2v.pipelines.progress import Stopwatch
from swifti2v.pipelines.transition import MotionReference
from swifti2v.pipelines.two_stage import SegmentOutput


def run_command(options: ClipOptions, image: Path | None, motion: Path | None = None) -> None:
    """Prepare, run and report; all of ``generate``, ``refine`` and ``upscale``.

    Args:
        options: Of the command line.
        image: The photo, or None to take that of ``options.like`` or ``motion``'s first frame.
        motion: The user's own motion reference, for ``refine`` and ``upscale``.
    """
    interruption = Interruption()
    with interruption.catch():
        run = prepare(options, image, motion)
        if options.dry_run:
            typer.echo(describe_plan(run, as_json=options.as_json))
            return
        for note in run.notes if options.as_json else ():
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"seed: {run.settings.seed}", err=True)
        report = execute(run, options, interruption)
    typer.echo(report.to_json() if options.as_json else "\n".join([*report.to_lines(), *run.notes]))


def describe_plan(run: Run, *, as_json: bool) -> str:
    """What a run would do: settings, sizes and segments, as YAML or JSON."""
    config = run.settings.config
    low = config.stage1.downscale
    plan = {
        "settings": to_dict(run.settings),
        "sizes": {
            "output": [config.width, config.height],
            "motion_reference": [config.width // low, config.height // low]
            if run.motion is None
            else [run.motion.shape[2], run.motion.shape[1]],
            "num_frames": config.num_frames,
        },
        "segments": [list(latent_range) for latent_range in run.pipe.plan(config)],
        "notes": list(run.notes),
    }
    if as_json:
        return json.dumps(plan)
    return yaml.safe_dump(
        json.loads(json.dumps(plan)), sort_keys=False, allow_unicode=True
    ).rstrip()


def execute(run: Run, options: ClipOptions, interruption: Interruption) -> RunReport:
    """Generate and write the clip.

    Args:
        run: See ``prepare``.
        options: Where to write, and what beside the video.
        interruption: Whose signals end the run.

    Raises:
        SwiftI2VError: The run stopped; what was finished is in the video and in the work dir, and
            a note on the error says how much.
        KeyboardInterrupt: It was stopped, with the same note.
    """
    stopwatch = Stopwatch()
    is_cuda = run.pipe.components.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    writer = make_writer(options.output, run.settings, metadata=not options.no_metadata)
    sheet = ContactSheet(run.settings.config.num_frames)
    try:
        with writer:
            segments = _write_segments(run, writer, sheet, stopwatch, interruption)
            with interruption.shield():
                writer.close()
    except torch.OutOfMemoryError as error:
        stage = stopwatch.stage or "start"
        reason = str(error).splitlines()[0]
        failure = SwiftI2VError(f"the device is out of memory in stage {stage} ({reason})")
        failure.add_note(suggest_plan(run.settings, run.placement))
        failure.add_note(_kept(run, writer))
        raise failure from error
    except (SwiftI2VError, OSError, MemoryError, KeyboardInterrupt) as error:
        error.add_note(_kept(run, writer))
        raise
    if options.contact_sheet is not None:
        sheet.save(options.contact_sheet)
    config = run.settings.config
    return RunReport(
        output=str(options.output.resolve()),
        width=config.width,
        height=config.height,
        num_frames=writer.num_frames_written,
        fps=config.fps,
        seed=run.settings.seed,
        model=run.settings.model,
        segments=segments,
        seconds=stage_seconds(stopwatch.seconds, stopwatch.total(), segments[0].seconds),
        peak_rss_bytes=peak_rss_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated() if is_cuda else None,
    )


def _write_segments(
    run: Run,
    writer: FrameWriter,
    sheet: ContactSheet,
    stopwatch: Stopwatch,
    interruption: Interruption,
) -> list[SegmentReport]:
    """Put every segment into the work dir and the video as it comes; never hold the whole clip."""
    segments = []
    with ProgressDisplay(len(run.pipe.plan(run.settings.config))) as display:
        for segment in _generate(run, display, stopwatch):
            with interruption.shield():  # in both or in none
                if run.work_dir is not None and segment.index not in run.work_dir.finished:
                    run.work_dir.save_segment(segment.index, segment.latents)
                writer.write(segment.frames)
            sheet.add(segment.frames)
            segments.append(
                SegmentReport(
                    index=segment.index,
                    latent_range=segment.latent_range,
                    seconds=round(segment.seconds, 3),
                )
            )
            display.on_segment(segment.index, len(segment.frames), segment.seconds)
    return segments


def _generate(run: Run, display: ProgressDisplay, stopwatch: Stopwatch) -> Iterator[SegmentOutput]:
    """Segments in order; Stage I and segments that the work dir holds are not made again."""
    settings, work_dir = run.settings, run.work_dir
    conditions = run.pipe.encode(run.image, settings.prompt, settings.config, stopwatch)
    if work_dir is not None:
        work_dir.start(settings.plan())
    motion = None if run.motion is None else MotionReference(run.motion)
    if motion is None:
        motion = work_dir.load_motion_reference() if work_dir is not None else None
    if motion is None:
        motion = run.pipe.generate_motion_reference(
            run.image, conditions, settings.seed, settings.config, display.on_progress, stopwatch
        )
        if work_dir is not None:
            work_dir.save_motion_reference(motion)
    run.pipe.release_stage1()
    yield from run.pipe.synthesize(
        motion,
        run.image,
        conditions,
        settings.seed,
        settings.config,
        finished=work_dir.finished if work_dir is not None else None,
        on_progress=display.on_progress,
        stopwatch=stopwatch,
    )


def _kept(run: Run, writer: FrameWriter) -> str:
    """How much of a stopped run there is to look at, and how it goes on."""
    time = run.pipe.stage2.scale.time
    stops = [stop for _, stop in run.pipe.plan(run.settings.config)]
    num_frames = writer.num_frames_written
    num_kept = sum((stop - 1) * time + 1 <= num_frames for stop in stops)
    text = "no segment was finished, so no video was written"
    if num_frames:
        text = (
            f"{num_kept} of {len(stops)} segments ({num_frames} frames) are kept in "
            f"{writer.path.resolve()}"
        )
    if run.work_dir is not None and run.work_dir.directory.is_dir():
        text += f"; continue with --work-dir {run.work_dir.directory} --resume"
    return text
