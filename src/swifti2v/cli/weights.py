"""Weights that a run needs, looked for before PyTorch is loaded."""

from swifti2v.cli.options import ClipOptions
from swifti2v.models.loading.availability import find_missing_weights, require_obtainable


def require_weights(options: ClipOptions) -> None:
    """Refuse a new run of a named model whose weights are neither here nor to be had.

    Raises:
        LoadingError: Weights are missing; the message has the commands that download them.
    """
    if options.model is None or options.dry_run or options.resume:
        return  # that of a run to continue may lie beside it
    missing = find_missing_weights(options.model, with_stage1=options.command == "generate")
    require_obtainable(options.model, missing)
