from collections.abc import Iterator
from pathlib import Path

import pytest

from swifti2v.comfyui.install import NODE_FOLDER
from tests.helpers.comfyui import ComfyUI, running_comfyui


@pytest.fixture
def comfyui(tmp_path: Path) -> Iterator[ComfyUI]:
    """A ComfyUI that has loaded the nodes."""
    with running_comfyui(tmp_path) as running:
        running.load(NODE_FOLDER)
        yield running
