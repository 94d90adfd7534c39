"""ComfyUI's side of the node contract, as its documentation states it, to test nodes without it."""

import asyncio
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from PIL import Image

IMPORTERS = [f"swifti2v.comfyui.{name}" for name in ("nodes", "inputs", "runs")]
"""Modules that import ComfyUI's."""


@dataclass
class Input:
    io_type = "*"
    id: str
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None
    lazy: bool | None = None
    raw_link: bool | None = None
    extra_dict: dict[str, Any] | None = None

    def check(self, value: Any) -> None:
        """Raise ValueError for a value that the interface would not let through."""


@dataclass
class WidgetInput(Input):
    default: Any = None
    socketless: bool | None = None
    force_input: bool | None = None


@dataclass
class NumberInput(WidgetInput):
    min: float | None = None
    max: float | None = None
    step: float | None = None
    display_mode: Any = None

    def check(self, value: Any) -> None:
        if not (self.min is None or value >= self.min) or not (
            self.max is None or value <= self.max
        ):
            raise ValueError(f"{self.id} {value} is out of range")


@dataclass
class IntInput(NumberInput):
    control_after_generate: bool | None = None


@dataclass
class FloatInput(NumberInput):
    round: float | None = None


@dataclass
class StringInput(WidgetInput):
    multiline: bool = False
    placeholder: str | None = None
    dynamic_prompts: bool | None = None


@dataclass
class BooleanInput(WidgetInput):
    label_on: str | None = None
    label_off: str | None = None


@dataclass
class ComboInput(WidgetInput):
    options: list[str] = field(default_factory=list)
    control_after_generate: bool | None = None

    def check(self, value: Any) -> None:
        if value not in self.options:
            raise ValueError(f"{self.id} {value!r} is not one of {self.options}")


@dataclass
class MultiTypeInput(Input):
    types: list[Any] = field(default_factory=list)

    @property
    def io_type(self) -> str:  # type: ignore[override]
        return ",".join(kind.io_type for kind in self.types)


@dataclass
class Output:
    io_type = "*"
    id: str | None = None
    display_name: str | None = None
    tooltip: str | None = None
    is_output_list: bool = False


def make_type(io_type: str, kind: type[Input] = Input) -> Any:
    own = {"io_type": io_type}
    parts = {"Input": type("Input", (kind,), own), "Output": type("Output", (Output,), own)}
    return type(io_type, (), {**own, **parts})


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    description: str = ""
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_api_node: bool = False
    not_idempotent: bool = False
    enable_expand: bool = False

    def __post_init__(self) -> None:
        ids = [part.id for part in self.inputs]
        ids += [part.id for part in self.outputs if part.id is not None]
        if len(ids) != len(set(ids)):
            raise ValueError(f"ids of {self.node_id} are not unique: {ids}")


class NodeOutput:
    def __init__(
        self, *args: Any, ui: Any = None, expand: Any = None, block_execution: str | None = None
    ) -> None:
        self.args = args


class ComfyNode:
    """Base class of nodes; ComfyUI calls class methods alone."""

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def validate_inputs(cls) -> bool | str:
        return True


class ComfyExtension:
    async def get_node_list(self) -> list[type[ComfyNode]]:
        raise NotImplementedError


class ExecutionBlocker:
    def __init__(self, message: str | None) -> None:
        self.message = message


class VideoFromFile:
    def __init__(self, file: str) -> None:
        assert isinstance(file, str)
        self._file = file

    def get_stream_source(self) -> str:
        return self._file


class InterruptProcessingException(Exception):  # noqa: N818 # ComfyUI's name
    """Raised at a safe point after the user pressed Cancel."""


IO = SimpleNamespace(
    Schema=Schema,
    ComfyNode=ComfyNode,
    NodeOutput=NodeOutput,
    Input=Input,
    Output=Output,
    Custom=make_type,
    Image=make_type("IMAGE"),
    Video=make_type("VIDEO"),
    Int=make_type("INT", IntInput),
    Float=make_type("FLOAT", FloatInput),
    String=make_type("STRING", StringInput),
    Boolean=make_type("BOOLEAN", BooleanInput),
    Combo=make_type("COMBO", ComboInput),
    MultiType=SimpleNamespace(Input=MultiTypeInput),
)


@dataclass
class Report:
    """One call of ``set_progress``."""

    value: float
    max_value: float
    preview_image: Image.Image | None


class ComfyUI:
    """A ComfyUI with no models of its own.

    Args:
        folder: Its temporary files and LoRAs go below it.
    """

    def __init__(self, folder: Path) -> None:
        self.temp = folder / "temp"
        self.loras = folder / "models" / "loras"
        self.loras.mkdir(parents=True)
        self.reports: list[Report] = []
        self.num_unloads = 0
        self.is_cancelled: Callable[[], bool] = lambda: False
        self._is_executing = False
        self._nodes: dict[str, type[Any]] = {}

    def modules(self) -> dict[str, ModuleType]:
        """The modules that a node may import, by name."""
        made: dict[str, ModuleType] = {}
        for name, contents in self._contents().items():
            made[name] = ModuleType(name)
            vars(made[name]).update(contents)
            if "." in name:
                parent, _, own = name.rpartition(".")
                setattr(made[parent], own, made[name])
        return made

    def _contents(self) -> dict[str, dict[str, Any]]:
        execution = SimpleNamespace(set_progress=self._set_progress)
        return {
            "comfy": {},
            "comfy.model_management": {
                "InterruptProcessingException": InterruptProcessingException,
                "get_torch_device": self._get_torch_device,
                "throw_exception_if_processing_interrupted": self._throw_if_cancelled,
                "unload_all_models": self._unload_all_models,
            },
            "comfy_api": {},
            "comfy_api.v0_0_2": {
                "ComfyAPISync": lambda: SimpleNamespace(execution=execution),
                "ComfyExtension": ComfyExtension,
                "InputImpl": SimpleNamespace(VideoFromFile=VideoFromFile),
                "io": IO,
            },
            "comfy_execution": {},
            "comfy_execution.graph": {"ExecutionBlocker": ExecutionBlocker},
            "folder_paths": {
                "get_filename_list": lambda name: sorted(p.name for p in self.loras.iterdir()),
                "get_full_path_or_raise": lambda name, file: str(self.loras / file),
                "get_temp_directory": lambda: str(self.temp),
                "models_dir": str(self.loras.parent),
            },
        }

    def load(self, folder: Path) -> dict[str, Schema]:
        """Import a folder of ``custom_nodes`` under its path's name; return schemas by node id."""
        spec = importlib.util.spec_from_file_location(str(folder), folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert getattr(module, "NODE_CLASS_MAPPINGS", None) is None, "V1 wins over V3"
        nodes = asyncio.run(_list_nodes(module.comfy_entrypoint))
        self._nodes = {node.define_schema().node_id: node for node in nodes}
        return {name: node.define_schema() for name, node in self._nodes.items()}

    def validate(self, node_id: str, settings: str | None) -> bool | str:
        """Ask a node about a constant input, or about one (None) that another node makes."""
        given = {} if settings is None else {"settings": settings}
        answer: bool | str = self._nodes[node_id].validate_inputs(**given)
        return answer

    def run(self, node_id: str, **given: Any) -> tuple[Any, ...]:
        """Execute one node as ComfyUI does, with the defaults of inputs that are not given."""
        import torch

        node = self._nodes[node_id]
        schema = node.define_schema()
        inputs = {i.id: getattr(i, "default", None) for i in schema.inputs if not i.optional}
        for part in schema.inputs:
            if part.id in given:
                part.check(given[part.id])
        with torch.inference_mode(), self._execute():
            output = node.execute(**{**inputs, **given})
        assert len(output.args) == len(schema.outputs)
        return tuple(output.args)

    @contextmanager
    def _execute(self) -> Iterator[None]:
        self._is_executing = True
        try:
            yield
        finally:
            self._is_executing = False

    def _set_progress(
        self,
        value: float,
        max_value: float,
        node_id: str | None = None,
        preview_image: Image.Image | None = None,
    ) -> None:
        if not self._is_executing and node_id is None:
            raise ValueError("node_id must be provided if not in executing context")
        self.reports.append(Report(value, max_value, preview_image))

    def _throw_if_cancelled(self) -> None:
        if self.is_cancelled():
            raise InterruptProcessingException

    def _unload_all_models(self) -> None:
        self.num_unloads += 1

    def _get_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


async def _list_nodes(entrypoint: Callable[[], Any]) -> list[type[Any]]:
    extension = await entrypoint()
    assert isinstance(extension, ComfyExtension)
    nodes: list[type[Any]] = await extension.get_node_list()
    return nodes


@contextmanager
def running_comfyui(folder: Path) -> Iterator[ComfyUI]:
    """A ComfyUI whose modules can be imported inside the block."""
    comfyui = ComfyUI(folder)
    modules = comfyui.modules()
    sys.modules.update(modules)
    try:
        yield comfyui
    finally:
        for name in (*modules, *IMPORTERS):
            sys.modules.pop(name, None)
