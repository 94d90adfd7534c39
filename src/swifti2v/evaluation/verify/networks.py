"""Checks of networks: encoders, VAEs, and one step of denoising a clip that is known."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from swifti2v.config import GenerationConfig
from swifti2v.evaluation.verify.files import Outlines
from swifti2v.evaluation.verify.findings import Finding, SkippedError, judge
from swifti2v.evaluation.verify.moving_clip import MOTION, SEED, draw_clip
from swifti2v.media import image_to_tensor, resize_video, video_to_frames
from swifti2v.models.fingerprints import fingerprint_model
from swifti2v.models.image_encoder import encode_image
from swifti2v.models.loading.components import load_component
from swifti2v.models.runtime.placement import collect_memory, loading_device, place_model
from swifti2v.models.runtime.roles import Placement
from swifti2v.models.text import encode_prompt
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder
from swifti2v.pipelines.course import draw_course
from swifti2v.pipelines.first_frame import make_stage1
from swifti2v.pipelines.stage1 import Conditions
from swifti2v.pipelines.stage2 import Stage2Pipeline, prepare_window_reference
from swifti2v.pipelines.transition import HybridReference, MotionReference
from swifti2v.sampling import add_noise, draw_noise

NUM_FRAMES = 5
"""Frames of the clip: the photo, and one group of four."""
MAX_LEVELS = 4
"""Noise levels at which denoising is tried."""
LEAST_PSNR = 26.0
"""dB of a frame after encoding and decoding, below which a VAE is off. An assumption: the drawn photo has
hard edges, and Wan's VAEs are not measured on it."""
SPREAD = (0.1, 4.0)
"""Standard deviation of normalized latents: 1 over a VAE's training set. An assumption."""
LEAST_GAIN = 0.8
"""Share of the error of the best guess without a network above which a step of denoising is off."""
FROM_NOISE = 0.97
"""Noise level from which on so little is left of the clip that to beat the guess at all is enough."""
MOST_OVER_REFERENCE = 1.05
"""Error of a transformer that adds to its reference, as a share of the reference's own, above which it is
off."""
CLEAR = 0.6
"""Share of the error with the settings' parameterization at which another one is named."""


@dataclass(kw_only=True, slots=True)
class Trial:
    """A model under examination: what its checks need, and what one hands to the next."""

    outlines: Outlines
    """The components without memory."""
    config: GenerationConfig
    """Settings."""
    dtype: torch.dtype
    """Number type of the weights."""
    device: torch.device
    """Device that computes."""
    placement: Placement
    """Placement of each component while it is loaded."""
    photo: Image.Image
    """Photo at the output size."""
    dropped_loras: set[str]
    """Paths of LoRAs that do not fit."""
    prompt_embeds: Tensor | None = None
    """``[1, L, D]``, once the text encoder was checked."""
    image_embeds: Tensor | None = None
    """``[1, L', D']``, once the image encoder was checked."""

    def load(self, role: str) -> Any:
        """A component on the device, with those of its LoRAs that fit."""
        self.outlines.need(role)
        index, root = self.outlines.index, self.outlines.root
        source = index.components[role]
        fitting = tuple(lora for lora in source.loras if lora.path not in self.dropped_loras)
        home = loading_device(self.device, self.placement)
        model = load_component(role, replace(source, loras=fitting), root, self.dtype, home)
        if isinstance(model, torch.nn.Module):
            place_model(model, self.device, self.placement)
        return model

    @property
    def clip(self) -> Tensor:
        """``[1, 3, T, H, W]`` in [-1, 1] at the output size."""
        return draw_clip(self.photo, NUM_FRAMES)

    def small_clip(self) -> Tensor:
        """The clip at Stage I's size, as Stage I would have made it."""
        low = self.config.stage1.downscale
        return resize_video(self.clip, self.photo.height // low, self.photo.width // low, "area")

    def conditions(self) -> Conditions:
        """Embeddings of the clip.

        Raises:
            SkippedError: The check of the text encoder did not give them.
        """
        if self.prompt_embeds is None:
            raise SkippedError("needs the text encoder, which is off")
        return Conditions(prompt_embeds=self.prompt_embeds, image_embeds=self.image_embeds)


def check_text(trial: Trial) -> Finding:
    """Whether embeddings of prompts are finite, of usual size, told apart, and the same each time."""
    trial.outlines.need("tokenizer")
    encoder, tokenizer = trial.load("text_encoder"), trial.outlines.make("tokenizer")
    length = trial.outlines.index.max_text_length

    def encode(prompt: str) -> Tensor:
        return encode_prompt(encoder, tokenizer, [prompt], length).float()

    first, again, other = encode(MOTION), encode(MOTION), encode("tilt up")
    trial.prompt_embeds = first.to(trial.device)
    used = first[first.abs().sum(dim=-1) > 0]
    values = {
        "rms": _round(used.square().mean().sqrt()),
        "distance of two prompts": _round(_distance(other, first)),
        "distance of two runs": _round(_distance(again, first)),
    }
    causes = {
        "embeddings are not of the usual size: weights of another model, or fp8 scales that were left out": not 1e-3
        < values["rms"]
        < 1e2,
        "two prompts give the same embeddings: weights of another model, or a tokenizer of another": values[
            "distance of two prompts"
        ]
        < 1e-2,
        "the same prompt gives other embeddings: unstable hardware": values["distance of two runs"]
        > 1e-3,
    }
    return judge("text encoder", values, "rms in 0.001 to 100, prompts differ, runs agree", causes)


def check_image(trial: Trial) -> Finding:
    """Whether embeddings of photos are finite, told apart, and the same each time."""
    trial.outlines.need("image_encoder")
    encoder = trial.load("image_encoder")
    if "image_processor" in trial.outlines.index.components:
        processor = trial.outlines.make("image_processor")
    else:
        from swifti2v.models.image_encoder import make_image_processor

        processor = make_image_processor(encoder.config.image_size)
    mirrored = trial.photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    first, again, other = (
        encode_image(encoder, processor, photo).float()
        for photo in (trial.photo, trial.photo, mirrored)
    )
    trial.image_embeds = first.to(trial.device)
    values = {
        "rms": _round(first.square().mean().sqrt()),
        "distance of two photos": _round(_distance(other, first)),
        "distance of two runs": _round(_distance(again, first)),
    }
    causes = {
        "embeddings are not finite or not of the usual size: weights of another model": not 1e-3
        < values["rms"]
        < 1e3,
        "two photos give the same embeddings: weights of another model": values[
            "distance of two photos"
        ]
        < 1e-3,
        "the same photo gives other embeddings: unstable hardware": values["distance of two runs"]
        > 1e-3,
    }
    return judge("image encoder", values, "finite, photos differ, runs agree", causes)


def check_vae(trial: Trial, stage: str) -> Finding:
    """A photo and a clip through a VAE and back, and the statistics of its latents."""
    role = f"{stage}_vae"
    vae = trial.load(role)
    clip = (trial.clip if stage == "stage2" else trial.small_clip()).to(trial.device)
    tile = trial.config.stage2.vae_tile if stage == "stage2" else None
    with torch.no_grad():
        latents = StreamingEncoder(vae, tile=tile).encode(clip)
        back = StreamingDecoder(vae, tile=tile).decode(latents)
    error = (back.float().clamp(-1, 1) - clip).square().mean(dim=(0, 1, 3, 4))
    psnr = [_round(10 * math.log10(4 / max(float(value), 4e-10)), 1) for value in error]
    values = {
        "photo dB": psnr[0],
        "clip dB": min(psnr),
        "latents mean": _round(latents.mean()),
        "latents deviation": _round(latents.std()),
    }
    low, high = SPREAD
    twin = _is_other_stages(trial, stage, vae)
    causes = {
        f"swapped VAEs: {role} holds the weights of the other stage's, from another source": twin,
        "encoder and decoder do not belong together, or weights of another VAE": not values[
            "clip dB"
        ]
        >= LEAST_PSNR,
        "wrong latent statistics: latents_mean and latents_std are those of another VAE": not (
            low < values["latents deviation"] < high and abs(values["latents mean"]) < 2
        ),
    }
    return judge(
        f"VAE of {stage}",
        values,
        f"at least {LEAST_PSNR:g} dB, latents near mean 0, deviation 1",
        causes,
    )


def _is_other_stages(trial: Trial, stage: str, vae: Any) -> bool:
    """Whether a VAE that is to be another one than the other stage's is the same all the same."""
    other = "stage1_vae" if stage == "stage2" else "stage2_vae"
    components = trial.outlines.index.components
    if components[other] == components[f"{stage}_vae"] or not any(True for _ in vae.parameters()):
        return False
    try:
        return fingerprint_model(vae) == fingerprint_model(trial.load(other))
    except SkippedError:
        return False


def check_denoising(trial: Trial, stage: str) -> Finding:
    """Whether one step from several noise levels comes nearer to a known clip than any plain guess."""
    conditions = trial.conditions()
    transformer, vae = trial.load(f"{stage}_transformer"), trial.load(f"{stage}_vae")
    run = _denoise_stage1 if stage == "stage1" else _denoise_stage2
    settings = getattr(trial.config, stage)
    own = settings.sampling.parameterization
    other = "reference_residual" if own == "velocity" else "velocity"
    is_fixed = stage == "stage1" and settings.motion == "displacement"
    found: dict[str, _Errors] = {}
    for kind in (own,) if is_fixed else (own, other):
        asked = replace(settings, sampling=replace(settings.sampling, parameterization=kind))
        found[kind] = run(trial, asked, transformer, vae, conditions)
    del transformer, vae
    collect_memory(trial.device)
    mine = found[own]
    is_off = mine.worst > 1
    is_other_better = other in found and found[other].worst < CLEAR * mine.worst
    causes = {
        "the prediction is not finite: damaged weights, or a number type that overflows": not math.isfinite(
            mine.worst
        ),
        f"wrong prediction type: the settings say {own}, the weights predict {other}": is_off
        and is_other_better,
        f"{stage}_transformer does not denoise latents of {stage}_vae: wrong or swapped VAE, wrong latent "
        "statistics, a wrong LoRA, or weights that are not trained": is_off
        or mine.over_reference > MOST_OVER_REFERENCE,
    }
    values = {f"error at {level:.3g}": ratio for level, ratio in mine.ratios.items()}
    if mine.over_reference:
        values["share of the reference's error"] = _round(mine.over_reference)
    expected = (
        f"error below {LEAST_GAIN:g} of the best guess without a network, at each noise level "
        f"(below 1 from {FROM_NOISE:g})"
    )
    return judge(f"denoising of {stage}", values, expected, causes)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Errors:
    """Errors of one step of denoising."""

    ratios: dict[float, float]
    """By noise level, as a share of the error that is had without a network."""
    over_reference: float
    """The largest, as a share of the reference's own; 0 where nothing is added to a reference."""

    @property
    def worst(self) -> float:
        """The largest ratio, as a share of what is allowed at its level."""
        return max(
            ratio / (1 if level >= FROM_NOISE else LEAST_GAIN)
            for level, ratio in self.ratios.items()
        )


def _levels(sampling: Any) -> list[float]:
    """Noise levels that the run has, a few of them from the first to the last."""
    known = sampling.plan_sigmas()[:-1]
    count = min(MAX_LEVELS, len(known))
    return [known[i * (len(known) - 1) // max(1, count - 1)] for i in range(count)]


def _try_levels(
    clean: Tensor,
    stage: Any,
    sampling: Any,
    predict: Callable[[Tensor, float], Tensor],
    reference: Tensor | None = None,
) -> _Errors:
    """Errors of the clean frames after one step from each level.

    Args:
        clean: ``[1, C, F, h, w]`` of the frames that are denoised; the first of the clip is given.
        stage: Of the noise.
        sampling: Settings.
        predict: ``(noisy, sigma) -> velocity`` of these frames.
        reference: Like ``clean``, what Stage II is shown of them.
    """
    _, channels, frames, height, width = clean.shape
    size = (channels, height, width)
    noise = draw_noise(size, range(1, frames + 1), SEED, clean.device, stage=stage)
    ratios, over_reference = {}, 0.0
    for sigma in _levels(sampling):
        noisy = add_noise(clean, noise, sigma)
        error = (noisy - sigma * predict(noisy, sigma) - clean).norm()
        ratios[sigma] = _round(error / _plain_error(clean, noisy))
        if reference is not None and sampling.parameterization == "reference_residual":
            over_reference = max(over_reference, float(error / (reference - clean).norm()))
    return _Errors(ratios=ratios, over_reference=over_reference)


def _plain_error(clean: Tensor, noisy: Tensor) -> Tensor:
    """Least error of a multiple of the noisy latents: what needs no network."""
    scale = (noisy * clean).sum() / noisy.square().sum()
    error: Tensor = (scale * noisy - clean).norm()
    return error


def _denoise_stage1(
    trial: Trial, config: Any, transformer: Any, vae: Any, conditions: Conditions
) -> _Errors:
    pipeline = make_stage1(transformer, vae)
    clip = trial.small_clip().to(trial.device)
    course = draw_course(NUM_FRAMES, SEED)
    photo = clip[:, :, :1]
    with torch.no_grad():
        clean = StreamingEncoder(vae).encode(clip)
        after = pipeline.continue_image(photo, course, config)
        condition = pipeline.prepare_condition(photo, after)
        velocity = pipeline.velocity(condition, conditions, _plain(config), photo, course, _ignore)

        def predict(noisy: Tensor, sigma: float) -> Tensor:
            level = torch.full((1, clean.shape[2]), sigma, device=clean.device)
            level[:, : int(pipeline.shows_given)] = 0
            start = clean[:, :, :1]
            if not pipeline.shows_given:  # the photo's own frame is noised as well
                size = (clean.shape[1], *clean.shape[3:])
                first = draw_noise(size, [0], SEED, clean.device, stage="stage1")
                start = add_noise(start, first, sigma)
            return velocity(torch.cat([start, noisy], dim=2), level)[:, :, -noisy.shape[2] :]

        return _try_levels(clean[:, :, 1:], "stage1", config.sampling, predict)


def _denoise_stage2(
    trial: Trial, config: Any, transformer: Any, vae: Any, conditions: Conditions
) -> _Errors:
    pipeline = Stage2Pipeline(transformer, vae)
    motion = MotionReference(video_to_frames(trial.small_clip()))
    photo = image_to_tensor(trial.photo).to(trial.device)
    config = _plain(replace(config, anchor="given"))
    reference = HybridReference(motion, photo, vae, config)
    with torch.no_grad():
        clean = StreamingEncoder(vae, tile=config.vae_tile).encode(trial.clip.to(trial.device))
        (segment, *_) = config.plan(clean.shape[2])
        window = reference.latents(segment.window)
        given = clean[:, :, : len(segment.given)]
        condition = prepare_window_reference(given, window, config)
        velocity = pipeline.velocity(segment, condition, conditions, config)

        def predict(noisy: Tensor, sigma: float) -> Tensor:
            level = torch.full((1, len(segment.window)), sigma, device=clean.device)
            level[:, : len(segment.given)] = 0
            output = velocity(torch.cat([given, noisy], dim=2), level)
            return output[:, :, -noisy.shape[2] :]

        targets = clean[:, :, list(segment.target)]
        shown = window[:, :, len(segment.given) :]
        return _try_levels(targets, "stage2", config.sampling, predict, shown)


def _plain(config: Any) -> Any:
    """Settings without guidance, which needs another prompt and changes what one step predicts."""
    return replace(config, sampling=replace(config.sampling, guidance_scale=1.0))


def _ignore(displacement: Tensor) -> None:
    del displacement


def _distance(one: Tensor, other: Tensor) -> Tensor:
    distance: Tensor = (one - other).norm() / other.norm()
    return distance


def _round(value: Tensor | float, digits: int = 4) -> float:
    return round(float(value), digits)
