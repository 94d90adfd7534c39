"""Complete the settings of a request: every layer is merged once, before a model is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from swifti2v import __version__
from swifti2v.config import GenerationConfig, merge, parse_config, to_dict
from swifti2v.errors import ConfigError, InputError, ShapeError
from swifti2v.jobs.clip_rate import plan_rate
from swifti2v.jobs.devices import choose_device, find_dtype
from swifti2v.jobs.input_files import InputFiles
from swifti2v.jobs.layers import merge_layers
from swifti2v.jobs.outputs import find_kept_sound, require_writable_outputs
from swifti2v.jobs.placing import place
from swifti2v.jobs.request import RANDOM, ClipRequest, draw_seed
from swifti2v.jobs.settings import (
    FileRecord,
    RunSettings,
    VideoSettings,
    format_color,
    hash_model,
    parse_color,
    read_settings,
)
from swifti2v.jobs.sizes import choose_size
from swifti2v.jobs.work_dir import WorkDir
from swifti2v.media import Frames, load_image, probe_clip, read_clip
from swifti2v.media.sound import Sound
from swifti2v.models.loading.sources import LoraSource, find_model, in_variant, split_variant
from swifti2v.models.runtime.roles import Placement
from swifti2v.models.text import require_text
from swifti2v.pipelines.upscale import second_pass
from swifti2v.sampling import SAMPLING_VERSION
from swifti2v.shapes import TIME_FACTOR, FrameSize, PixelShape, ScaleFactors

DTYPES = ("float32", "bfloat16", "float16")
TIME = ScaleFactors(time=TIME_FACTOR, space=1, patch=1)
"""The frame rule of every Wan VAE, to refuse a clip before a model is loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A request with everything that can be decided without the model's weights."""

    request: ClipRequest
    """Request, which names the output files."""
    settings: RunSettings
    """All that decides the clip."""
    device: torch.device
    """Device that computes."""
    placement: Placement
    """Placement of the weights."""
    photo: Image.Image | None
    """Photo at the size of its file; None for ``upscale``."""
    motion: Frames | None
    """The user's own clip."""
    sound: Sound | None
    """Its sound, which the video keeps."""
    work_dir: WorkDir | None
    """Directory that keeps finished segments."""
    notes: tuple[str, ...]
    """Notes for the user, one sentence each."""


def resolve(request: ClipRequest) -> Resolved:
    """Read the repeated or continued run, merge the layers of settings and read the inputs.

    Raises:
        SwiftI2VError: The request cannot work; nothing was written.
    """
    before = _Before.of(request)
    given = before.merge_layers()
    image, clip = before.find_inputs()
    video = before.find_video()
    require_writable_outputs(request, video, [image, clip])
    color = before.find_background()
    photo = motion = sound = None
    notes: list[str] = []
    if request.command != "upscale":
        photo = load_image(image, background=color)
        source = FrameSize(photo.height, photo.width)
    if clip is not None:
        sound, sound_notes = find_kept_sound(request, video, clip, color)
        motion, changes, notes = _read_motion(clip, given, color)
        notes += sound_notes
        source = FrameSize(*motion.shape[1:3])
        given = merge(given, changes)
    device = choose_device(request.device)
    settings = _make_settings(before, given, image, clip, device)
    require_text([*settings.prompts, settings.config.negative_prompt])
    settings, size_notes = choose_size(settings, given, source)
    placed = place(request, settings, given, device)
    notes += [*size_notes, *([placed.note] if placed.note else [])]
    if settings.preview_decoder is not None:
        path = settings.preview_decoder.path
        notes.append(f"a preview: decoded with {path}, not with the model's VAE")
    return Resolved(
        request=request,
        settings=placed.settings,
        device=device,
        placement=placed.placement,
        photo=photo,
        motion=motion,
        sound=sound,
        work_dir=before.work_dir,
        notes=(*notes, *before.compare(settings)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Before:
    """A request with the video it repeats and the run it continues, which fill its open fields."""

    request: ClipRequest
    like: RunSettings | None
    work_dir: WorkDir | None
    files: InputFiles

    @classmethod
    def of(cls, request: ClipRequest) -> "_Before":
        like = read_settings(request.like) if request.like else None
        if like is not None and like.command != request.command:
            raise InputError(
                f"{request.like} was made by 'swifti2v {like.command}'; repeat it with that command"
            )
        folder = request.work_dir
        return cls(
            request=request,
            like=like,
            work_dir=WorkDir(folder, resume=request.resume) if folder else None,
            files=InputFiles(request.like, folder if request.resume else None),
        )

    @property
    def plan(self) -> Mapping[str, Any]:
        """Plan of the run to continue; empty for a new run."""
        return self.work_dir.stored_plan if self.work_dir else {}

    def merge_layers(self) -> dict[str, Any]:
        """Merge old and new settings; a continued run keeps its size and tile."""
        then: Mapping[str, Any] = self.plan.get("config", {})
        kept: dict[str, Any] = {k: then[k] for k in ("height", "width") if k in then}
        if self.request.memory is not None and "stage2" in then:
            kept["stage2"] = {"vae_tile": then["stage2"]["vae_tile"]}
        if self.like is not None:
            kept = to_dict(self.like.config)
        return merge(kept, merge_layers(self.request.layers))

    def find_inputs(self) -> tuple[Path, Path | None]:
        """Find photo and clip; for ``upscale`` the clip is both."""
        request, like = self.request, self.like
        clip = None
        if request.command != "generate":
            clip = self._find(request.motion, like.motion if like else None, "motion")
            if request.command == "upscale":
                return clip, clip
        return self._find(request.image, like.image if like else None, "image"), clip

    def _find(self, given: Path | None, recorded: FileRecord | None, name: str) -> Path:
        if given is not None:
            stored = self.plan.get(name)
            known = [
                *([recorded.sha256] if recorded else []),
                *([stored["sha256"]] if stored else []),
            ]
            return self.files.named(given, known)
        if recorded is None:
            raise InputError("a photo or a clip is missing; give it, or a video to repeat")
        return self.files.recorded(recorded.path, recorded.sha256, "give it on the command line")

    def find_background(self) -> tuple[int, int, int] | None:
        asked = self.request.background
        if asked is None and self.like is not None:
            asked = self.like.background
        return None if asked is None else parse_color(asked)

    def find_video(self) -> VideoSettings:
        """Find the compression; PNG ignores the repeated video's, as it has no quality."""
        asked = self.request
        before = self.like.video if self.like and asked.codec != "png" else VideoSettings()
        return VideoSettings(
            codec=asked.codec or before.codec,
            crf=asked.crf if asked.crf is not None else before.crf,
            ten_bit=asked.ten_bit or before.ten_bit,
            no_audio=asked.no_audio or before.no_audio,
        )

    def find_seed(self) -> int:
        """The seed asked for, of the run to continue or of the video to repeat, else a random one."""
        asked = self.request.seed
        if asked is not None and asked != RANDOM:
            return asked
        if "seed" in self.plan:
            return int(self.plan["seed"])
        return self.like.seed if self.like is not None and asked is None else draw_seed()

    def find_model(self) -> str:
        """The model; a preset or directory of the user's may lie beside the video or the work dir."""
        given, like = self.request.model, self.like
        name = given if given is not None else (like.model if like else "nano")
        known = like.model_sha256 if like and given is None else self.plan.get("model_sha256")
        model, variant = split_variant(name)
        if known is None or (given is not None and Path(model).exists()):
            return name
        found = self.files.recorded(model, known, "give it with --model", hash_model)
        return in_variant(str(found), variant)

    def find_loras(self) -> tuple[LoraSource, ...]:
        """The LoRAs asked for, or those of the video to repeat, with the hashes of their files."""
        before = self.like.loras if self.like else ()
        if not self.request.loras:
            find = self.files.recorded
            return tuple(
                replace(lora, path=str(find(lora.path, lora.sha256, "give it with --lora")))
                for lora in before
            )
        known = [lora.sha256 for lora in before]
        known += [lora["sha256"] for lora in self.plan.get("loras", ())]
        return tuple(self.files.lora(lora, known) for lora in self.request.loras)

    def compare(self, settings: RunSettings) -> list[str]:
        """Reasons why the clip will differ from the video to repeat."""
        like, name = self.like, self.request.like
        if like is None:
            return []
        notes = []
        if like.preview_decoder is not None and settings.preview_decoder is None:
            notes.append(f"{name} is a preview; this clip is decoded with the model's VAE")
        if like.image.sha256 != settings.image.sha256:
            what = "clip" if settings.command == "upscale" else "photo"
            notes.append(f"the {what} differs from that of {name}: the result will differ")
        if like.sampling_version != settings.sampling_version:
            notes.append(
                f"{name} was made by a version that drew other noise: the result will differ"
            )
        if like.device != settings.device:
            notes.append(f"{name} was made on {like.device}: the clip may differ in detail")
        return notes


def _make_settings(
    before: _Before,
    given: Mapping[str, Any],
    image: Path,
    clip: Path | None,
    device: torch.device,
) -> RunSettings:
    """All settings as asked for; the size may still follow from the inputs."""
    asked, like, model = before.request, before.like, before.find_model()
    defaults: Mapping[str, Any] = find_model(model)[0].settings
    if asked.command == "upscale":
        defaults = to_dict(second_pass(parse_config(GenerationConfig, defaults, model)))
    usual = "bfloat16" if device.type == "cuda" else "float32"
    dtype = find_dtype(asked.dtype or (like.dtype if like else None), device) or usual
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    color, decoder = before.find_background(), asked.preview_decoder
    return RunSettings(
        version=__version__,
        sampling_version=SAMPLING_VERSION,
        command=asked.command,
        model=model,
        model_sha256=hash_model(Path(split_variant(model)[0])),
        prompt=asked.prompt if asked.prompt is not None else (like.prompt if like else ""),
        seed=before.find_seed(),
        image=FileRecord.of(image),
        motion=FileRecord.of(clip) if clip else None,
        fit=asked.fit or (like.fit if like else "crop"),
        background=None if color is None else format_color(color),
        loras=before.find_loras(),
        truncate_prompt=asked.truncate_prompt or bool(like and like.truncate_prompt),
        device=device.type,
        dtype=dtype,
        video=before.find_video(),
        preview_decoder=FileRecord.of(decoder) if decoder else None,
        config=parse_config(GenerationConfig, merge(defaults, given), "settings"),
    )


def _read_motion(
    path: Path, given: Mapping[str, Any], color: tuple[int, int, int] | None
) -> tuple[Frames, dict[str, Any], list[str]]:
    """Read the user's clip, the settings that follow from it (length and rate), and notes."""
    info = probe_clip(path, background=color)
    rate = plan_rate(info, given.get("fps"))
    num_frames = given.get("num_frames", rate.num_frames)
    if rate.num_frames < num_frames:
        raise ShapeError(
            f"clip {path} has {rate.num_frames} frames, fewer than the {num_frames} asked"
        )
    _require_length(path, num_frames, [*info.notes, *rate.notes])
    frames, _ = read_clip(
        path,
        fps=rate.resample_fps,
        max_frames=num_frames,
        min_frames=num_frames,
        background=color,
    )
    notes = [f"{path}: {note}" for note in (*info.notes, *rate.notes)]
    return frames, {"num_frames": num_frames, "fps": rate.fps}, notes


def _require_length(path: Path, num_frames: int, notes: Sequence[str]) -> None:
    if num_frames <= TIME.time:
        raise ShapeError(
            f"clip {path} gives {num_frames} frame(s), at least {TIME.time + 1} are needed; "
            "give a longer clip"
        )
    try:
        PixelShape(num_frames, 1, 1).require_fit(TIME)
    except ShapeError as error:
        first = (num_frames - 1) // TIME.time * TIME.time + 1
        raise ShapeError(
            f"clip {path}: {error}; take its first frames with --num-frames {first}"
            + "".join(f"\n({note})" for note in notes)
        ) from None
