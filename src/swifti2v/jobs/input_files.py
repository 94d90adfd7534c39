"""Files of a run that is repeated or continued, found where it was started or beside what it wrote."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

from swifti2v.errors import InputError
from swifti2v.models.loading.sources import LoraSource
from swifti2v.storage import hash_file

LEVELS = 3
"""Folders above the video or the work dir that are searched: a run is started from one of them."""


class InputFiles:
    """Where the inputs of a run are looked for.

    Args:
        like: The video to repeat.
        work_dir: Of the run to continue.
    """

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
        """The file that a run was made with.

        Args:
            name: Its path as it was given then.
            sha256: Of its content; a file of another one is not taken.
            remedy: What to do if it is nowhere.
            hash_of: Content of a candidate that exists; None if it is none.

        Raises:
            InputError: Listing where it was looked for.
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
        """The file that a command line names: as it is, or one of the run that is continued.

        Args:
            path: Of the command line.
            known: SHA-256 of the run's files.

        Raises:
            InputError: It is not in the current folder, and none of the run's files is found.
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
        """A LoRA with the path of the file that is found, see ``named``, and its hash.

        Raises:
            InputError: It is not there.
        """
        path = self.named(Path(lora.path), known)
        if not path.exists():
            raise InputError(f"LoRA {path} does not exist; check the path")
        return replace(lora, path=str(path), sha256=hash_file(path))

    def settings_file(self, path: Path) -> Path:
        """A file of settings: as named, or the first of that name; the run's plan judges it."""
        return next((item for item in self._candidates(path) if item.exists()), path)

    def _candidates(self, path: Path) -> Iterator[Path]:
        """As given, then from the folders that hold what the run wrote, then beside it."""
        found = [path]
        if not path.is_absolute():
            found += [
                folder / path
                for beside in self._beside
                for folder in (beside, *list(beside.parents)[:LEVELS])
            ]
        found += [beside / path.name for beside in self._beside]
        seen: set[Path] = set()
        for item in found:
            if item.absolute() not in seen:
                seen.add(item.absolute())
                yield item
