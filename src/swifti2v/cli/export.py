"""``swifti2v models export``, ``export-stage2`` and ``convert-lora``: models as files for others."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.loras import LORA_FORM, LORA_HELP, STAGED_LORA_FORM, parse_lora
from swifti2v.cli.options import Dtype
from swifti2v.jobs.input_files import InputFiles
from swifti2v.jobs.interruption import Interruption
from swifti2v.jobs.paths import require_folder, require_new_file
from swifti2v.storage import whole_directory

STAGE2 = "stage2_transformer"

models_app = typer.Typer(help="Find, fetch, export and convert models.", no_args_is_help=True)


class Style(StrEnum):
    """LoRA formats of ``swifti2v.models.lora.export``."""

    PEFT = "peft"
    ORIGINAL = "original"
    DIFFSYNTH = "diffsynth"
    KOHYA = "kohya"


ModelArgument = Annotated[
    str, typer.Argument(help="Model: nano, paper, a YAML preset, a directory or a Hub id.")
]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Number type of the written weights; some parts must stay float32.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")]


@models_app.command()
def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to make.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar=STAGED_LORA_FORM, help=f"LoRA to merge, by default into Stage I; {LORA_HELP}"
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

        from swifti2v.models.loading.components import load_components, save_components

        loras = [InputFiles().lora(parse_lora(text)) for text in lora or []]
        components, settings = load_components(
            model, getattr(torch, dtype.value), torch.device("cpu"), loras
        )
        for line in components.describe_loras():
            typer.echo(f"note: {line}", err=True)
        save_components(components, settings, unfinished)
    typer.echo(str(output.resolve()))


@models_app.command()
def export_stage2(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help=".safetensors file to make.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar=LORA_FORM, help=f"LoRA to merge; {LORA_HELP}"),
    ] = None,
    dtype: DtypeOption = Dtype.BFLOAT16,
    debug: DebugOption = False,
) -> None:
    """Write a model's Stage II transformer as one file, with its LoRAs and checkpoint merged.

    Prints the file; a preset takes it as the weights of stage2_transformer. Its configuration is
    in the file's metadata.
    """
    with exit_codes(debug=debug), Interruption().catch():
        require_new_file(output, ".safetensors")
        import torch

        from swifti2v import __version__
        from swifti2v.models.loading.components import load_component, require_unpacked
        from swifti2v.models.loading.sources import find_model
        from swifti2v.models.weights.files import write_tensors

        loras = [InputFiles().lora(parse_lora(f"stage2={text}")) for text in lora or []]
        index, root = find_model(model)
        # The one component, without the other, larger ones.
        transformer = load_component(
            STAGE2,
            index.components[STAGE2],
            root,
            getattr(torch, dtype.value),
            torch.device("cpu"),
            loras,
        )
        require_unpacked(STAGE2, transformer)
        metadata = {
            "swifti2v_version": __version__,
            "swifti2v_model": model,
            "config": transformer.to_json_string(),
        }
        write_tensors(transformer.state_dict(), output, metadata)
        typer.echo(str(output.resolve()))


@models_app.command()
def convert_lora(
    source: Annotated[Path, typer.Argument(help="LoRA file of any format that --lora takes.")],
    output: Annotated[Path, typer.Option("-o", "--output", help=".safetensors file to make.")],
    style: Annotated[
        Style,
        typer.Option(
            help="Key style: peft for diffusers, original for ComfyUI and LightX2V,  diffsynth for "
            "DiffSynth-Studio, kohya for musubi-tuner."
        ),
    ],
    debug: DebugOption = False,
) -> None:
    """Write a LoRA in another format, with the same effect on the weights.

    Prints the file. Parts that the format cannot hold are refused, not dropped.
    """
    with exit_codes(debug=debug), Interruption().catch():
        require_new_file(output, ".safetensors")
        from swifti2v.models.lora import export as lora_export

        done = lora_export.convert_lora(source, output, style.value)
        typer.echo(
            f"{done.source_style} to {style.value}: {done.num_layers} layers, {done.num_full} full "
            "differences",
            err=True,
        )
        typer.echo(str(output.resolve()))


@contextmanager
def _directory(path: Path) -> Iterator[Path]:
    """Make a directory to fill, which gets its name when the block ends.

    Raises:
        InputError: The name is taken, or the directory cannot be made.
    """
    from swifti2v.errors import InputError

    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"output {path} exists already; choose another name")
    require_folder(path.parent)
    with whole_directory(path) as unfinished:
        yield unfinished
