"""Installation of the nodes: a link from ComfyUI's ``custom_nodes`` to this folder."""

from pathlib import Path

from swifti2v.errors import InputError

NODE_FOLDER = Path(__file__).resolve().parent
"""Folder that ComfyUI loads."""
LINK_NAME = "swifti2v"
OLDEST_API = Path("comfy_api") / "v0_0_2"
"""Package of ComfyUI that ``nodes`` imports."""


def install(comfyui: Path) -> Path:
    """Link the nodes into a ComfyUI folder; a link that is there already stays.

    Args:
        comfyui: ComfyUI's checkout, or the base directory it was started with.

    Returns:
        The link.

    Raises:
        InputError: The folder is not ComfyUI's, something else has the link's name, or the link
            cannot be made.
    """
    _require_comfyui(comfyui)
    link = comfyui / "custom_nodes" / LINK_NAME
    if link.is_symlink() and link.resolve() == NODE_FOLDER:
        return link
    if link.is_symlink():
        raise InputError(f"{link} is a link to {link.readlink()}; remove it, then install again")
    if link.exists():
        raise InputError(f"{link} exists already; move it out of custom_nodes, then install again")
    try:
        link.symlink_to(NODE_FOLDER, target_is_directory=True)
    except OSError as error:
        raise InputError(
            f"{link} cannot be made ({error.strerror}); copy {NODE_FOLDER} there by hand"
        ) from error
    return link


def _require_comfyui(folder: Path) -> None:
    missing = [name for name in ("custom_nodes", "models") if not (folder / name).is_dir()]
    if missing:
        raise InputError(
            f"{folder} is not a ComfyUI folder: it has no folder {missing[0]}; name the folder that "
            "holds custom_nodes and models"
        )
    if (folder / "comfy").is_dir() and not (folder / OLDEST_API).is_dir():
        raise InputError(
            f"the ComfyUI in {folder} has no {OLDEST_API}: it is too old for these nodes; update it"
        )
