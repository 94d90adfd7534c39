"""``swifti2v generate``: a photo and a prompt to a video."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from swifti2v.cli.failures import ERROR, exit_codes
from swifti2v.cli.options import GenerateOptions, takes_options
from swifti2v.cli.weights import require_weights

if TYPE_CHECKING:
    from swifti2v.batch.rows import ClipRow


@takes_options(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Turn a photo and a prompt into a video, one segment after the other."""
    with exit_codes(debug=options.debug):
        photos = options.images or []
        if len(photos) > 1:
            _generate_many(options, photos)
            return
        request = options.to_request(photos[0] if photos else None)
        require_weights(options)
        from swifti2v.cli.run import run_command  # torch and diffusers take seconds to import

        run_command(request, dry_run=options.dry_run, as_json=options.as_json)


def _generate_many(options: GenerateOptions, photos: Sequence[Path]) -> None:
    """Make a video of each photo, as ``swifti2v batch`` does."""
    for flag, value in (
        ("--like", options.like),
        ("--work-dir", options.work_dir),
        ("--resume", options.resume),
        ("--contact-sheet", options.contact_sheet),
        ("--preview-decoder", options.preview_decoder),
        ("--no-metadata", options.no_metadata),
        ("--json", options.as_json),
    ):
        if value:
            raise typer.BadParameter(f"{flag} goes with one photo", param_hint=flag)
    require_weights(options)
    from swifti2v.batch.rows import Machine, require_distinct
    from swifti2v.cli.batch_run import run_batch

    rows = [_make_row(options, photo) for photo in photos]
    require_distinct(rows)
    request = options.to_request(photos[0])
    machine = Machine(
        device=request.device,
        dtype=request.dtype,
        placement=request.placement,
        memory=request.memory,
    )
    if run_batch(rows, str(options.output), machine, None, dry_run=options.dry_run):
        raise typer.Exit(ERROR)


def _make_row(options: GenerateOptions, photo: Path) -> "ClipRow":
    from swifti2v.batch.rows import make_row
    from swifti2v.jobs.layers import merge_layers
    from swifti2v.jobs.request import RANDOM

    request = options.to_request(photo)
    values = {
        "image": str(photo),
        "prompt": request.prompt,
        "model": request.model,
        "seed": None if request.seed == RANDOM else request.seed,
        "fit": request.fit,
        "background": request.background,
        "loras": [asdict(lora) for lora in request.loras],
        "truncate_prompt": request.truncate_prompt,
        "codec": request.codec,
        "crf": request.crf,
        "ten_bit": request.ten_bit,
    }
    return make_row(values, str(photo), Path(), merge_layers(request.layers))
