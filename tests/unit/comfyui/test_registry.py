"""The folder as ComfyUI's registry and its template browser read it."""

import json
import tomllib
from typing import Any

import pytest

import swifti2v
from swifti2v.comfyui.install import NODE_FOLDER

WORKFLOWS = sorted((NODE_FOLDER / "example_workflows").glob("*.json"))
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def test_metadata_name_this_version():
    metadata = tomllib.loads((NODE_FOLDER / "pyproject.toml").read_text("utf-8"))
    project, comfy = metadata["project"], metadata["tool"]["comfy"]
    assert project["version"] == swifti2v.__version__
    assert project["dependencies"] == [f"swifti2v=={swifti2v.__version__}"]
    assert "comfyui" not in project["name"].lower()  # the registry's rule
    assert set(project["license"]) == {"text"}
    assert "Repository" in project["urls"]
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= set(comfy)


def test_there_are_examples():
    assert [path.stem for path in WORKFLOWS] == ["choose_motion_then_refine", "photo_to_video"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_fits_the_nodes(comfyui, path):
    workflow: dict[str, Any] = json.loads(path.read_text("utf-8"))
    schemas = comfyui.load(NODE_FOLDER)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    own = [node for node in nodes.values() if node["type"].startswith("SwiftI2V")]
    assert own
    for node in own:
        inputs = schemas[node["type"]].inputs
        sockets = [(i.id, i.io_type) for i in inputs if i.io_type not in WIDGETS]
        assert [(i["name"], i["type"]) for i in node["inputs"]] == sockets
        outputs = schemas[node["type"]].outputs
        expected = [(o.display_name, o.io_type) for o in outputs]
        assert [(o["name"], o["type"]) for o in node["outputs"]] == expected
        check_widgets([i for i in inputs if i.io_type in WIDGETS], node["widgets_values"])
    for number, start, slot, stop, place, io_type in workflow["links"]:
        output, socket = nodes[start]["outputs"][slot], nodes[stop]["inputs"][place]
        assert number in output["links"]
        assert socket["link"] == number
        assert output["type"] == io_type
        assert io_type in socket["type"].split(",")


def check_widgets(widgets: list[Any], values: list[Any]) -> None:
    """Values in the order of the widgets; a seed is followed by what happens to it after a run."""
    left = iter(values)
    for widget in widgets:
        widget.check(next(left))
        if getattr(widget, "control_after_generate", None):
            assert next(left) in ("fixed", "increment", "decrement", "randomize")
    assert list(left) == []
