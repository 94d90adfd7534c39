"""Run a checked clip: both stages, the work dir and the outputs, with an account at the end."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from swifti2v.errors import SwiftI2VError
from swifti2v.jobs.check import Job
from swifti2v.jobs.interruption import Interruption
from swifti2v.jobs.outputs import ContactSheet, make_writer
from swifti2v.jobs.placing import suggest_plan
from swifti2v.jobs.report import RunReport, SegmentReport, peak_rss_bytes, stage_seconds
from swifti2v.media.writer import DiscardingWriter, FrameWriter
from swifti2v.pipelines.decoding import SegmentOutput
from swifti2v.pipelines.progress import OnProgress, Stopwatch
from swifti2v.pipelines.store import ReadOnlyStore
from swifti2v.shapes import pixel_frames


def run(
    job: Job,
    on_progress: OnProgress | None = None,
    on_segment: Callable[[SegmentOutput], None] | None = None,
    interruption: Interruption | None = None,
    stopwatch: Stopwatch | None = None,
    *,
    is_first: bool = True,
) -> RunReport:
    """Generate and write the clip.

    Args:
        job: See ``swifti2v.jobs.check.check``.
        on_progress: See ``SwiftI2VPipeline.stream``.
        on_segment: Called with each segment once it is in the video.
        interruption: Its signals end the run, but never within a segment's frames.
        stopwatch: Takes the seconds of each stage.
        is_first: False in all processes that share the clip but the first: they write nothing.

    Raises:
        SwiftI2VError: The run stopped; finished segments are in the video and in the work dir, and
            a note on the error counts them.
        KeyboardInterrupt: A signal stopped the run; it carries the same note.
    """
    stopwatch, interruption = stopwatch or Stopwatch(), interruption or Interruption()
    is_cuda = job.pipe.components.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    request, config = job.request, job.settings.config
    writer: FrameWriter = DiscardingWriter(request.output, config.height, config.width)
    if is_first:
        writer = make_writer(
            request.output, job.settings, job.sound, metadata=request.stores_settings
        )
    sheet = ContactSheet(config.num_frames)
    segments = []
    try:
        with writer:
            for segment in _stream(job, on_progress, stopwatch, is_first=is_first):
                with interruption.shield():
                    writer.write(segment.frames)
                sheet.add(segment.frames)
                segments.append(SegmentReport.of(segment))
                if on_segment is not None:
                    on_segment(segment)
            with interruption.shield():
                writer.close()
    except torch.OutOfMemoryError as error:
        stage = stopwatch.stage or "start"
        reason = str(error).splitlines()[0]
        failure = SwiftI2VError(f"the device is out of memory in stage {stage} ({reason})")
        keeps = not job.pipe.staging.is_staged
        failure.add_note(suggest_plan(job.settings, job.placement, keeps=keeps))
        failure.add_note(_kept(job, writer))
        raise failure from error
    except (SwiftI2VError, OSError, MemoryError, KeyboardInterrupt) as error:
        error.add_note(_kept(job, writer))
        raise
    if request.contact_sheet is not None and is_first:
        sheet.save(request.contact_sheet)
    return RunReport(
        output=str(request.output.resolve()),
        width=config.width,
        height=config.height,
        num_frames=writer.num_frames_written,
        fps=config.fps,
        seed=job.settings.seed,
        model=job.settings.model,
        segments=segments,
        seconds=stage_seconds(stopwatch.seconds, stopwatch.total(), segments[0].seconds),
        peak_rss_bytes=peak_rss_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated() if is_cuda else None,
    )


def _stream(
    job: Job, on_progress: OnProgress | None, stopwatch: Stopwatch, *, is_first: bool
) -> Iterator[SegmentOutput]:
    """Make the segments in order; Stage I and segments in the work dir are not made again."""
    settings, work_dir = job.settings, job.work_dir
    if work_dir is not None and is_first:
        work_dir.start(settings.plan())
    pipe = job.pipe
    start = pipe.stream if job.motion is None else partial(pipe.refine, job.motion)
    return start(
        job.image,
        settings.prompt,
        generator=settings.seed,
        config=settings.config,
        on_progress=on_progress,
        stopwatch=stopwatch,
        store=work_dir if is_first or work_dir is None else ReadOnlyStore(work_dir),
    )


def _kept(job: Job, writer: FrameWriter) -> str:
    """Describe the finished part of a stopped run, and how to continue it."""
    time = job.pipe.stage2.scale.time
    stops = [stop for _, stop in job.pipe.plan(job.settings.config)]
    num_frames = writer.num_frames_written
    num_kept = sum(pixel_frames(stop - 1, time).stop <= num_frames for stop in stops)
    num_stored = job.work_dir.num_finished if job.work_dir is not None else 0
    text = "no segment was finished, so no video was written"
    if num_stored and not num_frames:
        text = f"no video was written yet; {num_stored} of {len(stops)} segments are finished"
    if num_frames:
        text = (
            f"{num_kept} of {len(stops)} segments ({num_frames} frames) are kept in "
            f"{writer.path.resolve()}"
        )
    if job.work_dir is not None and job.work_dir.directory.is_dir():
        text += f"; continue with --work-dir {job.work_dir.directory} --resume"
    return text
