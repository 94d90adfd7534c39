"""ComfyUI nodes; ComfyUI loads this folder from its ``custom_nodes`` and calls ``comfy_entrypoint``."""

from typing import Any


async def comfy_entrypoint() -> Any:
    """Return the extension that lists the nodes; only ComfyUI has the modules that it needs."""
    from swifti2v.comfyui.nodes import SwiftI2VExtension

    return SwiftI2VExtension()
