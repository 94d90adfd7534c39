"""A phase of a training on clips, and the clips of all phases."""

from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path

from swifti2v.config import settings
from swifti2v.training.data.clips import DataConfig, ManifestClips, ManifestConfig
from swifti2v.training.data.probes import Probes
from swifti2v.training.data.procedural import MANIFEST_NAME, write_procedural_clips
from swifti2v.training.engine.ranks import Ranks
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig


@settings
class ClipsPhase(PhaseConfig):
    """A part of a curriculum over manifests."""

    data: DataConfig = field(default_factory=DataConfig)
    """Clips, real and of stage transition, with their weights; sizes and lengths."""


def find_clips(
    phases: Sequence[ClipsPhase],
    num_procedural_clips: int,
    run: RunConfig,
    directory: Path,
    ranks: Ranks,
) -> tuple[ManifestClips, ...]:
    """The clips of each phase; where it names no manifest, procedural ones are made.

    The first rank makes and inspects them, so many for each bucket. ``directory`` gets
    ``procedural/`` and ``probes/``, what was found out about the clips.
    """
    if not ranks.is_first:
        ranks.wait()
    found = []
    with Probes(directory / "probes") as look:
        for phase in phases:
            data = phase.data
            if not data.manifests:
                rules, place = data.rules, directory / "procedural"
                if ranks.is_first:
                    write_procedural_clips(place, rules.shapes, num_procedural_clips, 0, rules.fps)
                own = ManifestConfig(path=str(place / MANIFEST_NAME))
                data = replace(data, manifests=(own,))
            found.append(ManifestClips(data, run.batch_size, run.seed, run.bad_samples, look))
    if ranks.is_first:
        ranks.wait()
    return tuple(found)
