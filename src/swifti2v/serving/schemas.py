"""Requests and answers of the API, as OpenAPI describes them."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import from_json

from swifti2v.config import StageName
from swifti2v.serving.job import Status

SIZE = r"[1-9]\d{0,4}x[1-9]\d{0,4}"


def _from_json_text(value: Any) -> Any:
    """A list or an object that came as text, as in a form."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return from_json(value)
        except ValueError:
            return value
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Reference(_Strict):
    """A photo or a clip that is not uploaded as a file."""

    image_url: str | None = Field(None, description="Data URL, or http(s) where the server allows.")
    video_url: str | None = Field(None, description="As image_url, for a clip.")
    file_id: str | None = Field(None, description="Not supported; refused with an explanation.")


class Lora(_Strict):
    """A LoRA of the server's folder."""

    name: str
    strength: float = Field(1.0, allow_inf_nan=False)
    stage: StageName = "stage1"


def _to_lora(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _to_loras(value: Any) -> Any:
    value = _from_json_text(value)
    return [value] if isinstance(value, (str, dict)) else value


def _to_reference(value: Any) -> Any:
    value = _from_json_text(value)
    return {"image_url": value} if isinstance(value, str) else value


def _to_size(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(SIZE, value, re.ASCII):
        raise ValueError(f"{value[:20]!r} is no size; write WIDTHxHEIGHT, such as 640x384")
    return value


AnyReference = Annotated[
    Reference | str | None,
    BeforeValidator(_to_reference),
]


class VideoRequest(_Strict):
    """A video that is asked for."""

    prompt: str = Field(description="What happens in the video.")
    later_prompts: Annotated[list[tuple[int, str]] | None, BeforeValidator(_from_json_text)] = (
        Field(None, max_length=64, description="[frame, prompt] of prompts that take over.")
    )
    input_reference: AnyReference = Field(None, description="The photo.")
    model: str | None = Field(None, description="A name of GET /v1/models.")
    seconds: float | None = Field(
        None, gt=0, le=3600, allow_inf_nan=False, description="Length; not with num_frames."
    )
    size: Annotated[str | None, BeforeValidator(_to_size)] = Field(
        None, pattern=f"^{SIZE}$", description="WIDTHxHEIGHT."
    )
    num_frames: int | None = Field(None, description="4k + 1, at least 5.")
    fps: float | None = Field(None, allow_inf_nan=False, description="Frames a second.")
    seed: int | None = Field(None, ge=-1, le=2**63 - 1, description="-1 draws one.")
    negative_prompt: str | None = Field(None, description="Used where guidance is above 1.")
    num_inference_steps: int | None = Field(
        None, ge=1, description="Denoising steps of each stage."
    )
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    segment_size: int | None = Field(None, description="Latent frames of a segment.")
    context_size: int | None = Field(None, description="Finished latent frames a segment sees.")
    truncate_prompt: bool = Field(False, description="Cut a prompt that is over the limit.")
    fit: Literal["crop", "pad"] | None = Field(None, description="For a photo of another aspect.")
    background: str | None = Field(None, description="Colour behind a see-through photo.")
    loras: Annotated[
        list[Annotated[Lora | str, BeforeValidator(_to_lora)]], BeforeValidator(_to_loras)
    ] = Field([], max_length=8, description="LoRAs of the server's folder.")
    motion_reference: AnyReference = Field(None, description="Own clip in place of Stage I.")

    @model_validator(mode="after")
    def _require_one_length(self) -> "VideoRequest":
        if self.seconds is not None and self.num_frames is not None:
            raise ValueError("seconds and num_frames are both given; give one of them")
        return self


class VideoForm(VideoRequest):
    """The same as a form: files in place of references."""

    input_reference: Annotated[Any, Field(json_schema_extra={"type": "string", "format": "binary"})]
    motion_reference: Annotated[
        Any, Field(None, json_schema_extra={"type": "string", "format": "binary"})
    ]


class VideoError(BaseModel):
    """Reason of a failure."""

    code: str
    message: str


class Video(BaseModel):
    """A job."""

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: int = Field(ge=0, le=100, description="Finished model calls in percent.")
    created_at: int
    completed_at: int | None
    expires_at: int | None
    error: VideoError | None
    model: str
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: None = None
    num_frames: int
    fps: int | float
    seed: int
    stage: str | None
    segments_done: int
    segments_total: int
    stage_seconds: dict[str, float]
    peak_memory_bytes: int | None = Field(
        description="Most memory of the GPU that the job took; on a CPU, of the worker with all models."
    )
    queue_position: int | None
    eta_seconds: float | None
    notes: list[str]
    polling_url: str


class VideoList(BaseModel):
    """Jobs of a key."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """A job that is forgotten."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Estimate(BaseModel):
    """Memory and time that a request would take."""

    model: str
    size: str
    num_frames: int
    fps: int | float
    seconds: str
    segments_total: int
    memory_bytes: int = Field(
        description="Predicted peak of the job alone: of the GPU, or on a CPU of a process."
    )
    eta_seconds: float | None
    queue_length: int
    notes: list[str]


class Model(BaseModel):
    """A model that may be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "swifti2v"
    default_size: str
    default_num_frames: int
    default_fps: int | float
    size_multiple: int = Field(description="Width and height are multiples of it.")
    frame_multiple: int = Field(description="num_frames is a multiple of it plus 1.")
    max_pixels: int = Field(description="Most pixels of a frame on this server.")
    max_num_frames: int = Field(description="Most frames on this server.")
    vocabulary: dict[str, list[str]] = Field(description="Motions and phrases it was trained on.")
    loras: list[str]


class ModelList(BaseModel):
    """Models that may be asked for."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """State of the server."""

    status: Literal["ok", "unavailable"]
    reason: str | None = None
    worker: dict[str, Any]
    queue_length: int
