"""Check a request with all that it uploads, in a process of its own that has little to lose.

``python -m swifti2v.serving.checking SETTINGS`` loads PyTorch and the outlines of the models once. For
each line of JSON on its stdin it forks a child, which may use so much time and memory and no more; the
child decodes the uploads, checks the whole request as the command line does, and leaves the pixels
alone in the job's folder: no other process reads a file that a client sent. The answer is one line.
"""

import json
import os
import re
import resource
import selectors
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from PIL import Image

from swifti2v.config import GenerationConfig, parse_config
from swifti2v.errors import (
    ConfigError,
    InputError,
    MediaError,
    PromptError,
    ShapeError,
    SwiftI2VError,
)
from swifti2v.jobs.check import Job, check
from swifti2v.jobs.placing import plan_run
from swifti2v.jobs.resolve import Resolved, resolve
from swifti2v.media import open_writer, probe_clip
from swifti2v.media.photo_files import open_photo
from swifti2v.models.fingerprints import MOTIONS_KEY
from swifti2v.models.loading.components import load_tokenizer
from swifti2v.models.loading.sources import find_model
from swifti2v.models.loading.sources import resolve as find_source
from swifti2v.models.text import quote_prompt
from swifti2v.pipelines.outline import outline_pipeline
from swifti2v.pipelines.sizes import side_multiple
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.planning.plans import Wish
from swifti2v.serving.clip_order import SOURCE, ClipOrder, JobFolder
from swifti2v.serving.schemas import VideoRequest
from swifti2v.serving.settings import Limits, ServerSettings

CODES = (
    (ShapeError, "invalid_size"),
    (MediaError, "invalid_media"),
    (PromptError, "invalid_prompt"),
    (ConfigError, "invalid_setting"),
    (InputError, "invalid_input"),
)
"""``error.code`` of what a client did wrong, the first that fits."""
API_NAMES = {"steps": "num_inference_steps", "image": "input_reference", "lora": "loras"}
"""Fields that are not called like their option of the command line."""
PARAMS = {
    "invalid_size": "size",
    "invalid_media": "input_reference",
}
"""Fields that errors are about which name none."""
INTERNAL_ERROR = "internal_error"
SPARE_SECONDS = 90
"""Beyond the processor time, for a child that waits for a disk, or for its turn on a busy machine."""


class Answer(TypedDict, total=False):
    """Facts of a request that can be made, or an error."""

    error: str
    code: str
    param: str | None
    """Field of the request that is meant."""
    facts: dict[str, Any]
    """Columns of ``NewJob``."""
    memory_bytes: int
    """Predicted peak of the device, where it was asked for."""
    models: dict[str, dict[str, Any]]
    """Facts of each model, by name; said once, when the process is ready."""


TOO_MUCH = Answer(
    error="the uploaded files take too much memory or time to read; send smaller ones",
    code="invalid_media",
)


def main() -> None:
    """Answer lines of stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server says when to end
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    torch.set_num_threads(1)  # no pool of threads that a fork would lack
    Image.init()  # loads its plugins here, not in each child
    server = ServerSettings.from_json(sys.argv[1])
    try:
        outlines = {name: outline(model) for name, model in server.model_names.items()}
        ready = Answer(models={name: describe_model(pipe) for name, pipe in outlines.items()})
    except SwiftI2VError as error:
        ready = Answer(error=str(error))
    print(json.dumps(ready), file=answers, flush=True)
    check_one = partial(answer, server=server, outlines=outlines)
    for number, found in answer_side_by_side(sys.stdin.fileno(), check_one, server.limits):
        print(json.dumps({**found, "number": number}), file=answers, flush=True)


def answer_side_by_side(
    questions: int, function: Callable[[Mapping[str, Any]], Answer], limits: Limits
) -> Iterator[tuple[int, Answer]]:
    """Answer lines of JSON, each as soon as its child has finished; yields numbers and answers.

    Args:
        questions: File descriptor of the lines; the answers end with it.
        function: Called with a question, in a process of its own.
        limits: Limits of time and memory of each.
    """
    sources = selectors.DefaultSelector()
    sources.register(questions, selectors.EVENT_READ)
    rest = b""
    while True:
        for source, _ in sources.select():
            received = os.read(source.fd, 1 << 16)
            child: _Child | None = source.data
            if child is None:
                if not received:
                    return
                *lines, rest = (rest + received).split(b"\n")
                for line in lines:
                    begun = _start_child(json.loads(line), function, limits)
                    sources.register(begun.pipe, selectors.EVENT_READ, begun)
            elif received:
                child.text += received
            else:
                sources.unregister(child.pipe)
                os.close(child.pipe)
                os.waitpid(child.pid, 0)
                # One that was killed says nothing.
                yield child.number, json.loads(child.text) if child.text else TOO_MUCH


@dataclass(kw_only=True, slots=True)
class _Child:
    """A process that checks one request."""

    number: int
    pid: int
    pipe: int
    """File descriptor of what it writes."""
    text: bytes = b""


def _start_child(
    question: Mapping[str, Any], function: Callable[[Mapping[str, Any]], Answer], limits: Limits
) -> _Child:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            _limit(limits)
            _write_answer(partial(function, question), writer)
        finally:
            os._exit(0)
    os.close(writer)
    return _Child(number=question["number"], pid=pid, pipe=reader)


def _write_answer(function: Callable[[], Answer], writer: int) -> None:
    try:
        found = function()
    except MemoryError:
        found = TOO_MUCH
    except Exception:
        traceback.print_exc()
        found = Answer(error="the server failed to check it; its log says why", code=INTERNAL_ERROR)
    with os.fdopen(writer, "w") as pipe:
        json.dump(found, pipe)


def _limit(limits: Limits) -> None:
    signal.alarm(limits.check_seconds + SPARE_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.check_seconds,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (held + limits.check_bytes,) * 2)


def answer(
    question: Mapping[str, Any], server: ServerSettings, outlines: dict[str, SwiftI2VPipeline]
) -> Answer:
    """Check a request; its folder then holds the pixels of its uploads, and no upload.

    Args:
        question: ``folder`` and ``order`` of the request, and whether it ``wants_memory``.
        server: Settings of the server.
        outlines: See ``outline``, by the names of the models.
    """
    folder = JobFolder(Path(question["folder"]))
    order = ClipOrder.from_json(question["order"])
    try:
        resolved = _resolve(folder, order, server)
        job = check(resolved, outlines[order.model])
        _keep_pixels(folder, resolved)
        found = Answer(facts=_describe(job, folder, order))
        if question["wants_memory"]:
            found["memory_bytes"] = _predict_memory(job, resolved.device)
        return found
    except SwiftI2VError as error:
        code = next((code for kind, code in CODES if isinstance(error, kind)), "invalid_model")
        text = in_words_of_api(error, folder)
        return Answer(error=text, code=code, param=find_param(text, code, order))


def _resolve(folder: JobFolder, order: ClipOrder, server: ServerSettings) -> Resolved:
    """The request within the server's limits."""
    _require_small(folder, order, server.limits)
    request = replace(
        order.to_request(folder, server),
        image=folder.uploaded_photo,
        motion=folder.uploaded_motion if order.has_motion else None,
    )
    resolved = resolve(request)
    _require_modest(resolved, server.limits)
    return resolved


def _describe(job: Job, folder: JobFolder, order: ClipOrder) -> dict[str, Any]:
    config = job.settings.config
    return {
        "image_sha256": job.settings.image.sha256,
        "motion_sha256": job.settings.motion.sha256 if job.settings.motion else None,
        "width": config.width,
        "height": config.height,
        "num_frames": config.num_frames,
        "fps": config.fps,
        "notes": json.dumps([_reword(note, folder) for note in job.notes]),
        "segments_total": len(job.pipe.plan(config)),
        "stage1_steps": 0 if order.has_motion else _count_stage1_steps(config),
        "segment_steps": config.stage2.sampling.num_calls,
    }


def _count_stage1_steps(config: GenerationConfig) -> int:
    return config.stage1.sampling.num_calls * len(config.plan_pieces())


def _require_small(folder: JobFolder, order: ClipOrder, limits: Limits) -> None:
    """Refuse uploads over the limits by what their headers say."""
    try:
        with open_photo(folder.uploaded_photo) as image:
            width, height = image.size
    except (MediaError, OSError, ValueError, SyntaxError):
        return  # reading it says better what is wrong
    if width * height > limits.photo_pixels:
        raise MediaError(
            f"input_reference is {width}x{height}, over {limits.photo_pixels / 1e6:g} megapixels; "
            "scale it down first"
        )
    if order.has_motion:
        num_frames = probe_clip(folder.uploaded_motion).num_frames
        if num_frames > limits.clip_frames:
            raise MediaError(
                f"motion_reference has {num_frames} frames, over {limits.clip_frames}; send a part"
            )


def _require_modest(resolved: Resolved, limits: Limits) -> None:
    """Refuse a video that is larger than this server makes."""
    config = resolved.settings.config
    steps = max(
        config.stage1.sampling.num_inference_steps, config.stage2.sampling.num_inference_steps
    )
    for name, asked, limit in (
        ("size", config.width * config.height, limits.video_pixels),
        ("num_frames", config.num_frames, limits.video_frames),
        ("num_inference_steps", steps, limits.steps),
    ):
        if asked > limit:
            unit = " pixels" if name == "size" else ""
            raise ShapeError(f"{name} is {asked}{unit}; this server makes at most {limit}{unit}")


def outline(model: str) -> SwiftI2VPipeline:
    """A model without its weights; its tokenizer tells whether a prompt is too long.

    Raises:
        SwiftI2VError: There is no such model, or the files that describe it cannot be had.
    """
    index, root = find_model(model)
    config = parse_config(GenerationConfig, index.settings, model)
    pipe = outline_pipeline(model, config, torch.float32, torch.device("cpu"))
    source = index.components["tokenizer"]
    place = find_source(source.source, source.subfolder, root)
    pipe.components.tokenizer = load_tokenizer(place, torch.float32)
    return pipe


def describe_model(pipe: SwiftI2VPipeline) -> dict[str, Any]:
    """Facts of a model that ``GET /v1/models`` tells."""
    config = pipe.config
    return {
        "default_size": f"{config.width}x{config.height}",
        "default_num_frames": config.num_frames,
        "default_fps": config.fps,
        "size_multiple": side_multiple(pipe.stage1.scale, pipe.stage2.scale, config),
        "frame_multiple": pipe.stage2.scale.time,
        "vocabulary": getattr(pipe.components.text_encoder.config, MOTIONS_KEY, None) or {},
    }


def _keep_pixels(folder: JobFolder, resolved: Resolved) -> None:
    """Write the inputs as the run sees them, with nothing else that their files held."""
    if resolved.photo is not None:
        resolved.photo.info.clear()
        resolved.photo.save(folder.photo, compress_level=1, exif=b"", icc_profile=None)
    if resolved.motion is not None:
        _, height, width, _ = resolved.motion.shape
        rate = resolved.settings.config.fps
        with open_writer(
            folder.motion,
            height=height,
            width=width,
            fps=rate,
            sound=resolved.sound,
            codec="ffv1",
        ) as writer:
            writer.write(resolved.motion)
    for upload in (folder.uploaded_photo, folder.uploaded_motion):
        upload.unlink(missing_ok=True)


def _predict_memory(job: Job, device: torch.device) -> int:
    settings = job.settings
    wish = Wish(
        placement=job.placement,
        is_tile_given=True,
        vae_tile=settings.config.stage2.vae_tile,
        keeps=True,  # no less than it takes where there is no room for that
    )
    plan = plan_run(settings, device, float("inf"), wish)
    return round(plan.smallest.peak_device_bytes["peak"])


def in_words_of_api(error: BaseException, folder: JobFolder) -> str:
    """An error's message and notes with the API's names for options and uploads, and no path."""
    return _reword("; ".join([str(error), *getattr(error, "__notes__", ())]), folder)


def find_param(text: str, code: str, order: ClipOrder) -> str | None:
    """Name the field of a request that an error speaks of: the first one, or the usual of its kind.

    Fields that are called as plain words are, such as ``size``, go by the kind alone.
    """
    if code == "invalid_prompt":
        return _find_prompt(text, order)
    named = re.findall(r"[a-z]+(?:_[a-z]+)+|fps|loras|background", text)
    fields = (word for word in named if word in VideoRequest.model_fields)
    return next(fields, PARAMS.get(code))


def _find_prompt(text: str, order: ClipOrder) -> str:
    """Name the field whose beginning an error quotes."""
    later = [prompt for _, prompt in order.changes.get("later_prompts", ())]
    negative = order.changes.get("negative_prompt", "")
    fields = {"prompt": [order.prompt], "later_prompts": later, "negative_prompt": [negative]}
    for field, prompts in fields.items():
        if any(quote_prompt(prompt) in text for prompt in prompts):
            return field
    return "prompt"


def _reword(text: str, folder: JobFolder) -> str:
    text = text.removeprefix(f"{SOURCE}: ").removeprefix("settings: ")
    text = text.replace(f"{folder.path}/", "").replace("--width and --height", "size")
    text = re.sub(r"\bstage[12]\.(?=[a-z])", "", text)
    return re.sub(
        r"(?<![\w-])--([a-z][a-z-]+)",
        lambda found: API_NAMES.get(found[1], found[1].replace("-", "_")),
        text,
    )


if __name__ == "__main__":
    main()
