"""A phase of a training on clips, and the clips of all phases."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field, replace
from pathlib import Path

from swifti2v.config import settings
from swifti2v.shards import is_in_shard
from swifti2v.training.data.clips import DataConfig, ManifestClips, ManifestConfig, list_samples
from swifti2v.training.data.probes import Probes, index_path
from swifti2v.training.data.procedural import MANIFEST_NAME, write_procedural_clips
from swifti2v.training.data.samples import Manifest
from swifti2v.training.engine.ranks import Ranks
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig

NUM_THREADS = 4
"""Files that a rank looks into at a time."""


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

    The first rank makes them, so many for each bucket. Clips that no index knows are looked into by
    all ranks, each its share. ``directory`` gets ``procedural/`` and ``probes/``, what was found
    out about the clips.
    """
    phase_data = [_with_clips(phase.data, directory / "procedural") for phase in phases]
    for own, phase in zip(phase_data, phases, strict=True):
        if own is not phase.data and ranks.is_first:
            rules, place = own.rules, directory / "procedural"
            write_procedural_clips(place, rules.shapes, num_procedural_clips, 0, rules.fps)
    ranks.wait_for_files()
    sources = dict.fromkeys(source for own in phase_data for source in own.manifests)
    listed = {source: list_samples(source) for source in sources}
    with Probes(directory / "probes", [index_path(source.path) for source in sources]) as look:
        if ranks.world_size > 1:
            _look_together(listed.values(), look, ranks)
        return tuple(
            ManifestClips(
                own,
                run.batch_size,
                run.seed,
                run.bad_samples,
                look,
                [listed[source] for source in own.manifests],
            )
            for own in phase_data
        )


def _with_clips(data: DataConfig, place: Path) -> DataConfig:
    if data.manifests:
        return data
    return replace(data, manifests=(ManifestConfig(path=str(place / MANIFEST_NAME)),))


def _look_together(listed: Iterable[Manifest], look: Probes, ranks: Ranks) -> None:
    """Each rank looks into its share; then all know all."""
    samples = [sample for manifest in listed for sample in manifest.samples]
    own = [s for s in samples if is_in_shard(s.media.name, ranks.rank + 1, ranks.world_size)]
    with ThreadPoolExecutor(NUM_THREADS) as executor:
        look.look_into(own, executor)
    look.refresh()  # here others can read it
    ranks.wait_for_files()
    look.refresh()
