"""Photo and prompt in, segments of native high-resolution video out: both stages as one pipeline."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from swifti2v.config import (
    GenerationConfig,
    SpeedConfig,
    StageName,
    expand_shorthands,
    merge,
    parse_config,
    to_dict,
)
from swifti2v.errors import ConfigError, ShapeError
from swifti2v.media import Frames, image_to_tensor, resize_video
from swifti2v.models.loading.components import (
    STAGES,
    Components,
    find_components,
    save_components,
)
from swifti2v.models.loading.sources import LoraSource
from swifti2v.models.runtime.placement import (
    loading_device,
    place,
    require_loaded,
    require_placement,
)
from swifti2v.models.runtime.roles import STAGE1, STAGE2, Placement
from swifti2v.models.runtime.speed import accelerate, require_prepared
from swifti2v.models.runtime.staging import Staging, stage_components
from swifti2v.models.vae.light_decoder import LightDecoder, TinyStream, load_light_decoder
from swifti2v.models.vae.streaming import StreamingDecoder
from swifti2v.pipelines.conditions import ConditionEncoder
from swifti2v.pipelines.decoding import SegmentDecoder, SegmentOutput
from swifti2v.pipelines.first_frame import make_stage1
from swifti2v.pipelines.pieces import PieceMaker
from swifti2v.pipelines.progress import OnProgress, Stopwatch
from swifti2v.pipelines.sizes import side_multiple
from swifti2v.pipelines.stage1 import Conditions
from swifti2v.pipelines.stage2 import Stage2Pipeline
from swifti2v.pipelines.store import SegmentStore
from swifti2v.pipelines.transition import HybridReference, MotionReference
from swifti2v.shapes import FrameSize, PixelShape, latent_frames, size_of_aspect


@dataclass(frozen=True, slots=True)
class VideoOutput:
    """A whole clip."""

    frames: Frames
    """``[T, H, W, 3]`` uint8."""


class SwiftI2VPipeline:
    """The two stages of SwiftI2V and the encoders they share.

    Args:
        components: The models.
        config: Default settings; a call may change any of them.
        staging: Loads the models of each part of a run when it begins; by default all are there.

    Example:
        >>> pipe = SwiftI2VPipeline.from_pretrained("nano")
        >>> video = pipe(image, "zoom in", num_frames=33, generator=1).frames
    """

    def __init__(
        self, components: Components, config: GenerationConfig, staging: Staging | None = None
    ) -> None:
        self.components = components
        self.config = config
        self.staging = staging or Staging(components)
        self.stage1 = make_stage1(components.stage1_transformer, components.stage1_vae)
        self.stage2 = Stage2Pipeline(components.stage2_transformer, components.stage2_vae)
        self.encoder = ConditionEncoder(components, staging=self.staging)
        self.preview_decoder: LightDecoder | None = None
        """Decoder that replaces Stage II's VAE; None decodes with the VAE."""
        self.staging.on_change = self._bind

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - each is a choice of its own
        cls,
        name: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        placement: Placement = "resident",
        loras: Sequence[LoraSource] = (),
        stages: Sequence[StageName] = STAGES,
        speed: Mapping[StageName, SpeedConfig] | None = None,
        merges_own_loras: bool = True,
        staged: bool = False,
    ) -> "SwiftI2VPipeline":
        """Load both stages.

        Args:
            name: ``"nano"`` (ships with the package), ``"paper"`` (the 2K preset), a YAML preset,
                a directory written by ``save_pretrained`` or a Hub id of one.
            torch_dtype: Weights' type; by default bfloat16 on a GPU and float32 elsewhere.
            device: By default the first GPU, else the CPU.
            placement: ``"streamed"`` holds the weights in host memory and brings them to the
                device when used: slower, for models larger than the device's memory.
                ``"offloaded"`` does so with the VAE's causal history as well.
            loras: LoRAs, each for its stage, merged after the model's own.
            stages: Stages that will run; the weights of another one are not loaded. ``refine`` and
                ``upscale`` need ``"stage2"`` alone.
            speed: Speed settings of the transformers by stage; by default those of the model.
            merges_own_loras: False leaves out the LoRAs that the model names itself.
            staged: True loads the models of each part of a run when it begins and frees them when it
                ends, for every clip anew: text encoder, image encoder, Stage I, Stage II. Memory is
                then that of the largest part, and not of all. Files are looked through at once.

        Raises:
            LoadingError: Something is missing, damaged or does not match its configuration.
            ConfigError: An unknown name or setting.
        """
        require_placement(placement)
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch_dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
        found = find_components(name, loras, stages=stages, merges_own_loras=merges_own_loras)
        given: Any = {stage: {"speed": to_dict(asked)} for stage, asked in (speed or {}).items()}
        config = parse_config(GenerationConfig, merge(found.index.settings, given), str(name))
        speeds: dict[StageName, SpeedConfig] = {s: getattr(config, s).speed for s in STAGES}
        if staged:
            components, staging = stage_components(found, dtype, target, placement, speeds)
            return cls(components, config, staging)
        start = loading_device(target, placement)
        loaded = found.each(lambda role: found.load(role, dtype, start))
        components, _ = found.assemble(loaded, start)
        accelerate(components, speeds, target)
        place(components, target, placement)
        return cls(components, config)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write every component in its own layout and ``model_index.json`` beside them.

        Raises:
            ConfigError: The components are loaded part after part.
        """
        if self.staging.is_staged:
            raise ConfigError(
                "a staged pipeline holds no weights to save; load it with staged=False"
            )
        save_components(self.components, to_dict(self.config), Path(directory))

    def load_preview_decoder(self, path: str | Path) -> None:
        """Decode with a light decoder from now on: faster, smaller, and with less detail.

        Latents do not depend on it: a run that kept them can be decoded again by the VAE.
        ``preview_decoder = None`` returns to the VAE.

        Args:
            path: See ``swifti2v.models.vae.light_decoder.load_light_decoder``.

        Raises:
            LoadingError: The file is not a light decoder, or it belongs to another VAE.
        """
        parts = self.components
        self.preview_decoder = load_light_decoder(path, parts.stage2_vae, parts.device)

    def _bind(self) -> None:
        """Hand each stage the models that stand in the components now."""
        for stage in STAGES:
            pipeline: Any = getattr(self, stage)
            pipeline.transformer = getattr(self.components, f"{stage}_transformer")
            pipeline.vae = getattr(self.components, f"{stage}_vae")

    def configure(self, **changes: Any) -> GenerationConfig:
        """Default settings with changes on top.

        Args:
            changes: Fields of ``GenerationConfig`` or paths to them, or for short:
                ``num_inference_steps``, ``guidance_scale`` (both stages), ``segment_size``,
                ``context_size`` and ``strength`` (Stage II). None keeps the default.

        Raises:
            ConfigError: An unknown name or a value out of range.
        """
        nested = expand_shorthands(changes)
        return parse_config(GenerationConfig, merge(to_dict(self.config), nested), "settings")

    def size_for(
        self, photo: Image.Image, *, height: int | None = None, width: int | None = None
    ) -> FrameSize:
        """Output size for a photo: its own aspect, in no more pixels than the default size.

        Args:
            photo: Only its size is read.
            height: Kept if given; see ``swifti2v.shapes.size_of_aspect``.
            width: Kept if given.
        """
        default = FrameSize(self.config.height, self.config.width)
        multiple = side_multiple(self.stage1.scale, self.stage2.scale, self.config)
        aspect = FrameSize(photo.height, photo.width)
        return size_of_aspect(aspect, multiple, default.num_pixels, height=height, width=width)

    def require_fit(self, config: GenerationConfig, *, with_stage1: bool = True) -> None:
        """Refuse sizes and frame counts that either stage cannot hold, before any work.

        Raises:
            ShapeError: Naming the nearest values that fit.
            ConfigError: Stage II would not see the motion reference, Stage I tells another kind of
                motion, or the transformers were loaded with other 8-bit layers or compilation than
                the settings ask for.
        """
        for stage, loaded in self.components.speed.items():
            require_prepared(loaded, getattr(config, stage).speed, stage)
        pixels = PixelShape(config.num_frames, config.height, config.width)
        if with_stage1:
            # Stage I works at a fraction of the size, so its sides are the stricter rule.
            self.stage1.require_motion(config.stage1)
            stage1 = self.stage1.scale
            pixels.require_fit(stage1._replace(space=stage1.space * config.stage1.downscale))
        stage2, attention = self.stage2.scale, config.stage2.attention
        pixels.require_fit(stage2)
        if attention.kind == "gclf" and attention.pool is not None:
            try:
                pixels.require_fit(stage2._replace(patch=stage2.patch * attention.pool))
            except ShapeError as error:
                error.add_note(f"stage2.attention pools {attention.pool}x{attention.pool} tokens")
                raise
        if not self.stage2.takes_reference and config.stage2.sampling.strength == 1:
            raise ConfigError(
                "stage2.sampling.strength is 1 and this Stage II has no reference channels, so it "
                "would not follow the motion reference; set a strength below 1, such as 0.7"
            )

    def __call__(
        self,
        image: Image.Image,
        prompt: str,
        *,
        generator: torch.Generator | int = 0,
        on_progress: OnProgress | None = None,
        **changes: Any,
    ) -> VideoOutput:
        """Generate a whole clip; see ``stream`` for the arguments.

        The clip is held in memory; for long or large ones use ``stream``.
        """
        segments = self.stream(
            image,
            prompt,
            generator=generator,
            on_progress=on_progress,
            config=self.configure(**changes),
        )
        return VideoOutput(np.concatenate([segment.frames for segment in segments]))

    def stream(
        self,
        image: Image.Image,
        prompt: str,
        *,
        generator: torch.Generator | int = 0,
        config: GenerationConfig | None = None,
        on_progress: OnProgress | None = None,
        stopwatch: Stopwatch | None = None,
        store: SegmentStore | None = None,
    ) -> Iterator[SegmentOutput]:
        """Generate a clip and hand over each segment as soon as it is finished.

        Args:
            image: RGB photo of exactly ``config.width`` x ``config.height`` pixels.
            prompt: Text that says what happens in the video.
            generator: Seed, or a generator whose initial seed is used; noise is drawn for each
                latent frame from the seed and the frame's index.
            config: Settings, by default the model's.
            on_progress: Called between any two model calls; raising in it stops the run.
            stopwatch: Takes the seconds of each stage.
            store: Gets the motion reference and each segment; parts that it holds are not made
                again.

        Yields:
            Segments in order. Nothing but the motion reference is held for the whole clip.

        Raises:
            ShapeError: Sizes that do not fit, before any work.
            PromptError: The prompt is longer than the text encoder takes.
            NumericalError: A model returned NaN or infinity.
        """
        config = config or self.config
        self.require_fit(config)
        stopwatch = stopwatch or Stopwatch()
        conditions = self._conditions(image, prompt, config, stopwatch, store)
        motion_reference = store.load_motion_reference() if store is not None else None
        if motion_reference is None:
            make = self._begin_motion if self.streams_stage1 else self.generate_motion_reference
            motion_reference = make(
                image, conditions, generator, config, on_progress, stopwatch, store
            )
        yield from self.synthesize(
            motion_reference,
            image,
            conditions,
            generator,
            config,
            store=store,
            on_progress=on_progress,
            stopwatch=stopwatch,
        )

    def refine(
        self,
        motion_reference: Frames,
        image: Image.Image,
        prompt: str,
        *,
        generator: torch.Generator | int = 0,
        config: GenerationConfig | None = None,
        on_progress: OnProgress | None = None,
        stopwatch: Stopwatch | None = None,
        store: SegmentStore | None = None,
    ) -> Iterator[SegmentOutput]:
        """Stage II over the user's own low-resolution clip instead of Stage I's.

        Args:
            motion_reference: ``[T, h, w, 3]`` uint8 of the image's aspect; T sets the length.
            image: See ``stream``; the clip's first frame in full detail.
            prompt: See ``stream``.
            generator: See ``stream``.
            config: See ``stream``; its ``num_frames`` must be T.
            on_progress: See ``stream``.
            stopwatch: See ``stream``.
            store: See ``stream``; the motion reference is the user's own, so it is not kept.
        """
        config = config or self.configure(num_frames=len(motion_reference))
        if config.num_frames != len(motion_reference):
            raise ShapeError(
                f"num_frames is {config.num_frames}, but the motion reference has "
                f"{len(motion_reference)} frames"
            )
        self.require_fit(config, with_stage1=False)
        stopwatch = stopwatch or Stopwatch()
        conditions = self._conditions(image, prompt, config, stopwatch, store)
        yield from self.synthesize(
            MotionReference(motion_reference),
            image,
            conditions,
            generator,
            config,
            store=store,
            on_progress=on_progress,
            stopwatch=stopwatch,
        )

    def encode(
        self, image: Image.Image, prompt: str, config: GenerationConfig, stopwatch: Stopwatch
    ) -> Conditions:
        """Text and image embeddings of a run."""
        guided = (
            max(config.stage1.sampling.guidance_scale, config.stage2.sampling.guidance_scale) > 1
        )
        negative = config.negative_prompt if guided else None
        return self.encoder(image, prompt, negative, stopwatch, config.later_prompts)

    def _conditions(
        self,
        image: Image.Image,
        prompt: str,
        config: GenerationConfig,
        stopwatch: Stopwatch,
        store: SegmentStore | None,
    ) -> Conditions:
        """Embeddings that the store holds, or else new ones, which it gets."""
        conditions = store.load_conditions() if store is not None else None
        if conditions is None:
            conditions = self.encode(image, prompt, config, stopwatch)
            if store is not None:
                store.save_conditions(conditions)
        return conditions.to(self.components.device)

    @property
    def streams_stage1(self) -> bool:
        """Whether Stage II begins before Stage I has made its last piece: both are in memory."""
        return not self.staging.is_staged

    @torch.no_grad()
    def generate_motion_reference(
        self,
        image: Image.Image,
        conditions: Conditions,
        generator: torch.Generator | int,
        config: GenerationConfig,
        on_progress: OnProgress | None = None,
        stopwatch: Stopwatch | None = None,
        store: SegmentStore | None = None,
    ) -> MotionReference:
        """Stage I alone, at 1/downscale of the output size.

        A long clip, and one of several prompts, is made in pieces, see ``PieceMaker``.
        """
        with self.staging.hold(*STAGE1):
            motion = self._begin_motion(
                image, conditions, generator, config, on_progress, stopwatch, store
            )
            motion.wait_for(config.num_frames)
            return replace(motion, growth=None)

    @torch.no_grad()
    def _begin_motion(
        self,
        image: Image.Image,
        conditions: Conditions,
        generator: torch.Generator | int,
        config: GenerationConfig,
        on_progress: OnProgress | None,
        stopwatch: Stopwatch | None,
        store: SegmentStore | None,
    ) -> MotionReference:
        """Make the first piece of Stage I's clip; the others are made as they are read."""
        require_loaded(self.components, "stage1_transformer")
        low = config.stage1.downscale
        photo = self._photo(image, config)
        small = resize_video(photo, config.height // low, config.width // low, "area")
        seed = _seed(generator)
        return PieceMaker(
            self.stage1, small, conditions, seed, config, on_progress, store, stopwatch
        ).begin()

    @torch.no_grad()  # between two segments the caller's own setting holds
    def synthesize(
        self,
        motion_reference: MotionReference,
        image: Image.Image,
        conditions: Conditions,
        generator: torch.Generator | int,
        config: GenerationConfig,
        *,
        store: SegmentStore | None = None,
        on_progress: OnProgress | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> Iterator[SegmentOutput]:
        """Stage II alone, from a motion reference; segments in ``store`` are not made again."""
        stopwatch = stopwatch or Stopwatch()
        with self.staging.hold(*STAGE2):
            reference = HybridReference(
                motion_reference,
                self._photo(image, config),
                self.components.stage2_vae,
                config.stage2,
                offloads_history=self.components.offloads_history,
            )
            decoder = SegmentDecoder(self._start_decoder(config), stopwatch)
            has_photo = config.stage2.anchor == "given"
            with closing(reference):
                for finished in self.stage2.stream(
                    reference,
                    conditions,
                    _seed(generator),
                    config.stage2,
                    store,
                    on_progress,
                    stopwatch,
                ):
                    is_first = finished.segment.index == 0
                    anchor = reference.anchor() if is_first and has_photo else None
                    yield decoder.decode(finished, anchor)
            del reference, decoder  # they hold the VAE

    def plan(self, config: GenerationConfig) -> list[tuple[int, int]]:
        """Latent ranges of the segments a run will make."""
        num_latent_frames = latent_frames(config.num_frames, self.stage2.scale.time)
        return [segment.latent_range for segment in config.stage2.plan(num_latent_frames)]

    def _start_decoder(self, config: GenerationConfig) -> TinyStream | StreamingDecoder:
        if self.preview_decoder is not None:
            return self.preview_decoder.start()
        return StreamingDecoder(
            self.components.stage2_vae,
            tile=config.stage2.vae_tile,
            offloads_history=self.components.offloads_history,
        )

    def _photo(self, image: Image.Image, config: GenerationConfig) -> Tensor:
        if image.size != (config.width, config.height):
            raise ShapeError(
                f"the image is {image.width}x{image.height}, the output "
                f"{config.width}x{config.height}; fit it first (swifti2v.media.fit_image)"
            )
        return image_to_tensor(image).to(self.components.device)


def _seed(generator: torch.Generator | int) -> int:
    return generator if isinstance(generator, int) else generator.initial_seed()
