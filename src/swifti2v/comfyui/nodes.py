"""ComfyUI nodes in its V3 schema: load a model, add a LoRA, generate, Stage I, refine, upscale."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import comfy.model_management
import folder_paths
import yaml
from comfy_api.v0_0_2 import ComfyAPISync, ComfyExtension, InputImpl, io
from comfy_execution.graph import ExecutionBlocker
from PIL import Image

from swifti2v.config import GenerationConfig, expand_shorthands, parse_config
from swifti2v.errors import ConfigError, SwiftI2VError
from swifti2v.models.loading.sources import LoraSource

if TYPE_CHECKING:
    from torch import Tensor

    from swifti2v.media import Frames
    from swifti2v.media.images import Fit
    from swifti2v.pipelines.progress import Progress
    from swifti2v.pipelines.transition import MotionReference
    from swifti2v.pipelines.two_stage import SegmentOutput, SwiftI2VPipeline

CATEGORY = "SwiftI2V"
Pipeline = io.Custom("SWIFTI2V_PIPELINE")
Loras = io.Custom("SWIFTI2V_LORAS")
Motion = io.Custom("SWIFTI2V_MOTION")
INPUTS_OF_THEIR_OWN = ("num_frames", "height", "width", "fps")
"""Settings that have an input, so that the text of ``settings`` may not name them."""
STAGES: Sequence[Literal["stage1", "stage2"]] = ("stage1", "stage2")


class SwiftI2VExtension(ComfyExtension):
    """The list of nodes that ComfyUI asks for."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return every node of this package."""
        return [LoadModel, AddLora, Generate, Stage1, Refine, Upscale]


class LoadModel(io.ComfyNode):
    """Both stages of a model, on ComfyUI's device."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe inputs and outputs."""
        return io.Schema(
            node_id="SwiftI2VLoad",
            display_name="Load SwiftI2V",
            category=CATEGORY,
            description="Load both stages of a model. nano ships with the package.",
            inputs=[
                io.String.Input(
                    "model",
                    default="nano",
                    tooltip="nano, paper, vibe, a YAML preset, a directory or a Hub id.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", "float32", "bfloat16", "float16"],
                    default="auto",
                    tooltip="Number type of the weights: bfloat16 on a GPU, float32 elsewhere.",
                ),
                io.Combo.Input(
                    "placement",
                    options=["resident", "streamed", "offloaded"],
                    default="resident",
                    tooltip="Weights stay on the device, or come to it when they are used.",
                ),
                Loras.Input("loras", optional=True),
            ],
            outputs=[Pipeline.Output(display_name="pipeline")],
        )

    @classmethod
    def execute(
        cls, model: str, dtype: str, placement: str, loras: Sequence[LoraSource] = ()
    ) -> io.NodeOutput:
        """Load the model; ComfyUI's own models make room for it."""
        from swifti2v.comfyui import clips

        comfy.model_management.unload_all_models()
        with whole_message():
            device = comfy.model_management.get_torch_device()
            return io.NodeOutput(clips.load(model, device, dtype, placement, loras))


class AddLora(io.ComfyNode):
    """One more LoRA of ComfyUI's folder for a model that is loaded next."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe inputs and outputs."""
        return io.Schema(
            node_id="SwiftI2VLora",
            display_name="SwiftI2V LoRA",
            category=CATEGORY,
            description="Merge a LoRA into one stage when the model is loaded; chain several.",
            inputs=[
                io.Combo.Input("lora", options=folder_paths.get_filename_list("loras")),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01),
                io.Combo.Input("stage", options=["stage1", "stage2"], default="stage1"),
                Loras.Input("loras", optional=True),
            ],
            outputs=[Loras.Output(display_name="loras")],
        )

    @classmethod
    def execute(
        cls, lora: str, strength: float, stage: Any, loras: Sequence[LoraSource] = ()
    ) -> io.NodeOutput:
        """Add the LoRA to those of the nodes before."""
        path = folder_paths.get_full_path_or_raise("loras", lora)
        return io.NodeOutput((*loras, LoraSource(path=path, strength=strength, stage=stage)))


class ClipNode(io.ComfyNode):
    """Node whose ``settings`` are checked before anything runs."""

    @classmethod
    def validate_inputs(cls, settings: str | None = None) -> bool | str:
        """Refuse settings that no model has; None comes from another node and is checked later."""
        try:
            changes = expand_shorthands(read_settings(settings or ""))
            parse_config(GenerationConfig, changes, "settings")
        except ConfigError as error:
            return str(error)
        return True


class Generate(ClipNode):
    """A photo and a prompt to a video: both stages."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe inputs and outputs."""
        return io.Schema(
            node_id="SwiftI2VGenerate",
            display_name="SwiftI2V Generate",
            category=CATEGORY,
            description="Turn a photo and a prompt into a video, segment by segment.",
            inputs=[
                Pipeline.Input("pipeline"),
                *photo_inputs(),
                *prompt_inputs(),
                num_frames_input(),
                *size_inputs("0: the photo's aspect, in no more pixels than the model's default."),
                *video_inputs(),
                settings_input(),
            ],
            outputs=video_outputs(),
        )

    @classmethod
    def execute(
        cls,
        pipeline: "SwiftI2VPipeline",
        image: "Tensor",
        fit: "Fit",
        prompt: str,
        seed: int,
        num_frames: int,
        width: int,
        height: int,
        fps: int,
        return_frames: bool,
        settings: str,
    ) -> io.NodeOutput:
        """Generate the clip."""
        from swifti2v.comfyui import clips

        with whole_message():
            config = clips.configure(
                pipeline.config, read_settings(settings), num_frames=num_frames, fps=fps
            )
            photo = clips.to_photo(image)
            config = clips.resize(config, pipeline.size_for(photo, **sides(height, width)))
            photo = clips.fit_photo(photo, config, fit)
            progress = NodeProgress(clips.count_steps(pipeline, config, STAGES))
            segments = pipeline.stream(
                photo, prompt, generator=seed, config=config, on_progress=progress
            )
            return make_outputs(segments, config, progress, return_frames)


class Stage1(ClipNode):
    """A photo and a prompt to a small clip that says how things move."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe inputs and outputs."""
        return io.Schema(
            node_id="SwiftI2VStage1",
            display_name="SwiftI2V Stage I",
            category=CATEGORY,
            description="Make the small clip that decides the motion; try seeds here, then refine.",
            inputs=[
                Pipeline.Input("pipeline"),
                *photo_inputs(),
                *prompt_inputs(),
                num_frames_input(),
                *size_inputs("Side of the video to be refined. 0: as for Generate."),
                settings_input(),
            ],
            outputs=[
                Motion.Output(display_name="motion", tooltip="With Refine, the clip of Generate."),
                io.Image.Output(display_name="frames", tooltip="The clip, to look at or to edit."),
            ],
        )

    @classmethod
    def execute(
        cls,
        pipeline: "SwiftI2VPipeline",
        image: "Tensor",
        fit: "Fit",
        prompt: str,
        seed: int,
        num_frames: int,
        width: int,
        height: int,
        settings: str,
    ) -> io.NodeOutput:
        """Run Stage I."""
        from swifti2v.comfyui import clips

        with whole_message():
            config = clips.configure(
                pipeline.config, read_settings(settings), num_frames=num_frames
            )
            photo = clips.to_photo(image)
            config = clips.resize(config, pipeline.size_for(photo, **sides(height, width)))
            photo = clips.fit_photo(photo, config, fit)
            progress = NodeProgress(clips.count_steps(pipeline, config, ("stage1",)))
            motion = clips.make_motion(pipeline, photo, prompt, seed, config, progress)
            return io.NodeOutput(motion, clips.to_images(motion.frames))


class Refine(ClipNode):
    """A small clip and its photo to a video: Stage II."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe inputs and outputs."""
        return io.Schema(
            node_id="SwiftI2VRefine",
            display_name="SwiftI2V Refine",
            category=CATEGORY,
            description="Make the video that moves like a small clip and looks like the photo.",
            inputs=[
                Pipeline.Input("pipeline"),
                io.MultiType.Input(
                    "motion",
                    types=[Motion, io.Image],
                    tooltip="Output of Stage I, or any 4k + 1 frames of the photo's aspect.",
                ),
                *photo_inputs(),
                *prompt_inputs(),
                *size_inputs("0: the clip's side times the model's Stage I factor."),
                *video_inputs(),
                settings_input(),
            ],
            outputs=video_outputs(),
        )

    @classmethod
    def execute(
        cls,
        pipeline: "SwiftI2VPipeline",
        motion: "MotionReference | Tensor",
        image: "Tensor",
        fit: "Fit",
        prompt: str,
        seed: int,
        width: int,
        height: int,
        fps: int,
        return_frames: bool,
        settings: str,
    ) -> io.NodeOutput:
        """Run Stage II over the clip."""
        from swifti2v.comfyui import clips

        with whole_message():
            reference = clips.to_motion_reference(motion)
            config = clips.configure(pipeline.config, read_settings(settings), fps=fps)
            config = clips.follow_clip(pipeline, config, reference.frames, height, width)
            photo = clips.fit_photo(clips.to_photo(image), config, fit)
            progress = NodeProgress(clips.count_steps(pipeline, config, ("stage2",)))
            segments = clips.refine(pipeline, reference, photo, prompt, seed, config, progress)
            return make_outputs(segments, config, progress, return_frames)


class Upscale(ClipNode):
    """A clip to a larger one, without a photo: Stage II."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe inputs and outputs."""
        return io.Schema(
            node_id="SwiftI2VUpscale",
            display_name="SwiftI2V Upscale",
            category=CATEGORY,
            description="Enlarge a clip with Stage II: noise it to a strength and denoise it.",
            inputs=[
                Pipeline.Input("pipeline"),
                io.Image.Input("images", tooltip="4k + 1 frames."),
                *prompt_inputs(),
                *size_inputs("0: the clip's side times the model's Stage I factor."),
                *video_inputs(),
                settings_input(),
            ],
            outputs=video_outputs(),
        )

    @classmethod
    def execute(
        cls,
        pipeline: "SwiftI2VPipeline",
        images: "Tensor",
        prompt: str,
        seed: int,
        width: int,
        height: int,
        fps: int,
        return_frames: bool,
        settings: str,
    ) -> io.NodeOutput:
        """Enlarge the clip."""
        from swifti2v.comfyui import clips
        from swifti2v.pipelines.upscale import second_pass, upscale

        with whole_message():
            clip = clips.to_frames(images)
            config = clips.configure(second_pass(pipeline.config), read_settings(settings), fps=fps)
            config = clips.follow_clip(pipeline, config, clip, height, width)
            progress = NodeProgress(clips.count_steps(pipeline, config, ("stage2",)))
            segments = upscale(
                pipeline, clip, prompt, config=config, generator=seed, on_progress=progress
            )
            return make_outputs(segments, config, progress, return_frames)


def photo_inputs() -> list[io.Input]:
    """Photo, and the way to fit it to another aspect."""
    return [
        io.Image.Input("image", tooltip="One photo."),
        io.Combo.Input(
            "fit",
            options=["crop", "pad"],
            default="crop",
            tooltip="Way to fit a photo of another aspect.",
        ),
    ]


def prompt_inputs() -> list[io.Input]:
    """Prompt and seed."""
    return [
        io.String.Input("prompt", multiline=True, tooltip="Text that says what happens."),
        io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=True),
    ]


def num_frames_input() -> io.Input:
    """Length of a new clip."""
    return io.Int.Input("num_frames", default=33, min=5, max=100_001, step=4, tooltip="4k + 1.")


def size_inputs(tooltip: str) -> list[io.Input]:
    """Width and height; 0 lets the side follow."""
    return [
        io.Int.Input(side, default=0, min=0, max=16_384, step=32, tooltip=tooltip)
        for side in ("width", "height")
    ]


def video_inputs() -> list[io.Input]:
    """Frame rate, and whether frames are returned beside the file."""
    return [
        io.Int.Input("fps", default=0, min=0, max=240, tooltip="0: the model's."),
        io.Boolean.Input(
            "return_frames",
            default=False,
            tooltip="Also hold all frames in memory as an IMAGE batch: 12 bytes a pixel.",
        ),
    ]


def settings_input() -> io.Input:
    """Text of all other settings."""
    return io.String.Input(
        "settings",
        default="",
        multiline=True,
        tooltip="Fields of GenerationConfig, one a line, such as stage2.segment_size: 5",
    )


def video_outputs() -> list[io.Output]:
    """The video's file, and the frames if they are asked for."""
    return [
        io.Video.Output(display_name="video"),
        io.Image.Output(display_name="frames", tooltip="Needs return_frames."),
    ]


def read_settings(text: str) -> dict[str, Any]:
    """Settings by name from the text of a ``settings`` input.

    Raises:
        ConfigError: The text is not a YAML mapping, or names a setting that has its own input.
    """
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"settings are not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError("settings must be 'name: value' lines, such as stage2.segment_size: 5")
    if named := [name for name in INPUTS_OF_THEIR_OWN if name in values]:
        raise ConfigError(f"settings name {named[0]}, which has its own input; set it there")
    return {str(name): value for name, value in values.items()}


def sides(height: int, width: int) -> dict[str, int | None]:
    """Sides of the output as ``size_for`` takes them; 0 becomes None."""
    return {"height": height or None, "width": width or None}


class NodeProgress:
    """ComfyUI's progress bar and its cancel button, served after each model call.

    Args:
        num_steps: Model calls of the run.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._num_done = 0
        self._execution = ComfyAPISync().execution

    def __call__(self, progress: "Progress") -> None:
        """Count a step; raise ComfyUI's own exception if the user has cancelled the run."""
        del progress
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._num_done += 1
        self._execution.set_progress(self._num_done, self._num_steps)

    def show(self, frame: "Frames") -> None:
        """Show a frame ``[H, W, 3]`` on the node."""
        self._execution.set_progress(
            self._num_done, self._num_steps, preview_image=Image.fromarray(frame)
        )


def make_outputs(
    segments: "Iterator[SegmentOutput]",
    config: GenerationConfig,
    progress: NodeProgress,
    wants_frames: bool,
) -> io.NodeOutput:
    """Write the segments to a file of ComfyUI's temporary folder as they are made."""
    from swifti2v.comfyui import clips

    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"swifti2v_{uuid4().hex}.mp4"
    images = clips.write(segments, config, path, progress.show, wants_images=wants_frames)
    if images is None:
        images = ExecutionBlocker("turn on return_frames to get the frames of this node")
    return io.NodeOutput(InputImpl.VideoFromFile(str(path)), images)


@contextmanager
def whole_message() -> Iterator[None]:
    """Add the notes of an error to its message: ComfyUI shows the message alone."""
    try:
        yield
    except SwiftI2VError as error:
        if notes := getattr(error, "__notes__", ()):
            raise type(error)("; ".join([str(error), *notes])) from error
        raise
