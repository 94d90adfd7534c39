"""ComfyUI nodes in its V3 schema: load a model, add a LoRA, generate, Stage I, refine, upscale.

ComfyUI imports this when it starts; torch and diffusers come when a node runs.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management
import folder_paths
from comfy_api.v0_0_2 import ComfyExtension, io

from swifti2v.comfyui.inputs import (
    num_frames_input,
    photo_inputs,
    prompt_inputs,
    read_settings,
    settings_input,
    size_inputs,
    video_inputs,
    video_outputs,
)
from swifti2v.comfyui.runs import NodeProgress, make_outputs, whole_message
from swifti2v.config import GenerationConfig, expand_shorthands, parse_config
from swifti2v.errors import ConfigError
from swifti2v.models.loading.models_dir import VARIABLE
from swifti2v.models.loading.sources import LoraSource

if TYPE_CHECKING:
    from torch import Tensor

    from swifti2v.media.images import Fit
    from swifti2v.models.runtime.roles import Placement
    from swifti2v.pipelines.transition import MotionReference
    from swifti2v.pipelines.two_stage import SwiftI2VPipeline

CATEGORY = "SwiftI2V"
Pipeline = io.Custom("SWIFTI2V_PIPELINE")
Loras = io.Custom("SWIFTI2V_LORAS")
Motion = io.Custom("SWIFTI2V_MOTION")


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
                    tooltip="nano, paper, vibe, a YAML preset, a directory or a Hub id; paper:fp8 and "
                    "paper:gguf-q4 take smaller files, those of ComfyUI's models folder first.",
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
        cls, model: str, dtype: str, placement: "Placement", loras: Sequence[LoraSource] = ()
    ) -> io.NodeOutput:
        """Load the model; ComfyUI's own models make room for it."""
        from swifti2v.comfyui import clips

        comfy.model_management.unload_all_models()
        with whole_message():
            os.environ.setdefault(VARIABLE, folder_paths.models_dir)
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
            changes = {**read_settings(settings), "num_frames": num_frames, "fps": fps or None}
            photo, config = clips.prepare(pipeline, image, fit, height, width, changes)
            progress = NodeProgress(clips.count_steps(pipeline, config, ("stage1", "stage2")))
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
            changes = {**read_settings(settings), "num_frames": num_frames}
            photo, config = clips.prepare(pipeline, image, fit, height, width, changes)
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
            changes = {**read_settings(settings), "fps": fps or None}
            config = clips.configure(pipeline.config, changes)
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
            changes = {**read_settings(settings), "fps": fps or None}
            config = clips.configure(second_pass(pipeline.config), changes)
            config = clips.follow_clip(pipeline, config, clip, height, width)
            progress = NodeProgress(clips.count_steps(pipeline, config, ("stage2",)))
            segments = upscale(
                pipeline, clip, prompt, config=config, generator=seed, on_progress=progress
            )
            return make_outputs(segments, config, progress, return_frames)
