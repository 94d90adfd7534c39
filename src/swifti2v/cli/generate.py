"""``swifti2v generate``: a photo and a prompt to a video."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from swifti2v.cli.failures import ERROR, exit_codes
from swifti2v.cli.options import GenerateOptions, takes_options
from swifti2v.cli.weights import require_weights
from swifti2v.jobs.request import RANDOM, ClipRequest

if TYPE_CHECKING:
    from swifti2v.batch.rows import ClipRow

SHARED = ("prompt", "model", "fit", "background", "truncate_prompt", "codec", "crf", "ten_bit")
"""Fields that a request and a row have alike."""


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
        ("--context-parallel", options.context_parallel),
        ("--json", options.as_json),
    ):
        if value:
            raise typer.BadParameter(f"{flag} goes with one photo", param_hint=flag)
    require_weights(options)
    from swifti2v.batch.rows import Machine, require_distinct
    from swifti2v.cli.batch_run import run_batch

    request = options.to_request(photos[0])
    rows = [_make_row(request, photo) for photo in photos]
    require_distinct(rows)
    machine = Machine(
        device=request.device,
        dtype=request.dtype,
        placement=request.placement,
        memory=request.memory,
    )
    if run_batch(rows, str(options.output), machine, None, dry_run=options.dry_run):
        raise typer.Exit(ERROR)


def _make_row(request: ClipRequest, photo: Path) -> "ClipRow":
    """The row of a photo, asked for as in a request of another one."""
    from swifti2v.batch.rows import make_row
    from swifti2v.jobs.layers import merge_layers

    own = {name: getattr(request, name) for name in SHARED}
    own |= {"image": str(photo), "loras": [asdict(lora) for lora in request.loras]}
    own["seed"] = None if request.seed == RANDOM else request.seed
    return make_row(own, str(photo), Path(), merge_layers(request.layers))
