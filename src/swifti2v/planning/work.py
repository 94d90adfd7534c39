"""Costs of a clip by stage: the pipeline's own steps on meta tensors at their true size.

Equal layers and equal latent frames are counted once and multiplied, which is exact.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swifti2v.config import AttentionConfig, GenerationConfig
from swifti2v.media import video_to_frames
from swifti2v.models.vae.streaming import scale_factors
from swifti2v.pipelines.carrying import flow_size
from swifti2v.pipelines.course import even_course
from swifti2v.pipelines.first_frame import make_stage1
from swifti2v.pipelines.stage1 import Stage1Pipeline
from swifti2v.pipelines.stage2 import predict_window
from swifti2v.pipelines.transition import MotionReference, ReferenceFrames
from swifti2v.planning.costs import ClipWork, Count, CountedStage, StageWork, extrapolate
from swifti2v.planning.counting import META, count
from swifti2v.planning.models import Models
from swifti2v.planning.streams import STEADY, StreamWork, Tiling, count_decoder, count_encoder
from swifti2v.segments import Segment
from swifti2v.shapes import LatentShape, PixelShape, ScaleFactors

SEARCH_SECONDS = 1.3e-6
"""Seconds of one core to search flow there and back at a pixel: 80 ms for 320x192, measured on a
shared Xeon core (65 to 95 ms by the frame)."""


class ClipCounter:
    """Counts the clips of one model and one setting, with and without VAE tiles.

    Args:
        models: The components.
        config: Settings; ``stage2.vae_tile`` is not read, and attention counts as full.
        with_stage1: Whether Stage I runs.

    Raises:
        ShapeError: The size or the frame count does not fit the model.
    """

    def __init__(
        self, models: Models, config: GenerationConfig, *, with_stage1: bool = True
    ) -> None:
        self.models = models
        stage2 = replace(config.stage2, attention=AttentionConfig())
        self.config = config = replace(config, stage2=stage2)
        patch1, patch2 = (
            models.get(f"{stage}_transformer", 1).config["patch_size"][1]
            for stage in ("stage1", "stage2")
        )
        vae1, vae2 = models.get("stage1_vae"), models.get("stage2_vae")
        low = config.stage1.downscale
        pixels = PixelShape(config.num_frames, config.height, config.width)
        scale1, scale2 = scale_factors(vae1, patch1), scale_factors(vae2, patch2)
        self.large = LatentShape.from_pixel_shape(pixels, scale2, vae2.config["z_dim"])
        nothing = StageWork(count=Count(), passes={})
        self._common: dict[CountedStage, StageWork] = {
            "text": self._count_text(),
            "image": nothing,
            "stage1": nothing,
        }
        if with_stage1:
            pixels.require_fit(scale1._replace(space=scale1.space * low))
            sizes = Counter(piece.num_frames for piece in config.plan_pieces())
            self._common |= self._count_pieces(sizes, scale1, vae1.config["z_dim"])
        self.segments = config.stage2.plan(self.large.num_frames)
        self._common["stage2"] = self._count_stage2()
        self._weights = {
            role: models.weights(role) for role in models.architectures if self._twin(role) == role
        }

    @cache  # noqa: B019 - a counter lives for one plan
    def count(self, vae_tile: int | None = None, *, offloads_history: bool = False) -> ClipWork:
        """Work of the clip.

        Args:
            vae_tile: Longest side of Stage II's VAE tiles in latent cells; None for whole frames.
            offloads_history: See ``StreamingDecoder``.
        """
        vae, size = self.models.get("stage2_vae"), self.large[2:]
        tiling = Tiling(tile=vae_tile, offloads_history=offloads_history)
        # As HybridReference does: a frame at a time, or the new ones of a segment at once.
        encoded = [1] * self.large.num_frames
        if offloads_history:
            first, *others = self._piece_sizes
            encoded = [length for length in (1, first - 1, *others) if length]
        encoder = count_encoder(vae, size, encoded, tiling)
        decoder = count_decoder(vae, size, self._piece_sizes, tiling)
        reference = self._count_reference(encoder, max(encoded))
        decode = self._count_decode(decoder)
        waiting = encoder.pinned_bytes + decoder.pinned_bytes
        config = self.config
        clip_bytes = 3 * config.num_frames * config.height * config.width
        return ClipWork(
            stages={**self._common, "reference": reference, "decode": decode},
            weights=self._weights,
            vae_tile=vae_tile,
            offloads_history=offloads_history,
            host_bytes=waiting + clip_bytes * (1 / config.stage1.downscale**2 + 1),
            search_seconds=self._search_seconds(),
            num_segments=len(self.segments),
            shared={r: self._twin(r) for r in self.models.architectures if self._twin(r) != r},
        )

    def _twin(self, role: str) -> str:
        return self.models.index.twin(role)

    def _search_seconds(self) -> float:
        config = self.config
        if config.stage2.reference_detail != "carried":
            return 0
        low = config.stage1.downscale
        height, width = flow_size(config.height // low, config.width // low)
        return SEARCH_SECONDS * height * width * (config.num_frames - 1)

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.models.name

    @property
    def linear(self) -> Mapping[str, str]:
        """Kind of the linear layers by component."""
        return self.models.linear

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of Stage II's latents."""
        return self.large[2:]

    @property
    def _piece_sizes(self) -> list[int]:
        """Latent frames of each segment as they are decoded: the anchor comes with the first."""
        sizes = [len(segment.target) for segment in self.segments]
        return [sizes[0] + (self.config.stage2.anchor == "given"), *sizes[1:]]

    @property
    def _is_guided(self) -> bool:
        config = self.config
        return max(stage.sampling.guidance_scale for stage in (config.stage1, config.stage2)) > 1

    def _count_pieces(
        self, sizes: Mapping[int, int], scale: ScaleFactors, channels: int
    ) -> dict[CountedStage, StageWork]:
        """Stage I and its inputs, for so many pieces of each number of frames."""
        config, works = self.config, []
        low = config.stage1.downscale
        for num_frames, times in sizes.items():
            pixels = PixelShape(num_frames, config.height // low, config.width // low)
            self.small = LatentShape.from_pixel_shape(pixels, scale, channels)
            works += [(self._count_image(), self._count_stage1())] * times
        images, clips = zip(*works, strict=True)
        return {"image": _add_work(images), "stage1": _add_work(clips)}

    def _count_text(self) -> StageWork:
        ids = torch.empty(1, self.models.index.max_text_length, dtype=torch.long, device=META)
        cost = self.models.count_layers(
            "text_encoder", lambda m: m(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        )
        num_prompts = 1 + len(self.config.later_prompts) + self._is_guided
        return StageWork(
            count=replace(cost * num_prompts, kept_bytes=0), passes={"text_encoder": num_prompts}
        )

    def _count_image(self) -> StageWork:
        """CLIP, and the photo with the empty frames behind it through Stage I's VAE."""
        config = self.config
        cost, passes = Count(), {self._twin("stage1_vae"): self.small.num_frames}
        if "image_encoder" in self.models.architectures:
            side = self.models.get("image_encoder", 1).config.image_size
            pixels = torch.empty(1, 3, side, side, dtype=self.models.dtype, device=META)
            cost = self.models.count_layers(
                "image_encoder",
                lambda m: m(pixel_values=pixels, output_hidden_states=True).hidden_states[-2],
            )
            passes["image_encoder"] = 1
        pipeline = self._stage1()
        height, width = config.height, config.width
        low = config.stage1.downscale
        image = torch.empty(1, 3, 1, height // low, width // low, device=META)
        time = pipeline.scale.time
        encode = _count_frames(
            lambda n: pipeline.prepare_condition(
                image, image.expand(-1, -1, time * (n - 1), -1, -1)
            ),
            self.small.num_frames,
        )
        return StageWork(count=replace(cost + encode, kept_bytes=0), passes=passes)

    def _count_stage1(self) -> StageWork:
        sampling = self.config.stage1.sampling
        num_steps = sampling.num_calls
        num_calls = num_steps * (2 if sampling.guidance_scale > 1 else 1)
        forward = self.models.count_layers("stage1_transformer", self._run_stage1)
        pipeline = self._stage1()
        decode = _count_frames(
            lambda n: pipeline.decode(_empty(self.small._replace(num_frames=n))),
            self.small.num_frames,
        )
        calls = replace(forward, kept_bytes=0) * num_calls
        moved = self._count_displacement(pipeline) * num_steps
        return StageWork(
            count=replace(calls + moved + decode, kept_bytes=0),
            passes={
                self._twin("stage1_transformer"): num_calls,
                self._twin("stage1_vae"): self.small.num_frames,
            },
            is_float8=self.models.linear.get("stage1_transformer") == "float8",
        )

    def _count_displacement(self, pipeline: Stage1Pipeline) -> Count:
        """Moving the photo and encoding that, once a step."""
        if self.config.stage1.motion == "latents":
            return Count()
        low = self.config.stage1.downscale
        photo = torch.empty(
            1, 3, 1, self.config.height // low, self.config.width // low, device=META
        )
        shape = self.small._replace(channels=pipeline.transformer.config["out_channels"])

        def read(number: int) -> Tensor:
            output = _empty(shape._replace(num_frames=number))
            course = even_course(pipeline.scale.time * (number - 1) + 1)
            displacement = pipeline.read_displacement(output, course)
            still = _empty(self.small._replace(num_frames=number))
            return pipeline.add_to_moved(output, displacement, photo, still)

        return _count_frames(read, self.small.num_frames)

    def _stage1(self) -> Stage1Pipeline:
        models = self.models
        return make_stage1(models.get("stage1_transformer", 1), models.get("stage1_vae"))

    def _run_stage1(self, transformer: Any) -> Tensor:
        config, dtype = transformer.config, self.models.dtype
        pipeline = make_stage1(transformer, self.models.get("stage1_vae"))
        num_channels = pipeline.scale.time + self.small.channels
        condition = _empty(self.small._replace(channels=num_channels))
        image = None
        if config.get("image_dim") is not None:
            side, patch = (
                getattr(self.models.get("image_encoder", 1).config, name)
                for name in ("image_size", "patch_size")
            )
            num_tokens = (side // patch) ** 2 + 1
            image = torch.empty(1, num_tokens, config["image_dim"], dtype=dtype, device=META)
        sigma = torch.empty(1, self.small.num_frames, device=META)
        prompt = self._prompt(config)
        return pipeline.predict(_empty(self.small), condition, sigma, prompt, image)

    def _prompt(self, config: Any) -> Tensor:
        size = (1, self.models.index.max_text_length, config["text_dim"])
        return torch.empty(size, dtype=self.models.dtype, device=META)

    def _count_stage2(self) -> StageWork:
        sampling = self.config.stage2.sampling
        num_calls = sampling.num_calls * (2 if sampling.guidance_scale > 1 else 1)
        total = Count()
        sizes = {segment: (len(segment.window), len(segment.given)) for segment in self.segments}
        for size, times in Counter(sizes.values()).items():
            segment = next(segment for segment, numbers in sizes.items() if numbers == size)
            run = partial(self._run_stage2, segment)
            forward = self.models.count_layers("stage2_transformer", run, least=2)
            total += forward * (times * num_calls)
        return StageWork(
            count=replace(total, kept_bytes=0),
            passes={self._twin("stage2_transformer"): len(self.segments) * num_calls},
            is_float8=self.models.linear.get("stage2_transformer") == "float8",
        )

    def _run_stage2(self, segment: Segment, transformer: Any) -> Tensor:
        num_frames = len(segment.window)
        shape = LatentShape(transformer.config["in_channels"], num_frames, *self.large[2:])
        sigma = torch.empty(1, num_frames, device=META)
        prompt = self._prompt(transformer.config)
        num_given = len(segment.given) if self.config.stage2.speed.skips_given else 0
        return predict_window(
            transformer, segment, _empty(shape), sigma, prompt, self.config.stage2, num_given
        )

    def _count_reference(self, encoder: StreamWork, most: int) -> StageWork:
        """Enlarging and encoding, at most ``most`` latent frames at a time."""
        enlarge, num_frames = self._enlarging, self.large.num_frames
        encode = encoder.count
        frame = enlarge.kept_bytes
        joined = enlarge.peak_bytes + (2 * most - 2) * frame  # pieces, and all of them as one
        peak = max(joined + encode.kept_bytes, most * frame + encode.peak_bytes)
        total = enlarge * (num_frames - 1) + encode
        return StageWork(
            count=replace(total, peak_bytes=peak, kept_bytes=encode.kept_bytes),
            passes={self._twin("stage2_vae"): num_frames},
        )

    @cached_property
    def _enlarging(self) -> Count:
        """Enlarging the frames of one latent frame; tiles do not change it."""
        config, low = self.config, self.config.stage1.downscale
        time = self.models.get("stage2_vae").config["scale_factor_temporal"]
        small = np.zeros((time + 1, config.height // low, config.width // low, 3), np.uint8)
        photo = torch.empty(1, 3, 1, config.height, config.width, device=META)
        motion = torch.zeros(time + 1, 2, *small.shape[1:3])  # given, so that nothing is searched
        frames = ReferenceFrames(MotionReference(small, motion), photo, config.stage2)
        return _count_again(lambda: frames.read(1, time + 1))

    def _count_decode(self, decoder: StreamWork) -> StageWork:
        """Decoding a segment at a time, and its frames in 8 bits."""
        config, decode = self.config, decoder.count
        time = self.models.get("stage2_vae").config["scale_factor_temporal"]
        most = max(time * size - (time - 1) * (i == 0) for i, size in enumerate(self._piece_sizes))
        video = torch.empty(1, 3, most, config.height, config.width, device=META)
        convert = count(lambda: video_to_frames(video))
        peak = max(decode.peak_bytes, video.nbytes + convert.peak_bytes + decode.kept_bytes)
        total = decode + convert * (config.num_frames / most)
        return StageWork(
            count=replace(total, peak_bytes=peak, kept_bytes=decode.kept_bytes),
            passes={self._twin("stage2_vae"): self.large.num_frames},
        )


def _empty(shape: LatentShape, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(1, *shape, dtype=dtype, device=META)


def _add_work(works: Sequence[StageWork]) -> StageWork:
    """Work of one after the other."""
    passes: Counter[str] = Counter()
    for work in works:
        passes.update(work.passes)
    count = sum((work.count for work in works[1:]), works[0].count)
    return replace(works[0], count=count, passes=dict(passes))


def _count_frames(run: Callable[[int], object], num_frames: int) -> Count:
    """Cost of ``run`` for a number of latent frames, from two small numbers of them."""
    if num_frames <= STEADY + 1:
        return _count_again(partial(run, num_frames))
    first, second = (_count_again(partial(run, number)) for number in (STEADY, STEADY + 1))
    return extrapolate(first, second, num_frames - STEADY)


def _count_again(run: Callable[[], object]) -> Count:
    """Cost of ``run`` after it ran before: constants that are made once belong to no clip."""
    count(run)
    return count(run)
