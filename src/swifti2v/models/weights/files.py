"""Weights in the formats users have: read safely, load strictly and write, all or nothing."""

import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from swifti2v.errors import InputError, LoadingError, StorageError
from swifti2v.models.weights.gguf_files import read_gguf
from swifti2v.models.weights.headers import GGUF, SHARD, read_header
from swifti2v.models.weights.names import drop_wrappers, shorten
from swifti2v.models.weights.packed import Weight, unpack_all
from swifti2v.models.weights.scales import pack_float8
from swifti2v.storage import whole_file

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = (
    "generator_ema",  # averaged weights before those of the last step
    "generator_lora",
    "generator",
    "state_dict",
    "model",
    "module",
    "gen_model",
)
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Number types by their names in safetensors files."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "module.", "pipe.dit.", "model.")


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint as ``read_weights``; packed ones become float32."""
    return unpack_all(read_weights(path), torch.float32)


def read_weights(path: Path | str) -> dict[str, Weight]:
    """Read the weights of a checkpoint, with wrappers and name prefixes taken off.

    A prefix is taken off only if every key has it; parts that PyTorch's sharding and compilation
    put into names always are. Tensors stay on the CPU in the stored dtype; those in 8-bit floating
    point, with or without scales, and the blocks of GGUF come as ``PackedWeight``.

    Args:
        path: A ``.safetensors``, ``.gguf``, ``.pth``, ``.pt``, ``.bin`` or ``.ckpt`` file, an
            ``.index.json`` of shards, or a directory that holds one checkpoint.

    Raises:
        LoadingError: The file is missing, empty, cut short, a Git LFS pointer, one shard of
            many, or holds anything but tensors; the message names the file and the remedy. See
            also ``pack_float8`` and ``read_gguf``.
    """
    path = Path(path)
    if path.suffix == GGUF:
        require_whole(path)
        return _strip(read_gguf(path)[0], path)
    tensors, metadata = read_tensors(path)
    return _strip(pack_float8(tensors, metadata, str(path)), path)


def outline_weights(file: Path) -> dict[str, Weight]:
    """Read weights as ``read_weights``, without values where the format allows it.

    Raises:
        LoadingError: As in ``read_weights``.
    """
    if file.suffix != ".safetensors":
        return read_weights(file)
    require_whole(file)
    header = read_header(file)
    if strange := {kind for kind, _ in header.tensors.values()} - DTYPES.keys():
        raise LoadingError(f"{file} holds numbers of the types {shorten(sorted(strange))}")
    tensors = {
        name: torch.empty(shape, dtype=DTYPES[kind], device="meta")
        for name, (kind, shape) in header.tensors.items()
    }
    return _strip(pack_float8(tensors, header.metadata, str(file)), file)


def _strip(found: Mapping[str, Weight], path: Path) -> dict[str, Weight]:
    """Weights without the names of wrappers and without a prefix that all have."""
    state = {drop_wrappers(key): weight for key, weight in found.items()}
    if len(state) < len(found):
        raise LoadingError(f"{path} holds the same weights with and without wrappers' names")
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): weight for key, weight in state.items()}
    return state


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors under the names stored in the file, and the file's safetensors metadata.

    Raises:
        LoadingError: As in ``read_state_dict``.
    """
    path = Path(path)
    state: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in _find_files(path):
        require_whole(file)
        is_pickle = file.suffix in PICKLE_SUFFIXES
        part, note = (_read_pickle(file), {}) if is_pickle else _read_safetensors(file)
        if twice := state.keys() & part.keys():
            raise LoadingError(f"{file} repeats keys of another shard: {shorten(sorted(twice))}")
        state |= part
        metadata |= note
    if not state:
        raise LoadingError(f"{path} holds no tensors; give a file with weights")
    return state, metadata


def read_names(folder: Path) -> list[str]:
    """Names of the weights in a directory, from its index or the heads of its files.

    Raises:
        LoadingError: As in ``read_state_dict``.
    """
    if (index := _find_index(folder)) is not None:
        return list(_read_weight_map(index))
    names: list[str] = []
    for file in _find_files(folder):
        if file.suffix in PICKLE_SUFFIXES:
            names += _read_pickle(file)
            continue
        try:
            with safe_open(file, framework="pt", device="cpu") as stream:
                names += stream.keys()
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
    return names


def read_metadata(path: Path | str) -> dict[str, str]:
    """Read a checkpoint's safetensors metadata without its tensors; other formats have none.

    Raises:
        LoadingError: As in ``read_state_dict``.
    """
    metadata: dict[str, str] = {}
    for file in _find_files(Path(path)):
        require_whole(file)
        if file.suffix in PICKLE_SUFFIXES:
            continue
        try:
            with safe_open(file, framework="pt", device="cpu") as stream:
                metadata |= stream.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
    return metadata


def require_whole(file: Path) -> None:
    """Refuse a file that is missing, empty or a Git LFS pointer.

    Raises:
        LoadingError: One of these; the message says how to get the real file.
    """
    if not file.is_file():
        raise LoadingError(f"no weights at {file}; check the path or download the file")
    if file.stat().st_size == 0:
        raise LoadingError(f"{file} is empty: its download did not finish; fetch it again")
    with file.open("rb") as stream:
        if stream.read(24).startswith(b"version https://git-lfs"):
            raise LoadingError(f"{file} is a Git LFS pointer, not weights; run `git lfs pull`")


def _find_files(path: Path) -> list[Path]:
    if path.name.endswith(".index.json"):
        return _read_index(path)
    if not path.is_dir():
        if path.exists() and path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
            raise LoadingError(
                f"{path} is not a weight file; known: .safetensors, .gguf, "
                f"{', '.join(PICKLE_SUFFIXES)}"
            )
        if (shard := SHARD.search(path.stem)) and int(shard[2]) > 1:
            raise LoadingError(f"{path} is one of {int(shard[2])} shards; give its folder instead")
        return [path]
    if (index := _find_index(path)) is not None:
        return _read_index(index)
    files = sorted(path.glob("*.safetensors"))
    files = files or sorted(file for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if not files:
        raise LoadingError(
            f"{path} holds no weight files (.safetensors, {', '.join(PICKLE_SUFFIXES)})"
        )
    if len(files) > 1:
        _require_all_shards(path, files)
    return files


def _require_all_shards(folder: Path, files: list[Path]) -> None:
    shards = [SHARD.search(file.stem) for file in files]
    numbers = [(int(shard[1]), int(shard[2])) for shard in shards if shard]
    sets = {(file.name[: s.start()], s[2]) for file, s in zip(files, shards, strict=True) if s}
    if len(numbers) < len(files) or len(sets) > 1:
        raise LoadingError(f"{folder} holds {shorten(f.name for f in files)}; name one of them")
    total = numbers[0][1]
    if missing := set(range(1, total + 1)) - {number for number, _ in numbers}:
        raise LoadingError(
            f"{folder} lacks shard {shorten(map(str, sorted(missing)))} of {total}; download again"
        )


def _find_index(folder: Path) -> Path | None:
    indexes = sorted(folder.glob("*.index.json"))
    if len(indexes) > 1:
        raise LoadingError(f"{folder} holds {shorten(f.name for f in indexes)}; name one of them")
    return indexes[0] if indexes else None


def _read_weight_map(index: Path) -> dict[str, str]:
    """Name of each weight and of its shard."""
    require_whole(index)
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise LoadingError(
            f"{index} is not an index of shards ({error}); download it again"
        ) from error


def _read_index(index: Path) -> list[Path]:
    names = sorted(set(_read_weight_map(index).values()))
    if any(Path(name).name != name for name in names):
        raise LoadingError(f"{index} points outside its folder: {shorten(names)}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise LoadingError(f"{index} lists missing shards: {shorten(missing)}; download them too")
    return [index.parent / name for name in names]


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as stream:
            state = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
            return state, dict(stream.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: BaseException) -> LoadingError:
    return LoadingError(f"{file} is damaged or cut short ({error}); fetch it again")


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except MemoryError:
        raise
    except Exception as error:  # a cut file makes the unpickler fail in any way there is
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise LoadingError(
                f"{file} asks for Python code, which is not run; fetch it again in case it was "
                "cut short, else save its tensors as .safetensors where you trust the file"
            ) from error
        raise LoadingError(f"{file} is damaged or cut short; fetch it again") from error
    content = _unwrap(content, file)
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise LoadingError(f"{file} holds a {type(content).__name__}, not a dict of tensors")
    if others := [key for key, value in content.items() if not isinstance(value, Tensor)]:
        raise LoadingError(f"{file} holds entries that are not tensors: {shorten(others)}")
    return dict(content)


def _unwrap(content: Any, file: Path) -> Any:
    """The innermost state dict of a training's checkpoint."""
    while isinstance(content, Mapping):
        found = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if not found:
            break
        if len(found) > 1:
            logger.warning("%s holds %s; %s is taken", file, " and ".join(found), found[0])
        content = content[found[0]]
    return content


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict into a model, all of it or nothing.

    A key may be missing only if its parameter is tied to one that is there. Values are cast to
    the dtype of the model; a model built without memory (``accelerate.init_empty_weights``)
    takes the tensors themselves, dtype included.

    Args:
        model: Any module; left as it was on refusal.
        state: Tensors under the names of ``model.state_dict()``.
        source: Name of the weights in an error message.

    Raises:
        LoadingError: Keys are missing or left over, or a shape or kind of number differs.
    """
    tie = getattr(model, "tie_weights", lambda: None)  # empty and assigned weights come untied
    tie()
    wanted = model.state_dict(keep_vars=True)
    loose = [
        name for name, buffer in model.named_buffers() if buffer.is_meta and name not in wanted
    ]
    if loose:
        raise LoadingError(
            f"{type(model).__name__} has buffers without memory: {shorten(loose)}; "
            "build it with accelerate.init_empty_weights(include_buffers=False)"
        )
    full = dict(state)
    by_tensor = {id(wanted[key]): tensor for key, tensor in state.items() if key in wanted}
    for key, parameter in wanted.items():
        if key not in full and id(parameter) in by_tensor:
            full[key] = by_tensor[id(parameter)]
    missing = [f"{key} {tuple(wanted[key].shape)}" for key in wanted if key not in full]
    unexpected = [f"{key} {tuple(full[key].shape)}" for key in full if key not in wanted]
    differing = [
        f"{key} (checkpoint {tuple(full[key].shape)} {full[key].dtype}, "
        f"model {tuple(parameter.shape)} {parameter.dtype})"
        for key, parameter in wanted.items()
        if key in full
        and (
            full[key].shape != parameter.shape
            or full[key].is_floating_point() != parameter.is_floating_point()
        )
    ]
    groups = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": differing}
    if any(groups.values()):
        found = "; ".join(f"{len(v)} {k}: {shorten(v)}" for k, v in groups.items() if v)
        raise LoadingError(
            f"{source} does not fit {type(model).__name__} ({len(wanted)} keys): {found}; "
            "check that checkpoint and config belong together"
        )
    model.load_state_dict(full, assign=any(tensor.is_meta for tensor in wanted.values()))
    tie()
    logger.info("loaded %d keys of %s into %s", len(state), source, type(model).__name__)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under another name, then put it in its place.

    Args:
        tensors: By key; copied to the CPU one by one where they are not there.
        path: Ends in ``.safetensors``.
        metadata: For the header.

    Raises:
        InputError: The path has another ending, or a value of ``metadata`` is no text.
        StorageError: The file cannot be written; the old file is untouched.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path} must end in .safetensors")
    if wrong := [key for key, text in metadata.items() if not isinstance(text, str)]:
        raise InputError(f"metadata {shorten(wrong)} is not text; give every value as str")
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        with whole_file(path) as unfinished:
            save_file(ready, unfinished, {"format": "pt", **metadata})
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path} cannot be written: {error}") from None
