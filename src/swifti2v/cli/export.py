"""``swifti2v models export``, ``export-stage2`` and ``convert-lora``: models as files for others."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swifti2v.cli.failures import Interruption, exit_codes
from swifti2v.cli.options import Dtype

if TYPE_CHECKING:
    import torch

    from swifti2v.models.sources import LoraSource
    from swifti2v.models.transformer import SegmentTransformer3DModel

STAGE2 = "stage2_transformer"


class Style(StrEnum):
    """LoRA formats of ``swifti2v.models.lora_export``."""

    PEFT = "peft"
    ORIGINAL = "original"
    DIFFSYNTH = "diffsynth"
    KOHYA = "kohya"


ModelArgument = Annotated[
    str, typer.Argument(help="nano, paper, a YAML preset, a directory or a Hub id.")
]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Of the written weights; parts that must stay float32 do.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")]


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to make.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[stage1=|stage2=]PATH[:STRENGTH]",
            help="LoRA to merge, Stage I's if not said. May be given more than once.",
        ),
    ] = None,
    dtype: DtypeOption = Dtype.BFLOAT16,
    debug: DebugOption = False,
) -> None:
    """Write a whole model as a directory, with its LoRAs and checkpoints merged.

    Prints the directory; --model of the other commands takes it, on any machine.
    """
    with exit_codes(debug=debug), Interruption().catch(), _directory(output) as unfinished:
        import torch

        from swifti2v.models.loading import load_components, save_components

        loras = _parse_loras(lora or [])
        components, settings = load_components(
            model, getattr(torch, dtype.value), torch.device("cpu"), loras
        )
        save_components(components, settings, unfinished)
    typer.echo(str(output.resolve()))


def export_stage2(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help=".safetensors file to make.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:STRENGTH]", help="LoRA to merge. May be given more than once."),
    ] = None,
    dtype: DtypeOption = Dtype.BFLOAT16,
    debug: DebugOption = False,
) -> None:
    """Write a model's Stage II transformer as one file, with its LoRAs and checkpoint merged.

    Prints the file; a preset takes it as the weights of stage2_transformer. Its configuration is
    in the file's metadata.
    """
    with exit_codes(debug=debug), Interruption().catch():
        _require_new_file(output)
        import torch

        from swifti2v import __version__
        from swifti2v.models.lora_export import write_tensors

        loras = _parse_loras([f"stage2={text}" for text in lora or []])["stage2"]
        transformer = _load_stage2(model, getattr(torch, dtype.value), loras)
        metadata = {
            "swifti2v_version": __version__,
            "swifti2v_model": model,
            "config": transformer.to_json_string(),
        }
        write_tensors(transformer.state_dict(), output, metadata)
        typer.echo(str(output.resolve()))


def convert_lora(
    source: Annotated[Path, typer.Argument(help="LoRA file of any format that --lora takes.")],
    output: Annotated[Path, typer.Option("-o", "--output", help=".safetensors file to make.")],
    style: Annotated[
        Style,
        typer.Option(
            help="peft for diffusers, original for ComfyUI and LightX2V, diffsynth for "
            "DiffSynth-Studio, kohya for musubi-tuner."
        ),
    ],
    debug: DebugOption = False,
) -> None:
    """Write a LoRA in another format, with the same effect on the weights.

    Prints the file. What the format has no place for is refused, not dropped.
    """
    with exit_codes(debug=debug), Interruption().catch():
        _require_new_file(output)
        from swifti2v.models import lora_export

        done = lora_export.convert_lora(source, output, style.value)
        typer.echo(
            f"{done.source_style} to {style.value}: {done.num_layers} layers, {done.num_full} full "
            "differences",
            err=True,
        )
        typer.echo(str(output.resolve()))


def _parse_loras(texts: Sequence[str]) -> dict[str, list["LoraSource"]]:
    """LoRAs of each stage.

    Raises:
        InputError: A text is not ``PATH[:STRENGTH]``, or there is no such file.
    """
    from swifti2v.errors import InputError
    from swifti2v.models.lora import parse_lora_argument
    from swifti2v.models.sources import LoraSource

    loras: dict[str, list[LoraSource]] = {"stage1": [], "stage2": []}
    for text in texts:
        stage = "stage2" if text.startswith("stage2=") else "stage1"
        path, strength = parse_lora_argument(text.removeprefix(f"{stage}="))
        if not path.exists():
            raise InputError(f"LoRA {path} does not exist; check the path")
        loras[stage].append(LoraSource(path=str(path.resolve()), strength=strength))
    return loras


def _load_stage2(
    model: str, dtype: "torch.dtype", loras: Sequence["LoraSource"]
) -> "SegmentTransformer3DModel":
    """The one component, without the other, larger ones."""
    from swifti2v.models.checkpoints import load_weights, read_state_dict
    from swifti2v.models.conversion import wan_transformer_state_dict
    from swifti2v.models.loading import load_segment_transformer
    from swifti2v.models.lora import merge_lora
    from swifti2v.models.sources import find_model, resolve

    index, root = find_model(model)
    source = index.components[STAGE2]
    place = resolve(source.source, source.subfolder, root)
    weights = None if source.weights is None else resolve(source.weights, "", root)
    merged = [(resolve(lora.path, "", root), lora.strength) for lora in (*source.loras, *loras)]
    transformer = load_segment_transformer(place, dtype).requires_grad_(False)
    if weights is not None:
        state: Any = wan_transformer_state_dict(read_state_dict(weights))
        load_weights(transformer, state, source=str(weights))
    for path, strength in merged:
        merge_lora(transformer, path, strength)
    return transformer


def _require_new_file(path: Path) -> None:
    from swifti2v.errors import InputError

    if path.suffix != ".safetensors":
        raise InputError(f"output {path} must end in .safetensors")
    if path.exists():
        raise InputError(f"output {path} is there already; choose another name")
    _require_folder(path.parent)


def _require_folder(folder: Path) -> None:
    from swifti2v.errors import InputError

    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(f"folder {folder} is not there or not writable; choose another one")


@contextmanager
def _directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name only when the block is through.

    Raises:
        InputError: There is something of that name, or it cannot be made.
    """
    from swifti2v.errors import InputError

    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"output {path} is there already; choose another name")
    _require_folder(path.parent)
    unfinished = path.with_name(f"{path.name}.writing")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        yield unfinished
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
