"""The samples of one run of ``swifti2v data transition``, one after the other."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from swifti2v import __version__
from swifti2v.errors import PromptError, SwiftI2VError
from swifti2v.jobs.interruption import Interruption
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.training.data.samples import Manifest, Reject, Sample
from swifti2v.training.transition.samples import (
    TransitionConfig,
    describe_run,
    describe_sample,
    make_row,
    make_transition_sample,
    read_window,
)
from swifti2v.training.transition.store import TransitionStore

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Callback with the numbers of finished and of refused clips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of a run for its part of the manifest."""

    rows: list[dict[str, Any]]
    """Rows of the new manifest, in the order of the old one."""
    records: list[dict[str, Any]]
    """Records of the same samples."""
    num_made: int
    """Samples of this run; the others were finished before."""
    rejects: list[Reject]
    """Clips that could not be used."""
    seconds: float
    """Seconds in all."""


class TransitionJob:
    """The samples of one run. ``on_note`` is told what reading does to a clip."""

    def __init__(
        self,
        pipe: SwiftI2VPipeline,
        config: TransitionConfig,
        store: TransitionStore,
        model: dict[str, Any],
        on_note: Callable[[str], None],
    ) -> None:
        pipe.require_fit(config.generation)
        self.pipe, self.config, self.store, self.model = pipe, config, store, model
        self.on_note = on_note
        self.parameters = describe_run(pipe, config)

    def find_finished(self, samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
        """Find the records of finished samples, by id.

        Raises:
            InputError: One was made with other parameters.
        """
        records = (
            (s.id, self.store.find(s.id, {**self.parameters, **describe_sample(s)}))
            for s in samples
        )
        return {sample_id: record for sample_id, record in records if record is not None}

    def describe(self, listed: Manifest, num_finished: int) -> dict[str, Any]:
        """Describe a run without making it, as plain values."""
        generation = self.config.generation
        low = generation.stage1.downscale
        return {
            "model": self.model,
            **self.parameters,
            "sizes": {
                "clip": [generation.width, generation.height],
                "reference": [generation.width // low, generation.height // low],
                "num_frames": generation.num_frames,
                "fps": generation.fps,
            },
            "num_clips": len(listed.samples),
            "num_finished": num_finished,
            "rejects": [asdict(reject) for reject in listed.rejects],
        }

    def run(
        self,
        listed: Manifest,
        finished: dict[str, dict[str, Any]],
        interruption: Interruption,
        on_progress: OnProgress | None = None,
    ) -> Outcome:
        """Make the samples that are not finished yet.

        Raises:
            KeyboardInterrupt: It was stopped; a note says how it goes on.
            SwiftI2VError: It cannot go on, with the same note.
        """
        began = time.monotonic()
        rows, records, rejects = [], [], list(listed.rejects)
        num_made = 0
        folder = self.store.directory
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number, sample in enumerate(listed.samples, 1):
                made = finished.get(sample.id) or self._make(sample, interruption)
                if isinstance(made, Reject):
                    rejects.append(made)
                    continue
                num_made += sample.id not in finished
                records.append(made)
                clip = self.store.clip_path(sample.id)
                rows.append(make_row(sample, clip, made["start"], made["end"], folder))
                if on_progress is not None:
                    on_progress(number, len(rejects))
        except (SwiftI2VError, OSError, MemoryError, KeyboardInterrupt) as error:
            error.add_note(
                f"{len(finished) + num_made} finished samples are kept; run the same command again "
                "to continue"
            )
            raise
        return Outcome(
            rows=rows,
            records=records,
            num_made=num_made,
            rejects=rejects,
            seconds=time.monotonic() - began,
        )

    def _make(self, sample: Sample, interruption: Interruption) -> dict[str, Any] | Reject:
        """Make and store one sample, and return its record."""
        window = read_window(sample, self.config)
        if isinstance(window, Reject):
            return window
        for note in window.notes:
            self.on_note(f"{sample.id}: {note}")
        try:
            made = make_transition_sample(
                self.pipe, window.frames, sample.prompt, sample.id, self.config
            )
        except PromptError as error:
            return Reject(sample.id, f"bad caption: {error}")
        except torch.OutOfMemoryError as error:
            raise SwiftI2VError(
                f"the device is out of memory ({str(error).splitlines()[0]}); choose a smaller size, "
                "fewer frames, or --placement streamed"
            ) from error
        parameters = {**self.parameters, **describe_sample(sample)}
        origin = {"start": window.start, "end": window.end, **self._origin(sample)}
        fps = self.config.generation.fps
        with interruption.shield():
            return self.store.save(sample.id, made, fps, parameters, origin)

    def _origin(self, sample: Sample) -> dict[str, Any]:
        """Origin of a sample: its source and versions; they do not decide it."""
        return {
            "source": sample.media.name,
            "model": self.model,
            "device": self.pipe.components.device.type,
            "versions": {
                "swifti2v": __version__,
                **{name: version(name) for name in ("torch", "diffusers", "av")},
            },
        }


class TransitionActor:
    """A process of a cluster that makes samples, with Stage I loaded once.

    Finished samples, also those of a process that died, are not made again.
    """

    def __init__(
        self,
        load: Callable[[], SwiftI2VPipeline],
        config: TransitionConfig,
        store: TransitionStore,
        model: dict[str, Any],
    ) -> None:
        self.job = TransitionJob(load(), config, store, model, logger.info)

    def __call__(self, samples: Sequence[Sample]) -> Outcome:
        """Make a batch of samples; they are on disk then."""
        listed = Manifest(samples=tuple(samples), rejects=())
        return self.job.run(listed, self.job.find_finished(samples), Interruption())


def join_outcomes(
    job: TransitionJob, listed: Manifest, outcomes: Iterable[Outcome], on_progress: OnProgress
) -> Outcome:
    """Join what actors made of a manifest to the outcome of one run, its rows in the manifest's order."""
    began, num_made, num_done = time.monotonic(), 0, 0
    rejects: list[Reject] = []
    for outcome in outcomes:
        num_made += outcome.num_made
        num_done += len(outcome.rows)
        rejects += outcome.rejects
        on_progress(num_done, len(rejects))
    refused = {reject.id for reject in rejects}
    usable = tuple(sample for sample in listed.samples if sample.id not in refused)
    finished = job.find_finished(usable)
    rest = Manifest(samples=usable, rejects=(*listed.rejects, *rejects))
    whole = job.run(rest, finished, Interruption())
    seconds = time.monotonic() - began
    return replace(whole, num_made=num_made + whole.num_made, seconds=seconds)
