from pathlib import Path

import pytest

from swifti2v.comfyui.install import NODE_FOLDER
from tests.helpers.comfyui import running_comfyui
from tests.helpers.command_line import error_line, succeed, swifti2v


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("custom_nodes", "models", "comfy", "comfy_api/v0_0_2"):
        (tmp_path / "ComfyUI" / name).mkdir(parents=True)
    return tmp_path / "ComfyUI"


def test_comfyui_loads_the_nodes_from_the_link(checkout, tmp_path):
    link = succeed(swifti2v("comfyui", "install", checkout)).stdout.strip()

    assert Path(link) == checkout / "custom_nodes" / "swifti2v"
    with running_comfyui(tmp_path / "running") as comfyui:
        assert "SwiftI2VGenerate" in comfyui.load(Path(link))


def test_a_second_installation_changes_nothing(checkout):
    first = succeed(swifti2v("comfyui", "install", checkout))
    second = succeed(swifti2v("comfyui", "install", checkout))
    assert first.stdout == second.stdout


def test_a_base_directory_without_comfyui_s_code_is_taken(tmp_path):
    for name in ("custom_nodes", "models"):
        (tmp_path / name).mkdir()
    succeed(swifti2v("comfyui", "install", tmp_path))
    assert (tmp_path / "custom_nodes" / "swifti2v").resolve() == NODE_FOLDER


@pytest.mark.parametrize("missing", ["custom_nodes", "models"])
def test_another_folder_is_refused(checkout, missing):
    (checkout / missing).rmdir()
    line = error_line(swifti2v("comfyui", "install", checkout))
    assert "not a ComfyUI folder" in line
    assert missing in line


def test_a_comfyui_without_the_interface_is_refused(checkout):
    (checkout / "comfy_api" / "v0_0_2").rmdir()
    assert "update it" in error_line(swifti2v("comfyui", "install", checkout))


def identity(place: Path) -> tuple[int, int, int]:
    status = place.lstat()
    return status.st_ino, status.st_mode, status.st_mtime_ns


@pytest.mark.parametrize("kind", ["folder", "file", "link", "broken link"])
def test_something_else_of_that_name_is_kept(checkout, tmp_path, kind):
    place = checkout / "custom_nodes" / "swifti2v"
    if kind == "folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path if kind == "link" else tmp_path / "gone")
    before = identity(place)

    line = error_line(swifti2v("comfyui", "install", checkout))

    assert str(place) in line
    assert identity(place) == before
