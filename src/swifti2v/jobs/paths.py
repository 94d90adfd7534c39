"""Files and folders that a command is to write, checked before any work."""

import os
from pathlib import Path

from swifti2v.errors import InputError


def require_folder(folder: Path) -> None:
    """Refuse a folder that no file can be made in.

    Raises:
        InputError: It is not there, or not writable.
    """
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(f"folder {folder} does not exist or is not writable; choose another one")


def require_utf8(path: str | Path, what: str) -> None:
    """Refuse a path of weights or latents that is not UTF-8: safetensors opens no other.

    Raises:
        InputError: The path is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} {path} is not a UTF-8 name; rename it") from None


def require_writable_file(path: Path) -> None:
    """Refuse a file that cannot be made or replaced.

    Raises:
        InputError: The file cannot be written.
    """
    require_folder(path.parent)
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise InputError(f"{path} cannot be replaced; choose another name")


def require_contact_sheet(path: Path) -> None:
    """Refuse a contact sheet that cannot be written, or is no PNG.

    Raises:
        InputError: The contact sheet is refused.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"contact sheet {path} must end in .png")
    require_writable_file(path)


def require_new_file(path: Path, suffix: str) -> None:
    """Refuse a file that exists already, or has another suffix.

    Raises:
        InputError: The file is refused.
    """
    if path.suffix != suffix:
        raise InputError(f"output {path} must end in {suffix}")
    if path.exists():
        raise InputError(f"output {path} exists already; choose another name")
    require_folder(path.parent)
