"""Does the camera do as the prompt says? Clips from photos and prompts, as rows of a model card."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from runs.card.stages import clip_faults
from swifti2v.config import GenerationConfig
from swifti2v.evaluation.metrics.camera import CameraLabel, camera_direction
from swifti2v.evaluation.metrics.detail_coherence import hf_energy_ratio
from swifti2v.evaluation.metrics.fidelity import first_frame_psnr
from swifti2v.evaluation.metrics.series import mean_psnr
from swifti2v.media import Frames, downscale
from swifti2v.pipelines.camera_moves import FAST, MOVES, SLOW, CameraMove
from swifti2v.pipelines.course import draw_course
from swifti2v.pipelines.progress import Stopwatch
from swifti2v.pipelines.two_stage import SwiftI2VPipeline

CameraStage: TypeAlias = Literal["Stage I", "Stage I + II"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraAsk:
    """A prompt, and the camera move it asks for."""

    prompt: str
    """Text that the model reads."""
    move: CameraMove
    """Move that the model was trained to make."""
    labels: tuple[CameraLabel, ...]
    """Strongest components of the move, as ``camera_direction`` names them; empty where it has no
    name for them, such as for an orbit."""

    @property
    def has_parallax(self) -> bool:
        """Whether near things move differently from far ones, which hides the true motion."""
        return self.move.dolly != 0 or self.move.orbit != 0


def _ask(prompt: str, *labels: CameraLabel, move: CameraMove | None = None) -> CameraAsk:
    return CameraAsk(prompt=prompt, move=move or MOVES[prompt], labels=labels or ("static",))


ASKS: tuple[CameraAsk, ...] = (
    *(_ask(name, name) for name in ("pan left", "pan right", "tilt up", "tilt down")),
    *(_ask(name, name) for name in ("zoom in", "zoom out")),
    _ask("static camera", move=CameraMove()),
)
"""Prompts for every photo."""
FURTHER_ASKS: tuple[CameraAsk, ...] = (
    _ask("roll left", "roll left"),
    _ask("roll right", "roll right"),
    _ask("dolly in", "zoom in"),
    _ask("dolly out", "zoom out"),
    *(
        CameraAsk(prompt=name, move=MOVES[name], labels=())
        for name in ("orbit left", "orbit right")
    ),
    CameraAsk(prompt="handheld", move=MOVES["handheld"], labels=()),
    _ask("pan left and zoom in", "pan left", "zoom in", move=CameraMove(pan=-1, zoom=1)),
    _ask("slowly pan right", "pan right", move=CameraMove(pan=SLOW)),
    _ask("quickly pan right", "pan right", move=CameraMove(pan=FAST)),
    _ask("do not zoom in", move=CameraMove()),
    _ask("a house by the river", move=CameraMove()),
)
"""Further prompts for some photos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraRow:
    """A clip made from a photo and a prompt."""

    photo: str
    """Name of the photo."""
    prompt: str
    """Prompt of the clip."""
    asked: tuple[CameraLabel, ...]
    """Components that should be measured."""
    stage: CameraStage
    """Stages that made the measured clip."""
    measured: tuple[CameraLabel, ...]
    """Components that optical flow measures, the strongest first."""
    pan: float
    """Distance of the content to the right, as a part of the frame's width."""
    tilt: float
    """Distance of the content down, as a part of the frame's height."""
    zoom: float
    """Growth of the content: 0.1 is 10 % larger."""
    roll_degrees: float
    """Rotation of the content, clockwise."""
    inliers: float
    """Part of the points that follow the camera; a low one makes ``measured`` a guess."""
    displacement_px: float
    """Mean distance of Stage I's displacement from the true one, in pixels of Stage I's frames; NaN
    without displacement, where the true one is unknown, and for Stage II."""
    first_frame_psnr_db: float
    """PSNR of frame 0 against the photo at the output's size; 60 at most."""
    hf_ratio: float
    """Energy above a quarter cycle per pixel relative to the photo, mean of frames 1 to T-1."""
    cadence: float
    """Unevenness of motion within latent frames."""
    carried: float
    """Coherence with the photo moved onto the frames; NaN where nothing can be compared."""
    blockiness: float
    """Steps at the edges of 8-pixel blocks, mean of frames 1 to T-1."""

    @property
    def is_right(self) -> bool | None:
        """Whether the strongest components are the requested ones; None without names for them."""
        if not self.asked:
            return None
        return set((self.measured or ("static",))[: len(self.asked)]) == set(self.asked)


def displacement_error(
    displacement: Tensor, move: CameraMove, seed: int, size: tuple[int, int]
) -> float:
    """Mean distance of a clip's displacement from that of the requested move.

    Args:
        displacement: ``[T, 2, a, b]`` columns and rows in pixels, at the centres of a x b equal cells
            of the frame; see ``MotionReference``.
        move: Requested move, without parallax.
        seed: Seed of the clip; it decides the course.
        size: Height and width of the frame in pixels.

    Returns:
        Mean distance in pixels over the cells of frames 1 to T-1.
    """
    num_frames, _, *cells = displacement.shape
    row, column = (
        ((torch.arange(count) + 0.5) / count - 0.5) * side
        for count, side in zip(cells, size, strict=True)
    )
    points = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=-1)
    true = move.displace(draw_course(num_frames, seed), torch.tensor(0.0), points, size)
    distance = (displacement.permute(0, 2, 3, 1) - true).norm(dim=-1)
    return float(distance[1:].double().mean())


def measure_camera(
    pipe: SwiftI2VPipeline,
    photos: Mapping[str, Image.Image],
    config: GenerationConfig,
    further: Collection[str] = (),
    seed: int = 0,
    on_row: Callable[[CameraRow], None] | None = None,
) -> list[CameraRow]:
    """Ask for camera motions of every photo and measure the camera after each stage.

    Args:
        pipe: The model.
        photos: Images of the size of ``config``, by name.
        config: Settings.
        further: Names of the photos that are asked for ``FURTHER_ASKS`` as well.
        seed: Seed of the noise and of the course.
        on_row: Called with each row when it is done.
    """
    rows = []
    for name, image in photos.items():
        for ask in (*ASKS, *(FURTHER_ASKS if name in further else ())):
            for row in _camera_rows(pipe, name, image, ask, config, seed):
                rows.append(row)
                if on_row is not None:
                    on_row(row)
    return rows


def _camera_rows(
    pipe: SwiftI2VPipeline,
    name: str,
    image: Image.Image,
    ask: CameraAsk,
    config: GenerationConfig,
    seed: int,
) -> Iterator[CameraRow]:
    photo = np.array(image)  # a copy: torch takes no read-only array
    conditions = pipe.encode(image, ask.prompt, config, Stopwatch())
    reference = pipe.generate_motion_reference(image, conditions, seed, config)
    small = downscale(photo[None], config.stage1.downscale)[0]
    own, time_factor = reference.displacement, pipe.stage1.scale.time
    error = float("nan")
    if own is not None and not ask.has_parallax:
        error = displacement_error(own, ask.move, seed, small.shape[:2])
    yield _measure(name, ask, "Stage I", reference.frames, small, time_factor, error)
    segments = pipe.synthesize(reference, image, conditions, seed, config)
    output = np.concatenate([segment.frames for segment in segments])
    yield _measure(name, ask, "Stage I + II", output, photo, pipe.stage2.scale.time)


def _measure(
    name: str,
    ask: CameraAsk,
    stage: CameraStage,
    output: Frames,
    photo: Frames,
    time_factor: int,
    displacement_px: float = float("nan"),
) -> CameraRow:
    motion = camera_direction(output)
    height, width = photo.shape[:2]
    return CameraRow(
        photo=name,
        prompt=ask.prompt,
        asked=ask.labels,
        stage=stage,
        measured=motion.moves,
        pan=motion.pan_px / width,
        tilt=motion.tilt_px / height,
        zoom=motion.zoom,
        roll_degrees=motion.roll_degrees,
        inliers=motion.inliers,
        displacement_px=displacement_px,
        first_frame_psnr_db=mean_psnr([first_frame_psnr(output, photo)]),
        hf_ratio=float(hf_energy_ratio(output[1:], photo).nanmean()),
        **clip_faults(output, photo, time_factor),
    )
