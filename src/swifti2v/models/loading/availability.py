"""Find the weights of a model that are not on this machine, before any work."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from swifti2v.errors import LoadingError
from swifti2v.models.loading.models_dir import models_dir
from swifti2v.models.loading.sources import (
    ModelIndex,
    find_here,
    find_model,
    is_on_hub,
    resolve,
    split_source,
)
from swifti2v.models.weights.headers import require_undamaged

TIMEOUT_SECONDS = 10


class RemoteFiles(NamedTuple):
    """Files of a Hub repository."""

    repo_id: str
    pattern: str
    """Pattern for ``hf download --include``; empty for the whole repository."""


def find_missing(index: ModelIndex, root: Path, roles: Iterable[str]) -> list[RemoteFiles]:
    """Find the files that must be downloaded first.

    Args:
        index: Index of the model.
        root: Folder from which its relative paths start.
        roles: Components that are needed.

    Raises:
        LoadingError: A path of this machine does not exist.
    """
    missing: list[RemoteFiles] = []
    for role in roles:
        source = index.components[role]
        needed: list[tuple[str, str, tuple[str, ...]]] = [
            (source.source, source.subfolder, source.also)
        ]
        needed += [(p, "", ()) for p in (source.weights, *(x.path for x in source.loras)) if p]
        for name, subfolder, also in needed:
            if not is_on_hub(name, root):
                resolve(name, subfolder, root)
                continue
            here = find_here(name, subfolder, root, also)
            if here is not None:
                require_undamaged(here)
                continue
            files = RemoteFiles(*split_source(name, subfolder))
            if files not in missing:
                missing.append(files)
    return missing


def find_missing_weights(model: str, *, with_stage1: bool) -> list[RemoteFiles]:
    """Files of a model that are not on this machine, see ``find_missing``.

    Args:
        model: See ``swifti2v.models.loading.sources.find_model``.
        with_stage1: Whether Stage I runs.
    """
    index, root = find_model(model)
    roles = [r for r in index.components if with_stage1 or not r.startswith(("stage1", "image"))]
    return find_missing(index, root, roles)


def require_obtainable(name: str, missing: Sequence[RemoteFiles]) -> None:
    """Refuse to start when something must be downloaded and the Hub cannot be reached.

    Raises:
        LoadingError: With the commands that download it.
    """
    if not missing:
        return
    from huggingface_hub import HfApi

    try:
        for repo_id in dict.fromkeys(files.repo_id for files in missing):
            HfApi().model_info(repo_id, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # of the HTTP library that the Hub's client uses, which varies
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        folder = models_dir()
        hint = f"; swifti2v models scan {folder} shows what that folder has" if folder else ""
        raise LoadingError(
            f"weights of {name!r} are not on this machine, and the Hub does not give them "
            f"({reason}); get them with: {'; '.join(download_commands(missing))}{hint}"
        ) from None


def download_commands(missing: Sequence[RemoteFiles]) -> list[str]:
    """``hf download`` for each repository."""
    by_repo: dict[str, list[str]] = {}
    for files in missing:
        by_repo.setdefault(files.repo_id, []).append(files.pattern)
    return [_command(repo_id, patterns) for repo_id, patterns in by_repo.items()]


def _command(repo_id: str, patterns: Sequence[str]) -> str:
    if "" in patterns:
        return f"hf download {repo_id}"
    if all(Path(pattern).suffix for pattern in patterns):
        return f"hf download {repo_id} {' '.join(patterns)}"
    folders = " ".join(f'"{pattern}/*"' for pattern in patterns)
    return f"hf download {repo_id} --include {folders}"
