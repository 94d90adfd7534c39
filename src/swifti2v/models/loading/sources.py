"""Sources of a model's components: indexes and presets, local folders and the Hub."""

import json
import logging
from collections.abc import Sequence
from dataclasses import field, fields, replace
from importlib import resources
from pathlib import Path
from threading import Timer
from typing import Any, Literal

from swifti2v.config import GenerationConfig, StageName, parse_config, read_yaml, settings
from swifti2v.errors import ConfigError, LoadingError
from swifti2v.models.loading.models_dir import find_in, is_complete, models_dir
from swifti2v.models.weights.headers import list_shards

progress = logging.getLogger("swifti2v.progress")
"""Logger of slow work such as downloads; the command line shows its messages."""
NOTICE_SECONDS = 3.0
"""Seconds after which a download is reported; cached files take less."""
INDEX_NAME = "model_index.json"
CONFIG_NAME = "config.json"
PIPELINE_CLASS = "SwiftI2VPipeline"
PEFT_CONFIG = "adapter_config.json"
"""Name of the PEFT config beside a LoRA's file, as PEFT writes it."""
REQUIRED = (
    "text_encoder",
    "tokenizer",
    "stage1_transformer",
    "stage1_vae",
    "stage2_transformer",
    "stage2_vae",
)
OPTIONAL = ("image_encoder", "image_processor")
YAML_SUFFIXES = (".yaml", ".yml")
Reference = Literal["channels", "none"]
"""Way in which Stage II reads the upsampled motion reference, see ``ComponentSource``."""


VaeDtype = Literal["float32", "bfloat16", "float16"]
WHOLE = "bf16"
"""Variant that a preset names without saying so: its components as their sources have them."""


@settings
class FileSource:
    """Files with the weights of a component."""

    source: str
    """A directory in diffusers layout, an original single file, or a Hub id."""
    subfolder: str = ""
    """Folder of the component below ``source``."""
    num_bytes: int | None = None
    """Size of the files, about; for plans and before a download."""
    also: tuple[str, ...] = ()
    """Names of single files with the same weights, for ``--models-dir``."""
    sha256: str | None = None
    """SHA-256 of a single file, where it is known; for ``models scan --hash``."""
    form: str = ""
    """Form of most linear layers, such as ``float8_e4m3fn`` or ``Q4_K``, so that a plan can be made
    before the file is there; empty for whole weights."""


@settings
class LoraSource:
    """A LoRA to merge when its component is loaded."""

    path: str
    """File, directory or ``org/repo/path/in/repo.safetensors`` on the Hub."""
    strength: float = 1.0
    """Factor on its deltas."""
    allow_partial: bool = False
    """Leave out layers that do not fit the model, with a warning, instead of refusing the file."""
    stage: StageName = "stage1"
    """Stage of the transformer, for a LoRA that no component names."""
    sha256: str | None = None
    """SHA-256 of the file, for a run that is repeated; None skips the comparison."""


@settings
class ComponentSource(FileSource):
    """Source of one component."""

    architecture: str = ""
    """Folder on the Hub whose configuration a single file has, so that a plan can be made before it
    is downloaded."""
    variants: dict[str, FileSource] = field(default_factory=dict)
    """Other files with the same weights by the variant's name: ``--model paper:fp8`` takes them."""
    weights: str | None = None
    """A checkpoint loaded on top of a transformer, such as trained Stage II weights."""
    loras: tuple[LoraSource, ...] = ()
    """LoRAs to merge into a transformer, in this order."""
    reference: Reference = "channels"
    """Way in which a base model becomes Stage II. ``channels`` adds input channels for the
    reference; ``none`` leaves the model as it is, so that the reference counts only where sampling
    starts from it (``strength`` below 1). As Stage I, ``none`` is a model without channels for the
    photo, which is its clean first frame; ``channels`` one with them, such as Wan2.1-I2V."""
    encode_dtype: VaeDtype | None = None
    """Number type of a VAE's encoder; by default that of all weights. 16 bits lose more where
    latents are a condition than where they are decoded."""
    decode_dtype: VaeDtype | None = None
    """Number type of a VAE's decoder; by default that of all weights."""

    def in_variant(self, name: str) -> "ComponentSource":
        """The source of a variant; the component itself where it has no file of its own for it."""
        row = self.variants.get(name)
        if row is None:
            return self
        known = self.architecture or "/".join(filter(None, (self.source, self.subfolder)))
        files = {item.name: getattr(row, item.name) for item in fields(FileSource)}
        return replace(self, **files, architecture=known)


@settings
class ModelIndex:
    """Contents of ``model_index.json`` or a YAML preset: component sources and default settings."""

    components: dict[str, ComponentSource]
    """Sources by field name of ``Components``."""
    max_text_length: int = 512
    """Tokens the transformers see."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Defaults, see ``swifti2v.config.GenerationConfig``."""

    def __post_init__(self) -> None:
        if missing := [role for role in REQUIRED if role not in self.components]:
            raise ConfigError(f"components {', '.join(missing)} are missing")
        if unknown := sorted(self.components.keys() - {*REQUIRED, *OPTIONAL}):
            known = ", ".join((*REQUIRED, *OPTIONAL))
            raise ConfigError(f"components {', '.join(unknown)} are unknown; known are {known}")
        for role, source in self.components.items():
            if (source.weights or source.loras) and not role.endswith("transformer"):
                raise ConfigError(
                    f"component {role} has weights or loras; only the transformers take them"
                )
            if source.reference == "none" and not role.endswith("transformer"):
                raise ConfigError(
                    f"component {role} has reference: none; only the transformers take it"
                )
            if (source.encode_dtype or source.decode_dtype) and not role.endswith("vae"):
                raise ConfigError(
                    f"component {role} has encode_dtype or decode_dtype; only the VAEs take them"
                )
        parse_config(GenerationConfig, self.settings, "settings")

    def twin(self, role: str) -> str:
        """Stage I's component where Stage II's has the same source: one model serves for both."""
        first, source = role.replace("stage2_", "stage1_"), self.components[role]
        # A transformer with a reference is no Stage I, whatever stands there.
        can_be_both = source.reference == "none" or not role.endswith("transformer")
        return first if can_be_both and self.components.get(first) == source else role

    def without_loras(self) -> "ModelIndex":
        """Copy of the index without LoRAs."""
        plain = {role: replace(source, loras=()) for role, source in self.components.items()}
        return replace(self, components=plain)

    def variants(self) -> list[str]:
        """Names of the variants, that of the components themselves first."""
        names = {name: None for source in self.components.values() for name in source.variants}
        return [WHOLE, *names]

    def in_variant(self, name: str) -> "ModelIndex":
        """Copy of the index whose components come from the files of a variant.

        Raises:
            ConfigError: No component has it.
        """
        if name not in self.variants():
            raise ConfigError(
                f"variant {name!r} is unknown; there are {', '.join(self.variants())}"
            )
        chosen = {role: source.in_variant(name) for role, source in self.components.items()}
        return replace(self, components=chosen)


def split_variant(name: str | Path) -> tuple[str, str]:
    """A model's name and its variant, ``WHOLE`` without one: ``paper:fp8``."""
    model, colon, variant = str(name).rpartition(":")
    is_plain = not colon or len(model) < 2 or "/" in variant or "\\" in variant
    return (str(name), WHOLE) if is_plain or Path(name).exists() else (model, variant)


def in_variant(name: str, variant: str) -> str:
    """Name of a model in a variant."""
    return name if variant == WHOLE else f"{name}:{variant}"


def find_model(name: str | Path) -> tuple[ModelIndex, Path]:
    """Resolve a model's name to its index and the directory its relative paths start from.

    Args:
        name: ``"nano"`` or another name that ships with the package, a YAML preset, a directory
            with ``model_index.json``, or a Hub id of one; a colon and the name of a variant may
            follow.

    Raises:
        ConfigError: No such model or variant, or an index with unknown keys.
        LoadingError: The Hub has no such model.
    """
    model, variant = split_variant(name)
    index, root = _find_index(model)
    return index.in_variant(variant), root


def _find_index(name: str) -> tuple[ModelIndex, Path]:
    shipped = Path(str(resources.files("swifti2v")))
    path = Path(name)
    yamls = (path, shipped / "presets" / f"{name}.yaml")
    for file in yamls:
        if file.suffix in YAML_SUFFIXES and file.is_file():
            return parse_config(ModelIndex, read_yaml(file), str(file)), file.parent
    for folder in (path, shipped / str(name)):
        if (folder / INDEX_NAME).is_file():
            return _read_index(folder / INDEX_NAME), folder
    if (path / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{path} holds one model, a run takes those of two stages; name it as a source in a "
            "YAML preset (see 'paper')"
        )
    is_hub_id = str(name).count("/") == 1 and is_on_hub(str(name), Path())
    if is_hub_id and path.suffix not in YAML_SUFFIXES:
        # The index first: another repository is refused before all of it is downloaded.
        index = download(str(name), INDEX_NAME) / INDEX_NAME
        if index.is_file():
            return _read_index(index), download(str(name), None)
    presets = sorted(file.stem for file in (shipped / "presets").glob("*.yaml"))
    raise ConfigError(
        f"unknown model {str(name)!r}: not 'nano', a preset ({', '.join(presets)}), "
        f"a YAML file, a directory with {INDEX_NAME} or a Hub id like 'org/repo'"
    )


def _read_index(file: Path) -> ModelIndex:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        kind = values.pop("_class_name", None)
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    if kind != PIPELINE_CLASS:
        raise ConfigError(
            f"{file} holds a {kind}, not a {PIPELINE_CLASS}; a plain diffusers pipeline holds one "
            "stage only: name its components in a YAML preset (see 'paper')"
        )
    values.pop("_swifti2v_version", None)
    return parse_config(ModelIndex, values, str(file))


def resolve(source: str, subfolder: str, root: Path, beside: Sequence[str] = ()) -> Path:
    """Local path of a source: below ``root``, absolute, or downloaded from the Hub.

    Args:
        source: Path or Hub id; what is in a Hub repository is ``org/repo/path/in/it``. With an
            index of shards come the shards.
        subfolder: Folder below the source.
        root: Folder from which relative paths start.
        beside: Names of files that are taken along from the same folder of the Hub if they are
            there.

    Raises:
        LoadingError: It is nowhere.
    """
    here = find_here(source, subfolder, root, beside=beside)
    if here is not None:
        return here
    if not is_on_hub(source, root):
        raise LoadingError(
            f"{root / Path(source).expanduser() / subfolder} does not exist; name a directory, a "
            "file or a Hub id 'org/repo'"
        )
    repo_id, inside = split_source(source, subfolder)
    patterns = [inside, f"{inside}/*", *(f"{parent(inside)}{name}" for name in beside)]
    place = download(repo_id, patterns if inside else None) / inside
    if not place.exists():
        raise LoadingError(f"the Hub's {repo_id!r} has no {inside}")
    if shards := list_shards(place):
        download(repo_id, [parent(inside) + shard for shard in shards])
    return place


def find_here(
    source: str,
    subfolder: str,
    root: Path,
    also: Sequence[str] = (),
    beside: Sequence[str] = (),
) -> Path | None:
    """Path of a source on this machine: below ``root``, in the models directory or the Hub's cache.

    Args:
        source: See ``resolve``.
        subfolder: See ``resolve``.
        root: See ``resolve``.
        also: Other names of the file in the models directory.
        beside: See ``resolve``; where the cache does not know whether the Hub has such a file, it
            must be asked.

    Returns:
        None if it is not here or not whole.

    Raises:
        LoadingError: See ``find_in``.
    """
    local = root / Path(source).expanduser() / subfolder  # an absolute path stays as it is
    if local.exists():
        return local
    if not is_on_hub(source, root):
        return None
    folder = models_dir()
    found = find_in(folder, source, subfolder, also) if folder else None
    if found is not None:
        return found
    repo_id, inside = split_source(source, subfolder)
    snapshot = find_snapshot(repo_id)
    if snapshot is None or not is_complete(snapshot / inside):
        return None
    names = [parent(inside) + name for name in beside]
    return snapshot / inside if all(_is_settled(repo_id, name) for name in names) else None


def find_snapshot(repo_id: str) -> Path | None:
    """Folder of a repository in the Hub's cache, whole or not; None without one.

    ``snapshot_download`` calls a snapshot unfinished that lacks anything of the repository, and we
    take parts.
    """
    folder = cache_folder(repo_id)
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def cache_folder(repo_id: str) -> Path:
    """Folder of a repository in the Hub's cache, whether it is there or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def _is_settled(repo_id: str, file: str) -> bool:
    """Whether a file is in the cache, or known not to be on the Hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return HF_HUB_OFFLINE or try_to_load_from_cache(repo_id, file) is not None


def split_source(source: str, subfolder: str = "") -> tuple[str, str]:
    """Repository and path in it of a source on the Hub."""
    organization, name, *rest = source.split("/")
    return f"{organization}/{name}", "/".join(part for part in (*rest, subfolder) if part)


def is_on_hub(source: str, root: Path) -> bool:
    """Whether a source is nothing on this machine and may be a Hub id, or a path in one."""
    is_id = "/" in source and not source.startswith((".", "/", "~"))
    return is_id and not (root / source).exists()


def parent(path: str) -> str:
    """The folder of a path on the Hub, with a slash at its end if there is one."""
    return path[: path.rfind("/") + 1]


def download(repo_id: str, pattern: str | list[str] | None) -> Path:
    """Get a snapshot of a Hub repository (or of the files that match), from the cache if possible.

    Raises:
        LoadingError: The Hub has no such repository or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    notice = Timer(NOTICE_SECONDS, progress.info, [f"downloading {repo_id} from the Hub"])
    notice.daemon = True
    notice.start()
    try:
        return Path(snapshot_download(repo_id, allow_patterns=pattern))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LoadingError(
            f"cannot get {repo_id!r} from the Hub: {reason}; if it is a folder, check its path"
        ) from None
    finally:
        notice.cancel()
