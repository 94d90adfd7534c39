import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from swifti2v.media import downscale, open_writer
from tests.helpers import foreign_clips
from tests.helpers.command_line import (
    LOSSLESS,
    assert_same_frames,
    error_line,
    frames_of,
    refine,
    save_clip,
    succeed,
    swifti2v,
)
from tests.helpers.evaluation_clips import panning_clip
from tests.helpers.tiny import SIZE, tiny_pipeline


def test_refine_takes_length_size_and_rate_from_the_clip(model, photo, tmp_path):
    motion, output = save_clip(tmp_path / "motion.mkv", 13), tmp_path / "out.mkv"

    result = succeed(refine(model, motion, photo, output, *LOSSLESS, "--json"))

    report = json.loads(result.stdout)
    assert (report["num_frames"], report["width"], report["fps"]) == (13, SIZE, 8)
    assert report["seconds"]["stage1"] == 0
    pipe = tiny_pipeline()
    image = Image.open(photo).convert("RGB")
    pieces = pipe.refine(frames_of(motion), image, "zoom", generator=7)
    expected = np.concatenate([piece.frames for piece in pieces])
    np.testing.assert_array_equal(frames_of(output), expected)


def test_refine_takes_the_first_frames_of_a_clip_that_does_not_fit(model, photo, tmp_path):
    motion, output = save_clip(tmp_path / "motion.mkv", 12), tmp_path / "out.mp4"

    message = error_line(refine(model, motion, photo, output))
    assert "nearest are 9 and 13" in message
    assert "--num-frames 9" in message

    succeed(refine(model, motion, photo, output, "--num-frames", 9))
    assert len(frames_of(output)) == 9


def sound_of(path: Path) -> list[bytes]:
    with av.open(path) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


@pytest.mark.slow
def test_the_clip_keeps_its_sound_rate_and_length(model, photo, tmp_path):
    motion = foreign_clips.save(
        tmp_path / "clip.mp4",
        rate=Fraction(30000, 1001),
        sound_seconds=0.5,
        frames=panning_clip(17, 1, SIZE // 4, SIZE // 4),
    )
    output, work = tmp_path / "out.mp4", ("--work-dir", tmp_path / "work")
    succeed(refine(model, motion, photo, output, *work))
    with av.open(output) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
    assert sound_of(output) == sound_of(motion)[:28]  # 17 frames and the part before them
    (tmp_path / "work" / "segment_0001.safetensors").unlink()
    succeed(refine(model, motion, photo, tmp_path / "again.mp4", *work, "--resume"))
    assert (tmp_path / "again.mp4").read_bytes() == output.read_bytes()


@pytest.mark.slow
def test_sound_is_left_out_where_that_is_asked_or_said(model, photo, tmp_path):
    motion = foreign_clips.save(
        tmp_path / "clip.mkv",
        9,
        sound_seconds=0.5,
        sound_codec="tta",
        frames=panning_clip(9, 1, SIZE // 4, SIZE // 4),
    )
    silent, again = tmp_path / "silent.mp4", tmp_path / "again.mp4"
    message = error_line(refine(model, motion, photo, silent, "--work-dir", tmp_path / "work"))
    assert "(tta) cannot be copied to an .mp4; write an .mkv, or leave it out" in message
    assert not silent.exists()
    assert not (tmp_path / "work").exists()
    succeed(refine(model, motion, photo, silent, "--no-audio"))
    succeed(swifti2v("refine", "--like", silent, "-o", again, "--model", model))
    for path in (silent, again):
        assert not probe(path)
    result = succeed(refine(model, motion, photo, tmp_path / "pngs", "--codec", "png"))
    assert "clip.mkv: its sound is left out, as PNGs hold none" in result.stdout
    succeed(refine(model, motion, photo, tmp_path / "loud.mkv"))
    assert probe(tmp_path / "loud.mkv") == ["tta"]


def probe(path: Path) -> list[str]:
    with av.open(path) as container:
        return [stream.codec_context.name for stream in container.streams.audio]


@pytest.mark.slow
def test_refine_carries_the_photos_detail_along_the_users_clip(model, tmp_path):
    frames = panning_clip(9, 2, SIZE, SIZE)
    photo, motion = tmp_path / "photo.png", tmp_path / "motion.mkv"
    Image.fromarray(frames[0]).save(photo)
    with open_writer(motion, height=SIZE // 4, width=SIZE // 4, fps=8, codec="ffv1") as writer:
        writer.write(downscale(frames, 4))
    plain, carried, again = (tmp_path / f"{name}.mkv" for name in ("plain", "carried", "again"))
    succeed(refine(model, motion, photo, plain, *LOSSLESS))
    setting = ("--set", "stage2.reference_detail=carried")
    work = ("--work-dir", tmp_path / "work")
    succeed(refine(model, motion, photo, carried, *LOSSLESS, *setting, *work))
    assert (frames_of(plain) != frames_of(carried)).any()
    (tmp_path / "work" / "segment_0001.safetensors").unlink()
    succeed(refine(model, motion, photo, again, *LOSSLESS, *setting, *work, "--resume"))
    assert_same_frames(again, carried)


@pytest.mark.slow
def test_refine_resumes(model, photo, tmp_path):
    motion, work = save_clip(tmp_path / "motion.mkv", 13), tmp_path / "work"
    whole, again = tmp_path / "a.mkv", tmp_path / "b.mkv"
    succeed(refine(model, motion, photo, whole, *LOSSLESS, "--work-dir", work))
    (work / "segment_0001.safetensors").unlink()

    succeed(refine(model, motion, photo, again, *LOSSLESS, "--work-dir", work, "--resume"))

    assert_same_frames(again, whole)
    save_clip(motion, 13, width=32, height=32)
    more = ("--height", SIZE, "--width", SIZE, "--work-dir", work, "--resume")
    assert "motion.sha256" in error_line(refine(model, motion, photo, again, *LOSSLESS, *more))


@pytest.mark.parametrize(
    ("num_frames", "width", "flags", "named"),
    [
        (1, 16, (), "1 frame(s), at least 5 are needed"),
        (3, 16, (), "3 frame(s), at least 5 are needed"),
        (13, 32, ("--height", SIZE, "--width", SIZE), "the aspects differ"),
        (13, 18, (), "nearest are 64 and 80; the motion clip is 18x16: crop it"),
        (9, 16, ("--num-frames", 13), "fewer than the 13"),
    ],
)
def test_refine_refuses_a_clip_that_does_not_fit(
    model, photo, tmp_path, num_frames, width, flags, named
):
    motion = save_clip(tmp_path / "motion.mkv", num_frames, width)

    assert named in error_line(refine(model, motion, photo, tmp_path / "out.mp4", *flags))
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("content", [None, b"", b"no clip"])
def test_refine_refuses_a_clip_that_cannot_be_read(model, photo, tmp_path, content):
    motion = tmp_path / "motion.mp4"
    if content is not None:
        motion.write_bytes(content)

    assert "motion.mp4" in error_line(refine(model, motion, photo, tmp_path / "out.mp4"))
