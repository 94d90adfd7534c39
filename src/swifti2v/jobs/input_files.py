"""Files of a repeated or continued run, found where it was started or beside its outputs."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

from swifti2v.errors import InputError
from swifti2v.models.loading.sources import LoraSource
from swifti2v.storage import hash_file

LEVELS = 3
"""Folders above the video or the work dir that are searched: a run is started from one of them."""


class InputFiles:
    """Search for the inputs of a run beside the video to repeat and in the work dir to continue."""

    def __init__(self, like: Path | None = None, work_dir: Path | None = None) -> None:
        beside = [*([like.absolute().parent] if like else []), *([work_dir] if work_dir else [])]
        self._beside = [folder.absolute() for folder in beside]

    def recorded(
        self,
        name: str,
        sha256: str | None,
        remedy: str,
        hash_of: Callable[[Path], str | None] = hash_file,
    ) -> Path:
        """Find an input file of an earlier run; files with another SHA-256 are passed over.

        ``hash_of`` is None for a candidate that is not such a file.

        Raises:
            InputError: The file is not found; the message lists the searched places.
        """
        seen: list[str] = []
        for candidate in self._candidates(Path(name)):
            if candidate.exists():
                if hash_of(candidate) == sha256:
                    return candidate
                seen.append(f"{candidate} (has changed since, or is another file)")
            else:
                seen.append(str(candidate))
        raise InputError(f"{name} is not found; {remedy}; looked for it as {', '.join(seen)}")

    def named(self, path: Path, known: Collection[str | None]) -> Path:
        """Find a file that the command line names: itself, or one of the continued run by its hash.

        Raises:
            InputError: The file does not exist, and no file of the run matches.
        """
        if path.exists() or not known:
            return path
        candidates = list(self._candidates(path))
        for candidate in candidates:
            if candidate.exists() and hash_file(candidate) in known:
                return candidate
        places = ", ".join(map(str, candidates))
        raise InputError(
            f"{path} does not exist, nor one that the run was made with; looked for it as {places}"
        )

    def lora(self, lora: LoraSource, known: Collection[str | None] = ()) -> LoraSource:
        """Return a LoRA with the path of the file that is found, see ``named``, and its hash.

        Raises:
            InputError: The LoRA does not exist.
        """
        path = self.named(Path(lora.path), known)
        if not path.exists():
            raise InputError(f"LoRA {path} does not exist; check the path")
        return replace(lora, path=str(path), sha256=hash_file(path))

    def settings_file(self, path: Path) -> Path:
        """Find a file of settings: the named one, or the first of that name."""
        return next((item for item in self._candidates(path) if item.exists()), path)

    def _candidates(self, path: Path) -> Iterator[Path]:
        """Yield the path itself, then in the folders above the run's outputs, then beside them."""
        places = [path]
        if not path.is_absolute():
            places += [
                folder / path
                for beside in self._beside
                for folder in (beside, *list(beside.parents)[:LEVELS])
            ]
        places += [beside / path.name for beside in self._beside]
        seen: set[Path] = set()
        for item in places:
            if item.absolute() not in seen:
                seen.add(item.absolute())
                yield item
