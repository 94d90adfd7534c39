"""Weights that a run needs, looked for before PyTorch is loaded."""

from swifti2v.cli.options import ClipOptions
from swifti2v.models.availability import RemoteFiles, find_missing, require_obtainable
from swifti2v.models.sources import find_model


def find_missing_weights(model: str, *, with_stage1: bool) -> list[RemoteFiles]:
    """Files of a model that are not on this machine, see ``find_missing``.

    Args:
        model: See ``swifti2v.models.sources.find_model``.
        with_stage1: Whether Stage I runs.
    """
    index, root = find_model(model)
    roles = [r for r in index.components if with_stage1 or not r.startswith(("stage1", "image"))]
    return find_missing(index, root, roles)


def require_weights(options: ClipOptions) -> None:
    """Refuse a new run of a named model whose weights are neither here nor to be had.

    Raises:
        LoadingError: With the commands that download them.
    """
    if options.model is None or options.dry_run or options.resume:
        return  # that of a run to continue may lie beside it
    missing = find_missing_weights(options.model, with_stage1=options.command == "generate")
    require_obtainable(options.model, missing)
