"""The photo's fine detail, moved to where a low-resolution clip moved things; no network."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from swifti2v.errors import NumericalError, ShapeError
from swifti2v.media import Frames, frames_to_video, resize_video, video_to_frames
from swifti2v.media.flow import MIN_SIDE, cycle_error, find_shift, fit_flow, optical_flow
from swifti2v.media.resize import ResizeMode
from swifti2v.pipelines.displacement import enlarge, sample_mirrored
from swifti2v.shapes import Crop

FLOW_SCALE = 2
"""Flow is searched on the low-resolution clip enlarged by this."""
MAX_FLOW_SIDE = 960
"""Longest side of the frames on which flow is searched."""
NUM_AHEAD = 12
"""Frames whose flow is searched before they are asked for: three latent frames."""
MAX_THREADS = 8
"""Threads that search; a flow is one task."""
DISAGREEMENT = 14 / 127.5
"""Distance of the moved photo from the clip at which a place is trusted by 1/e, range [-1, 1]."""
CYCLE = 0.75
"""Distance after going there and back, in low-resolution pixels, with the same effect."""
SMOOTHING = (0.75, 0.5)
"""Gaussian blur of the disagreement and of the confidence, in low-resolution pixels."""
MIRRORED = 0.8
"""Confidence in the mirrored photo's detail where a clip's own motion leads out of the photo."""
CROP_MARGIN = 6
"""Low-resolution pixels around a crop that its detail depends on."""


@dataclass(frozen=True, slots=True)
class Motion:
    """Places in frame 0 of the pixels of a low-resolution clip's frame."""

    displacement: Tensor
    """``[1, 2, a, b]`` float32, right and down in low-resolution pixels, on any grid over the
    frame: what is at ``x`` in the frame is at ``x + displacement(x)`` in frame 0."""
    trust: Tensor | None = None
    """``[1, 1, h, w]`` in [0, 1], from the way back; None trusts the displacement everywhere."""
    first: Tensor | None = None
    """``[1, 3, h, w]`` in [-1, 1], frame 0 of a clip that was made by moving it so (and adding
    something); the displacement is then ``[1, 2, h, w]``. None of a motion that was searched."""

    def to(self, device: torch.device) -> "Motion":
        """Return the motion on a device."""
        trust, first = (t if t is None else t.to(device) for t in (self.trust, self.first))
        return Motion(self.displacement.to(device), trust, first)


def estimate_motion(
    frame: NDArray[np.uint8], first: NDArray[np.uint8], photo: NDArray[np.float32]
) -> Motion:
    """Search the motion between a low-resolution frame and frame 0 by optical flow, on the CPU.

    The flow between the two is refined with the photo, which shows more than frame 0. It depends on
    them alone, so any frame of a clip can be asked for without those before it.

    Args:
        frame: ``[h, w, 3]`` uint8.
        first: ``[h, w, 3]`` uint8, frame 0.
        photo: ``[H, W]`` grey levels of frame 0 in full, see ``grey_levels``.
    """
    size = frame.shape[:2]
    large, large_first = enlarge_for_flow(frame), enlarge_for_flow(first)
    # Right and down; flow_size rounds each up.
    scale = np.array((large.shape[1] / size[1], large.shape[0] / size[0]), np.float32)
    shift = np.array(find_shift(large, large_first), np.float32)
    start = np.broadcast_to(shift, (*large.shape[:2], 2))
    forward = optical_flow(large, large_first, "fine", start)
    backward = optical_flow(large_first, large, "fine", -start)
    error = cycle_error(forward, backward) / float(scale.prod())
    trust = torch.from_numpy(np.exp(-error / CYCLE**2))[None, None]
    small = np.asarray(cv2.cvtColor(frame.astype(np.float32), cv2.COLOR_RGB2GRAY), np.float32)
    fitted = torch.from_numpy(fit_flow(small, photo, forward / scale))
    return Motion(fitted.permute(2, 0, 1)[None], F.interpolate(trust, size, mode="area"))


def grey_levels(photo: Tensor) -> NDArray[np.float32]:
    """Grey levels ``[H, W]`` of a photo ``[1, 3, 1, H, W]`` in [-1, 1], on the CPU."""
    colours = ((photo[0, :, 0].float().cpu() + 1) * 127.5).permute(1, 2, 0).contiguous()
    return np.asarray(cv2.cvtColor(colours.numpy(), cv2.COLOR_RGB2GRAY), np.float32)


def flow_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which flow is searched, of those of the low-resolution clip."""
    scale = min(FLOW_SCALE, MAX_FLOW_SIDE / max(height, width))
    scale = max(scale, MIN_SIDE / min(height, width))
    return ceil(scale * height), ceil(scale * width)


def enlarge_for_flow(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A low-resolution frame ``[h, w, 3]`` at the size at which flow is searched."""
    height, width = flow_size(*frame.shape[:2])
    video = resize_video(frames_to_video(frame[None]), height, width, "lanczos")
    enlarged: NDArray[np.uint8] = video_to_frames(video)[0]
    return enlarged


class MotionSearch:
    """Motion of a clip's frames, searched in threads some frames ahead of the requested ones.

    Args:
        clip: ``[T, h, w, 3]`` uint8.
        photo: ``[1, 3, 1, H, W]`` in [-1, 1], frame 0 in full.
        count_made: Number of frames that are there, where a clip is still made; None for all.
    """

    def __init__(
        self, clip: Frames, photo: Tensor, count_made: Callable[[], int] | None = None
    ) -> None:
        self.clip, self.photo = clip, photo
        self._count_made = count_made or (lambda: len(clip))
        self._waiting: dict[int, Future[Motion]] = {}

    def __call__(self, frame: int) -> Motion:
        """Motion of a frame; the next ones are searched meanwhile.

        Raises:
            Exception: Any error of the search.
        """
        self._waiting = {i: task for i, task in self._waiting.items() if i >= frame}
        for index in range(frame, min(frame + NUM_AHEAD, self._count_made())):
            if index not in self._waiting:
                self._waiting[index] = self._threads.submit(self._search, index)
        return self._waiting.pop(frame).result()

    def close(self) -> None:
        """End the threads; this waits for the search of one frame at most."""
        if "_threads" in self.__dict__:
            self._threads.shutdown(cancel_futures=True)
            del self._threads
        self._waiting.clear()

    def _search(self, frame: int) -> Motion:
        return estimate_motion(self.clip[frame], self.clip[0], self._photo)

    @cached_property
    def _photo(self) -> NDArray[np.float32]:
        return grey_levels(self.photo)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        number = min(MAX_THREADS, torch.get_num_threads())
        return ThreadPoolExecutor(number, thread_name_prefix="motion")


MotionFinder = Callable[[int], Motion]
"""Motion of a frame of a clip."""


class GivenMotion:
    """Motion that is known, such as Stage I's own.

    Args:
        displacement: ``[T, 2, a, b]``, see ``MotionReference``.
        clip: ``[T, h, w, 3]`` uint8; h and w are multiples of a and b.

    Raises:
        ShapeError: The displacement is of another clip.
        NumericalError: It is not finite.
    """

    def __init__(self, displacement: Tensor, clip: Frames) -> None:
        num_frames, size = len(clip), clip.shape[1:3]
        expected = (num_frames, 2)
        cells = displacement.shape[2:]
        if (
            displacement.shape[:2] != expected
            or len(cells) != 2
            or any(side % number for side, number in zip(size, cells, strict=True))
        ):
            raise ShapeError(
                f"the displacement is {list(displacement.shape)}; a clip of {num_frames} frames of "
                f"{size[1]}x{size[0]} needs {[*expected, *size]}, or whole parts of the sides"
            )
        if displacement.device.type != "meta" and not bool(displacement.isfinite().all()):
            raise NumericalError("the displacement of the motion reference has NaN or infinity")
        self.displacement, self.size = displacement.float(), size
        self.first = frames_to_video(clip[:1])[:, :, 0]

    def __call__(self, frame: int) -> Motion:
        """Motion of a frame."""
        displacement = self.displacement[frame : frame + 1, :, None]  # [1, 2, 1, a, b]
        return Motion(enlarge(displacement, *self.size)[:, :, 0], first=self.first)


def find_detail(
    small: Tensor,
    photo: Tensor,
    motion: Motion,
    upsampling: ResizeMode = "lanczos",
    crop: Crop | None = None,
) -> Tensor:
    """The photo's detail that an enlarged low-resolution frame lacks, where motion can be trusted.

    The photo is moved along the motion, and of it only the band above the low-resolution frame's is
    taken, weighed by a confidence in [0, 1]: the moved photo looks like the frame, the motion is
    the same there and back, and it leads into the photo. Where the clip's own motion leads out of
    the photo, the mirrored photo's detail is taken: the clip says what is to be seen there, and the
    detail gives it a surface.

    Args:
        small: ``[1, 3, 1, h, w]`` in [-1, 1].
        photo: ``[1, 3, 1, H, W]`` in [-1, 1], frame 0 in full.
        motion: Motion of the frame, on the device of ``photo``.
        upsampling: Kernel with which the frame was enlarged.
        crop: Part of the enlarged frame that is asked for, in whole low-resolution pixels; ``small``
            shows it alone. Near its border the result depends on where it ends (``CROP_MARGIN``).

    Returns:
        ``[1, 3, 1, H, W]``, or of the crop's size, to add to the enlarged frame; 0 where nothing is
        trusted.
    """
    height, width = photo.shape[-2:]
    crop = crop or Crop(0, 0, height, width)
    scale = crop.height / small.shape[-2]
    whole = F.interpolate(motion.displacement * scale, (height, width), mode="bicubic")
    displacement, corner = whole[..., crop.rows, crop.columns], (crop.top, crop.left)
    trust, low = motion.trust, None
    if crop.height < height or crop.width < width:
        part = crop.divide(int(scale))
        trust = None if trust is None else trust[..., part.rows, part.columns]
    else:
        part = Crop(0, 0, small.shape[-2], small.shape[-1])
    if motion.first is not None:
        moved = motion.displacement[..., part.rows, part.columns]
        low = look_up(motion.first, moved, (part.top, part.left))[0]
    return move_detail(small, photo, displacement, corner, upsampling, low=low, trust=trust)


def move_detail(
    small: Tensor,
    photo: Tensor,
    displacement: Tensor,
    corner: tuple[int, int],
    upsampling: ResizeMode = "lanczos",
    *,
    low: Tensor | None = None,
    trust: Tensor | None = None,
) -> Tensor:
    """``find_detail`` where the displacement of every pixel is known.

    Args:
        small: ``[1, 3, 1, h, w]`` in [-1, 1], the part of the clip's frame that the displacement
            covers.
        photo: ``[1, 3, 1, H, W]`` in [-1, 1], frame 0 in full.
        displacement: ``[1, 2, a, b]``, right and down in pixels of ``photo``.
        corner: Row and column of the frame at which the displacement begins.
        upsampling: See ``find_detail``.
        low: ``[1, 3, h, w]``, frame 0 of the clip moved by the same displacement, where the clip
            was made that way; None takes the moved photo's own low band.
        trust: ``[1, 1, h, w]``, see ``Motion``.

    Returns:
        ``[1, 3, 1, a, b]``.
    """
    size, low_size = displacement.shape[-2:], (small.shape[-2], small.shape[-1])
    moved, is_inside = look_up(photo[:, :, 0], displacement, corner)
    inside = F.interpolate(is_inside, low_size, mode="area")
    outside_confidence = 0.0 if low is None else MIRRORED
    if low is None:
        low = resize_video(moved[:, :, None], low_size[0], low_size[1], "area")[:, :, 0]
    disagreement = (low - small[:, :, 0]).abs().mean(dim=1, keepdim=True)  # [1, 1, h, w]
    confidence = torch.exp(-((_blur(disagreement, SMOOTHING[0]) / DISAGREEMENT) ** 2))
    confidence = confidence * inside + outside_confidence * (1 - inside)
    if trust is not None:
        confidence = confidence * trust
    confidence = _blur(confidence, SMOOTHING[1])
    weight = F.interpolate(confidence, size, mode="bilinear")
    detail = moved[:, :, None] - resize_video(low[:, :, None], size[0], size[1], upsampling)
    return weight[:, :, None] * detail


def look_up(image: Tensor, displacement: Tensor, corner: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """An image ``[1, 3, H, W]``, mirrored at its edges, where a displacement points to.

    Beside it ``[1, 1, a, b]``, whether that is in the image.
    """
    height, width = image.shape[-2:]
    rows, columns = displacement.shape[-2:]
    device = displacement.device
    x = corner[1] + torch.arange(columns, device=device) + displacement[:, 0]
    y = corner[0] + torch.arange(rows, device=device)[:, None] + displacement[:, 1]
    moved = sample_mirrored(image, x, y)
    is_inside = (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
    return moved, is_inside[:, None].to(image.dtype)


def _blur(planes: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``[B, 1, h, w]``, the edge repeated outside."""
    reach = ceil(3 * sigma)
    x = torch.arange(-reach, reach + 1, device=planes.device, dtype=planes.dtype)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(planes, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
