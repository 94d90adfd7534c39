"""Find in a folder what a preset needs: by name, size, keys and, if asked, by hash."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from swifti2v.errors import LoadingError, SwiftI2VError
from swifti2v.models.loading.architectures import KINDS, Architecture, recall_architecture
from swifti2v.models.loading.availability import RemoteFiles, download_commands
from swifti2v.models.loading.models_dir import file_names, find_in, find_unfinished, list_files
from swifti2v.models.loading.recognition import find_difference, identify, read_content
from swifti2v.models.loading.sources import (
    WHOLE,
    ComponentSource,
    ModelIndex,
    find_here,
    find_model,
    is_on_hub,
    split_source,
    split_variant,
)
from swifti2v.models.weights.headers import GGUF, require_undamaged
from swifti2v.storage import hash_file

Status = Literal["found", "missing", "damaged", "another model", "unclear"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One thing that a preset needs."""

    component: str
    """Role of the component, or ``LoRA of`` it."""
    variant: str
    """Variant whose file it is; ``WHOLE`` for the component itself."""
    status: Status
    source: str
    """Hub id and path of what is needed."""
    path: str | None = None
    """Path of what was found."""
    num_bytes: int | None = None
    """Size of what was found; of a missing file that of the preset, where it says one."""
    form: str | None = None
    """Form of the weights found, such as ``float8_e4m3fn, scaled``."""
    sha256: str | None = None
    """Hash of a single file, where it was asked for."""
    note: str = ""
    """Reason, or what else was found."""
    command: str | None = None
    """Command that fetches what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """Files of one preset in a folder."""

    model: str
    items: tuple[Item, ...]
    lacking: Mapping[str, tuple[str, ...]]
    """Components that each variant lacks; empty for one that can be run."""


class Scanner:
    """Searches one folder for the files of presets.

    Args:
        folder: Such as ``ComfyUI/models`` or a cache of the Hub.
        hashes: Whether single files are hashed, which reads all of them.
    """

    def __init__(self, folder: Path, *, hashes: bool = False) -> None:
        self.folder, self.hashes = folder, hashes
        self.files = list_files(folder)
        self._content = cache(read_content)
        self._identify = cache(lambda role, file: identify(role, self._content(file)))
        self._hash = cache(hash_file)

    def scan(self, model: str) -> Scan:
        """Look for all components of a preset in all their variants.

        Args:
            model: Name of the preset; a variant behind it makes no difference.

        Raises:
            ConfigError: There is no such preset.
        """
        model, _ = split_variant(model)
        index, root = find_model(model)
        items: list[Item] = []
        for role, source in index.components.items():
            items += self._find_variants(role, source, root)
            for lora in source.loras:
                own = ComponentSource(source=lora.path)
                items.append(self._find(f"LoRA of {role}", WHOLE, own, root))
        lacking = {name: tuple(_lacking(index, name, items)) for name in index.variants()}
        return Scan(model=model, items=tuple(items), lacking=lacking)

    def _find_variants(self, role: str, source: ComponentSource, root: Path) -> Iterator[Item]:
        """A component in each of its variants; of a missing one, what is here instead."""
        names = [WHOLE, *(name for name in source.variants if name != WHOLE)]
        items = [self._find(role, name, source.in_variant(name), root) for name in names]
        here = [item.variant for item in items if item.status == "found"]
        note = f"another variant is here: {', '.join(here)}" if here else ""
        for item in items:
            if item.status != "missing":
                yield item
            else:
                yield replace(item, note=note or self._look_alikes(role, source, root))

    def _find(self, role: str, variant: str, source: ComponentSource, root: Path) -> Item:
        place = "/".join(filter(None, (source.source, source.subfolder)))
        item = Item(
            component=role,
            variant=variant,
            status="missing",
            source=place,
            num_bytes=source.num_bytes,
        )
        try:
            wanted = recall_architecture(role, source, root) if role in KINDS else None
            found = self._search(source, root)
            if found is not None:
                return self._judge(item, found, source, wanted)
        except LoadingError as error:
            return replace(item, status="unclear", note=str(error))
        names = file_names(source.source, source.subfolder, source.also)
        if (unfinished := find_unfinished(self.folder, names)) is not None:
            item = replace(item, status="damaged", path=str(unfinished))
            item = replace(item, note="its download did not finish", num_bytes=_size(unfinished))
        remote = RemoteFiles(*split_source(source.source, source.subfolder))
        commands = download_commands([remote]) if is_on_hub(source.source, root) else [""]
        return replace(item, command=commands[0])

    def _search(self, source: ComponentSource, root: Path) -> Path | None:
        if is_on_hub(source.source, root):
            found = find_in(self.folder, source.source, source.subfolder, source.also)
            if found is not None:
                return found
        if self.hashes and source.sha256:
            known = source.sha256
            found = next((file for file in self.files if self._hash(file) == known), None)
            if found is not None:
                return found
        return find_here(source.source, source.subfolder, root, source.also)

    def _judge(
        self, item: Item, found: Path, source: ComponentSource, wanted: Architecture | None
    ) -> Item:
        """Whether what has the right name is whole and holds the right model."""
        item = replace(item, path=str(found), num_bytes=_size(found))
        try:
            require_undamaged(found)
            if found.is_dir() or item.component not in KINDS:
                return replace(item, status="found")
            item = replace(item, form=self._content(found).kind)
        except SwiftI2VError as error:
            return replace(item, status="damaged", note=str(error))
        try:
            architecture = self._identify(item.component, found)
        except SwiftI2VError as error:
            return replace(item, status="another model", note=str(error))
        if wanted is not None and (reason := find_difference(architecture, wanted)) is not None:
            return replace(item, status="another model", note=reason)
        if self.hashes:
            item = replace(item, sha256=self._hash(found))
            if source.sha256 and item.sha256 != source.sha256:
                return replace(
                    item,
                    status="another model",
                    note=f"its SHA-256 is not {source.sha256[:12]}..., that of the file meant",
                )
        return replace(item, status="found")

    def _look_alikes(self, role: str, source: ComponentSource, root: Path) -> str:
        """Files of other names that fit by their keys: perhaps the model, perhaps one like it."""
        wanted = recall_architecture(role, source, root) if role in KINDS else None
        if wanted is None:
            return ""
        fitting = [file for file in self.files if self._is_alike(role, file, wanted)]
        if not fitting:
            return ""
        names = ", ".join(
            f"{file.relative_to(self.folder)} ({self._content(file).kind})" for file in fitting
        )
        return f"of this architecture, perhaps another model: {names}"

    def _is_alike(self, role: str, file: Path, wanted: Architecture) -> bool:
        if file.suffix not in (".safetensors", GGUF):
            return False
        try:
            return find_difference(self._identify(role, file), wanted) is None
        except SwiftI2VError:
            return False


def _lacking(index: ModelIndex, variant: str, items: list[Item]) -> Iterator[str]:
    """Components of a variant that were not found."""
    for item in items:
        source = index.components.get(item.component)
        has_own = source is not None and variant in source.variants
        counts = item.variant == (variant if has_own else WHOLE)
        if counts and item.status != "found":
            yield item.component


def _size(place: Path) -> int:
    files = [place] if place.is_file() else [f for f in place.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)
