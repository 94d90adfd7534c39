"""Measures a model on held-out files and writes the tables of its card: ``python -m runs.card``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.options import RunDtype
from swifti2v.cli.seeds import choose_seed
from swifti2v.jobs.devices import find_device, find_dtype
from swifti2v.storage import write_whole

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def card(  # noqa: PLR0913 - a command's options are its arguments
    clips: Annotated[Path, typer.Option(help="Folder with video files.")],
    photos: Annotated[Path, typer.Option(help="Folder with photos.")],
    held_out: Annotated[
        list[str],
        typer.Option(help="Name of a clip or photo that no training used; give each one."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Card to update; only the part between its markers is replaced."
        ),
    ],
    moving: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out clip whose camera moves; the others count as still. Give each one."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Model: nano, a directory or a Hub id.")] = "nano",
    num_frames: Annotated[int, typer.Option(help="Frames of every clip, 4k + 1.")] = 33,
    height: Annotated[int, typer.Option(help="Output height in pixels.")] = 384,
    width: Annotated[int, typer.Option(help="Output width in pixels.")] = 640,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise; -1 draws one.")] = 0,
    further_photos: Annotated[
        int,
        typer.Option(
            min=0, help="Number of photos for which also roll, dolly, orbit and more are measured."
        ),
    ] = 3,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A.B=C",
            help="Setting with which Stage II is measured as well. May be repeated.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[
        RunDtype | None,
        typer.Option(help="Number type of the weights, as in generate; auto measures a CPU."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all measurements as one JSON object.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False,
) -> None:
    """Measure codec, both stages and cost on held-out files; write the card's tables, print the marks."""
    with exit_codes(debug=debug):
        import torch  # it and diffusers take seconds to import

        from runs.card.inputs import find_held_out, find_moving, read_clip, read_photo
        from runs.card.marks import describe_card
        from runs.card.measuring import CardInputs, add_settings, measure_card
        from runs.card.tables import read_card, render_marks, render_tables, replace_tables
        from swifti2v.pipelines.two_stage import SwiftI2VPipeline

        replace_tables(read_card(output), "")  # refuse a card without markers before any work
        clip_paths, photo_paths = find_held_out(held_out, clips, photos)
        kind = find_dtype(dtype and dtype.value, find_device(device))
        pipe = SwiftI2VPipeline.from_pretrained(
            model, device=device, torch_dtype=None if kind is None else getattr(torch, kind)
        )
        config = pipe.configure(num_frames=num_frames, height=height, width=width)
        pipe.require_fit(config)
        inputs = CardInputs(
            model=model,
            config=config,
            variants=add_settings(config, variant or []),
            seed=choose_seed(seed),
            num_further=further_photos,
            moving=find_moving(moving or [], clip_paths),
            clips={path.stem: read_clip(path, config) for path in clip_paths},
            photos={path.stem: read_photo(path, config) for path in photo_paths},
        )
        measured = measure_card(pipe, inputs)
        write_whole(output, replace_tables(read_card(output), render_tables(measured)))
        if as_json:
            typer.echo(json.dumps(describe_card(measured), allow_nan=False))
        else:
            typer.echo(f"{render_marks(measured)}\n{output.resolve()}")


if __name__ == "__main__":
    app()
