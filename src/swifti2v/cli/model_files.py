"""``swifti2v models scan`` and ``download``: the files of a preset that are here, and the others."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.models_dir import ModelsDir
from swifti2v.cli.throttle import Throttle
from swifti2v.shipped import shipped_configs

if TYPE_CHECKING:
    from swifti2v.models.loading.scanning import Item, Scan

PRESET_HELP = "paper, vibe, another preset that ships, or a YAML file."


def scan(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder with models, such as ComfyUI/models or a cache of the Hub."),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"Preset to look for (default all that ship): {PRESET_HELP}"),
    ] = None,
    with_hashes: Annotated[
        bool, typer.Option("--hash", help="Hash the files: minutes; finds renamed ones.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False,
) -> None:
    """Show which files of each preset a folder has, and how to get the others.

    Files are told by name, size and keys. --models-dir of the other commands uses them.
    """
    with exit_codes(debug=debug):
        import json
        from dataclasses import asdict

        from swifti2v.errors import InputError
        from swifti2v.models.loading.scanning import Scanner

        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; name one such as ComfyUI/models")
        scanner = Scanner(folder, hashes=with_hashes)
        scans = [scanner.scan(name) for name in model or list_presets()]
        if as_json:
            typer.echo(json.dumps([asdict(found) for found in scans]))
        else:
            typer.echo("\n".join(line for found in scans for line in describe(found, folder)))


def list_presets() -> list[str]:
    """Names of the presets that ship."""
    folder = "presets/"
    return [name.removeprefix(folder) for name in shipped_configs() if name.startswith(folder)]


def describe(found: "Scan", folder: Path) -> Iterator[str]:
    """A scan for people: a line for each file, then each variant."""
    from swifti2v.models.loading.sources import in_variant

    yield f"{found.model}"
    for item in found.items:
        yield f"  {item.component:28}{item.variant:10}{_describe(item, folder)}"
    for variant, lacking in found.lacking.items():
        name = in_variant(found.model, variant)
        if not lacking:
            yield f"  complete: --model {name} --models-dir {folder}"
            continue
        yield (
            f"  {name} lacks {', '.join(lacking)}: swifti2v models download {found.model} "
            f"--variant {variant} --models-dir {folder}"
        )
    yield ""


def _describe(item: "Item", folder: Path) -> str:
    from swifti2v.units import format_bytes

    parts: list[Any] = [f"{item.status:10}"]
    if item.path:
        path = Path(item.path)
        parts.append(path.relative_to(folder) if path.is_relative_to(folder) else path)
    if item.num_bytes is not None:
        parts.append(format_bytes(item.num_bytes))
    parts += [text for text in (item.form, item.sha256, item.note, item.command) if text]
    return "  ".join(map(str, parts))


def download(
    model: Annotated[str, typer.Argument(help=f"Preset: {PRESET_HELP}")],
    variant: Annotated[
        str,
        typer.Option(help="Files to take: bf16, or fp8, gguf-q4 ... where the preset has them."),
    ] = "bf16",
    models_dir: ModelsDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and the total, and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False,
) -> None:
    """Fetch what a preset needs and is not here yet into the Hub's cache.

    The total and the free disk are checked before it starts. Stopped, the same command goes on.
    """
    del models_dir  # read from the environment
    with exit_codes(debug=debug):
        from huggingface_hub import is_offline_mode

        from swifti2v.models.loading import downloading
        from swifti2v.models.loading.availability import download_commands, find_missing_weights
        from swifti2v.models.loading.sources import in_variant
        from swifti2v.units import format_bytes

        name = in_variant(model, variant)
        missing = find_missing_weights(name, with_stage1=True)
        if dry_run and is_offline_mode():
            typer.echo("offline: sizes are not known", err=True)
            typer.echo("\n".join(download_commands(missing)))
            return
        files = downloading.list_downloads(missing)
        total = format_bytes(sum(file.missing_bytes() for file in files))
        typer.echo(f"{name}: {len(files)} files, {total} to download", err=True)
        if dry_run:
            for file in files:
                typer.echo(f"{file.repo_id}/{file.file}\t{file.num_bytes}")
            return
        downloading.require_room(files)
        throttle = Throttle()
        downloading.download(files, lambda done: throttle.say(f"{format_bytes(done)} of {total}"))
        typer.echo(f"complete: --model {name}")
