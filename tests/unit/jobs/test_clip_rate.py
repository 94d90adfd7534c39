import pytest

from swifti2v.jobs.clip_rate import plan_rate
from swifti2v.media import ClipInfo


def info(fps: float, num_frames: int = 100) -> ClipInfo:
    return ClipInfo(
        height=64, width=96, fps=fps, num_frames=num_frames, is_resampled=False, codec="h264"
    )


@pytest.mark.parametrize(
    ("fps", "asked", "written", "resampled", "num_frames", "note"),
    [
        (16, None, 16, None, 100, None),
        (16, 16, 16, None, 100, None),
        (30000 / 1001, None, 30000 / 1001, None, 100, None),
        (30000 / 1001, 29.97, 30000 / 1001, None, 100, None),
        (30000 / 1001, 30, 30, 30, 101, "29.97 fps are resampled to 30: frames are repeated"),
        (12.5, None, 12.5, None, 100, None),
        (12.5, 12, 12, 12, 96, "12.5 fps are resampled to 12: frames are left out"),
        (0.4, None, 1, 1, 250, "0.4 fps are resampled to 1: frames are repeated"),
        (1000, None, 240, 240, 24, "1000 fps are resampled to 240: frames are left out"),
        (16, 24, 24, 24, 150, "16 fps are resampled to 24: frames are repeated"),
        (60, 30, 30, 30, 50, "60 fps are resampled to 30: frames are left out"),
    ],
)
def test_a_clip_keeps_its_speed_and_what_is_done_is_said(
    fps, asked, written, resampled, num_frames, note
):
    rate = plan_rate(info(fps), asked)
    assert (rate.fps, rate.resample_fps, rate.num_frames) == (written, resampled, num_frames)
    assert rate.notes == (() if note is None else (f"its {note}",))
