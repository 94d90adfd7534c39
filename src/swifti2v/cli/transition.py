"""``swifti2v data transition``: true clips as Stage I draws them, for training Stage II."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from swifti2v import __version__
from swifti2v.cli.failures import Interruption, exit_codes
from swifti2v.cli.options import Placement
from swifti2v.config import GenerationConfig, merge, parse_config, parse_override
from swifti2v.errors import ConfigError, InputError, PromptError, SwiftI2VError

if TYPE_CHECKING:
    from swifti2v.models.sources import LoraSource
    from swifti2v.pipelines.two_stage import SwiftI2VPipeline
    from swifti2v.training.manifest import Manifest, Reject, Sample
    from swifti2v.training.stage_transition import TransitionConfig
    from swifti2v.training.transition_store import TransitionStore

REPORT_SECONDS = 10.0
"""Between two lines on stderr."""
LEAST_GAIN = 1.0
"""dB over a still first frame below which the motion counts as lost."""


def transition(
    manifest: Annotated[
        Path,
        typer.Argument(help="CSV, JSONL, Parquet, folder or saved HF dataset that lists clips."),
    ],
    output_dir: Annotated[
        Path, typer.Option(help="Gets clips/ and manifest-I-of-N.jsonl, a training manifest.")
    ],
    root: Annotated[
        Path | None, typer.Option(help="Folder with the clips; the manifest's if not given.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only samples of this split.")] = None,
    model: Annotated[
        str, typer.Option(help="nano, paper, a YAML preset, a directory or a Hub id.")
    ] = "nano",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:STRENGTH]", help="Merged into Stage I. May be given more than once."
        ),
    ] = None,
    sigma: Annotated[
        str, typer.Option(metavar="LOW:HIGH", help="Range of the noise level, within (0, 1].")
    ] = "0.2:0.6",
    num_frames: Annotated[int | None, typer.Option(help="Frames of each clip, 4k + 1.")] = None,
    height: Annotated[
        int | None, typer.Option(help="Of the true clip; the new one has a fraction of it.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Likewise.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second, of both clips.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=C",
            help="A setting by its path, as stage1.sampling.num_inference_steps=8. May be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of noise levels, noise and windows.")] = 0,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Make only part I (from 1) of N; the parts may run anywhere at once.",
        ),
    ] = "1/1",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    placement: Annotated[
        Placement,
        typer.Option(help="streamed keeps the weights in host memory: less GPU memory, slower."),
    ] = Placement.RESIDENT,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the settings and stop.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False,
) -> None:
    """Make stage-transition samples: scale clips down and draw them again with Stage I.

    The new clips keep the true motion but look as Stage I's do. What is finished when it is stopped
    is kept: run the same command again to continue. Clips that cannot be used are counted and named;
    it is an error if none can. Which part a clip belongs to depends on its id alone, so all parts
    together make what one run would.
    """
    interruption = Interruption()
    with exit_codes(debug=debug), interruption.catch():
        low, high = _parse_sigma(sigma)
        loras = _find_loras(lora or [])
        flags = {"num_frames": num_frames, "height": height, "width": width, "fps": fps}
        generation = _resolve(model, set_ or [], flags)
        from swifti2v.training.manifest_readers import read_manifest
        from swifti2v.training.stage_transition import TransitionConfig, parse_shard, take_shard
        from swifti2v.training.transition_store import TransitionStore

        index, num_shards = parse_shard(shard)
        config = TransitionConfig(generation=generation, sigma_low=low, sigma_high=high, seed=seed)
        store = TransitionStore(output_dir)
        listed = take_shard(read_manifest(manifest, root=root, split=split), index, num_shards)
        pipe = _load(model, device, placement, loras)
        job = Job(pipe, config, store, {"name": model, "loras": [asdict(item) for item in loras]})
        finished = job.find_finished(listed.samples)
        if dry_run:
            plan = job.describe(listed, len(finished))
            text = yaml.safe_dump(plan, sort_keys=False, allow_unicode=True).rstrip()
            typer.echo(json.dumps(plan) if as_json else text)
            return
        outcome = job.run(listed, finished, interruption)
        report = _finish(outcome, output_dir / f"manifest-{index}-of-{num_shards}.jsonl")
    _warn_of_lost_motion(report)
    typer.echo(json.dumps(report) if as_json else "\n".join(_to_lines(report)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run made of its part of the manifest."""

    rows: list[dict[str, Any]]
    """Of the new manifest, in the order of the old one."""
    records: list[dict[str, Any]]
    """Of the same samples."""
    num_made: int
    """Samples of this run; the others were finished before."""
    rejects: list["Reject"]
    """Clips that could not be used."""
    seconds: float
    """In all."""


class Job:
    """The samples of one run.

    Args:
        pipe: The model.
        config: Settings.
        store: Where finished samples are.
        model: Name and LoRAs, for the records.
    """

    def __init__(
        self,
        pipe: "SwiftI2VPipeline",
        config: "TransitionConfig",
        store: "TransitionStore",
        model: dict[str, Any],
    ) -> None:
        from swifti2v.training.stage_transition import describe_run

        pipe.require_fit(config.generation)
        self.pipe, self.config, self.store, self.model = pipe, config, store, model
        self.parameters = describe_run(pipe, config)

    def find_finished(self, samples: Sequence["Sample"]) -> dict[str, dict[str, Any]]:
        """Records of the samples that are there, by id.

        Raises:
            InputError: One was made with other parameters.
        """
        from swifti2v.training.stage_transition import describe_sample

        records = (
            (s.id, self.store.find(s.id, {**self.parameters, **describe_sample(s)}))
            for s in samples
        )
        return {sample_id: record for sample_id, record in records if record is not None}

    def describe(self, listed: "Manifest", num_finished: int) -> dict[str, Any]:
        """What a run would do, as plain values."""
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
        listed: "Manifest",
        finished: dict[str, dict[str, Any]],
        interruption: Interruption,
    ) -> Outcome:
        """Make what is not finished yet.

        Raises:
            KeyboardInterrupt: It was stopped; a note says how it goes on.
            SwiftI2VError: It cannot go on, with the same note.
        """
        from swifti2v.training.manifest import Reject
        from swifti2v.training.stage_transition import make_row

        began = said = time.monotonic()
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
                if (now := time.monotonic()) - said > REPORT_SECONDS:
                    said = now
                    typer.echo(
                        f"{number} of {len(listed.samples)} clips, {len(rejects)} refused, "
                        f"{now - began:.0f} s",
                        err=True,
                    )
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

    def _make(self, sample: "Sample", interruption: Interruption) -> "dict[str, Any] | Reject":
        """Make and store one sample, and return its record."""
        import torch

        from swifti2v.training.manifest import Reject
        from swifti2v.training.stage_transition import (
            describe_sample,
            make_transition_sample,
            read_window,
        )

        window = read_window(sample, self.config)
        if isinstance(window, Reject):
            return window
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

    def _origin(self, sample: "Sample") -> dict[str, Any]:
        """Where a sample comes from and what made it; none of this decides it."""
        from importlib.metadata import version

        return {
            "source": sample.media.name,
            "model": self.model,
            "device": self.pipe.components.device.type,
            "versions": {
                "swifti2v": __version__,
                **{name: version(name) for name in ("torch", "diffusers", "av")},
            },
        }


def _finish(outcome: Outcome, path: Path) -> dict[str, Any]:
    """Write the manifest and give the account of the run.

    Raises:
        InputError: There were clips, and none could be used.
    """
    from swifti2v.training.transition_store import write_text_whole

    for reject in outcome.rejects:
        typer.echo(f"refused {reject.id}: {reject.reason}", err=True)
    if outcome.rows:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in outcome.rows]
        write_text_whole(path, "".join(lines))
    elif outcome.rejects:
        raise InputError(
            f"no sample was made: all {len(outcome.rejects)} clips were refused, the first for: "
            f"{outcome.rejects[0].reason}"
        )
    records, num_made = outcome.records, outcome.num_made
    return {
        "manifest": str(path.resolve()) if records else None,
        "num_made": num_made,
        "num_kept": len(records) - num_made,
        "rejects": [asdict(reject) for reject in outcome.rejects],
        "psnr": round(fmean(r["psnr"] for r in records), 3) if records else None,
        "still_psnr": round(fmean(r["still_psnr"] for r in records), 3) if records else None,
        "seconds": round(outcome.seconds, 3),
    }


def _to_lines(report: dict[str, Any]) -> list[str]:
    if report["manifest"] is None:
        return ["no clip of the manifest belongs to this part; nothing was written"]
    causes = Counter(reject["reason"].partition(": ")[0] for reject in report["rejects"])
    return [
        report["manifest"],
        f"{report['num_made']} samples made, {report['num_kept']} kept, {len(report['rejects'])} "
        f"refused, {report['seconds']:.1f} s",
        *(f"refused, {cause}: {count}" for cause, count in causes.most_common()),
        f"mean PSNR to the true clips {report['psnr']:.1f} dB; of their still first frames "
        f"{report['still_psnr']:.1f} dB",
    ]


def _warn_of_lost_motion(report: dict[str, Any]) -> None:
    if report["manifest"] is not None and report["psnr"] < report["still_psnr"] + LEAST_GAIN:
        typer.echo(
            "note: Stage I did not keep the motion: its clips are hardly nearer to the true ones "
            "than their still first frames; choose a lower --sigma or another model",
            err=True,
        )


def _parse_sigma(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        return float(low), float(high or low)
    except ValueError:
        raise InputError(f"sigma {text!r} is not LOW:HIGH or one number, as 0.2:0.6") from None


def _find_loras(texts: list[str]) -> "list[LoraSource]":
    from swifti2v.models.lora import parse_lora_argument
    from swifti2v.models.sources import LoraSource

    loras = []
    for text in texts:
        path, strength = parse_lora_argument(text)
        if not path.exists():
            raise InputError(f"LoRA {path} does not exist; check the path")
        loras.append(LoraSource(path=str(path), strength=strength))
    return loras


def _resolve(model: str, overrides: list[str], flags: dict[str, int | None]) -> GenerationConfig:
    """Settings of the model, with ``--set`` and then the options on top."""
    from swifti2v.models.sources import find_model

    values = find_model(model)[0].settings
    for text in overrides:
        asked = parse_override(text)
        parse_config(GenerationConfig, asked, f"--set {text}")
        values = merge(values, asked)
    given = {name: value for name, value in flags.items() if value is not None}
    return parse_config(GenerationConfig, merge(values, given), "settings")


def _load(
    model: str, device: str | None, placement: Placement, loras: "list[LoraSource]"
) -> "SwiftI2VPipeline":
    import torch

    from swifti2v.pipelines.two_stage import SwiftI2VPipeline

    try:
        place = None if device is None else torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is unknown; use cpu, cuda or cuda:N") from None
    if place is not None and place.type == "cuda":
        count = torch.cuda.device_count()
        if (place.index or 0) >= count:
            raise ConfigError(f"device {device!r} is not there: {count} CUDA devices are; use cpu")
    return SwiftI2VPipeline.from_pretrained(
        model, device=place, placement=placement.value, loras={"stage1": loras}
    )
