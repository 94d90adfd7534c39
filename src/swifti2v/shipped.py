"""Configurations that ship with the package, by name."""

from importlib import resources
from pathlib import Path

from swifti2v.errors import ConfigError

PACKAGE = Path(str(resources.files("swifti2v")))


def shipped_configs() -> dict[str, Path]:
    """Files by name: ``nano_stage2``, ``tables/baselines``, and models as ``presets/paper``."""
    roots = (PACKAGE / "configs", PACKAGE / "configs"), (PACKAGE / "presets", PACKAGE)
    return {
        file.relative_to(root).with_suffix("").as_posix(): file
        for folder, root in roots
        for file in sorted(folder.rglob("*.yaml"))
    }


def require_shipped_config(name: str) -> Path:
    """The file of a name.

    Raises:
        ConfigError: No such file ships.
    """
    known = shipped_configs()
    if name not in known:
        raise ConfigError(f"no config {name!r} ships with the package, only {', '.join(known)}")
    return known[name]


def find_config(path: Path) -> Path:
    """Resolve ``--config``: a file, or the name of a configuration that ships.

    Raises:
        ConfigError: There is no such file and no such name.
    """
    if path.exists() and not path.is_dir():
        return path
    shipped = shipped_configs().get(path.as_posix())
    if shipped is None:
        raise ConfigError(
            f"config {str(path)!r} does not exist; name a YAML file, or one of those that "
            "'swifti2v configs list' shows"
        )
    return shipped
