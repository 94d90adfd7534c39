"""Images and videos at the edges of the package: read, fit, resize, write, describe."""

from swifti2v.media.clips import Clip, iter_frames, probe_clip, read_clip, read_metadata
from swifti2v.media.images import (
    FittedImage,
    contact_sheet,
    fit_image,
    image_to_tensor,
    load_image,
)
from swifti2v.media.resize import (
    Frames,
    downscale,
    downscale_video,
    frames_to_video,
    pixels_to_video,
    resize_video,
    video_to_frames,
)
from swifti2v.media.tracks import ClipInfo
from swifti2v.media.writer import PngSequenceWriter, VideoWriter, open_writer, require_writable

__all__ = [
    "Clip",
    "ClipInfo",
    "FittedImage",
    "Frames",
    "PngSequenceWriter",
    "VideoWriter",
    "contact_sheet",
    "downscale",
    "downscale_video",
    "fit_image",
    "frames_to_video",
    "image_to_tensor",
    "iter_frames",
    "load_image",
    "open_writer",
    "pixels_to_video",
    "probe_clip",
    "read_clip",
    "read_metadata",
    "require_writable",
    "resize_video",
    "video_to_frames",
]
