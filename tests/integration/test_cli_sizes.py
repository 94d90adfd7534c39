import json

import pytest
from PIL import Image
from PIL.ExifTags import Base
from typer.testing import Result

from tests.helpers.command_line import (
    error_line,
    generate,
    refine,
    save_clip,
    save_photo,
    succeed,
    swifti2v,
)
from tests.helpers.tiny import SIZE, tiny_pipeline

LARGE = 4 * SIZE


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """The tiny model with a default size that leaves room for other aspects."""
    pipe = tiny_pipeline()
    pipe.config = pipe.configure(height=LARGE, width=LARGE)
    path = tmp_path_factory.mktemp("roomy")
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def phone_photo(tmp_path):
    """Photo as phones store it: lying, with a tag that turns it upright."""
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    Image.new("RGB", (400, 300), (90, 120, 60)).save(tmp_path / "phone.jpg", exif=exif)
    return tmp_path / "phone.jpg"


def plan(result: Result) -> tuple[tuple[int, int], str]:
    values = json.loads(succeed(result).stdout)
    config = values["settings"]["config"]
    return (config["width"], config["height"]), " ".join(values["notes"])


def test_a_portrait_photo_gives_a_portrait_clip(roomy, phone_photo, tmp_path):
    output, work = tmp_path / "out.mp4", tmp_path / "work"
    flags = ("--num-frames", 5, "--work-dir", work, "--json")
    report = json.loads(succeed(generate(roomy, phone_photo, output, *flags)).stdout)
    assert (report["width"], report["height"]) == (192, 256)

    # The video and the work dir keep their size, whatever the photo is.
    square = save_photo(tmp_path / "square.png", 64, 64)
    like = swifti2v(
        "generate", square, "--like", output, "-o", tmp_path / "b.mp4", "--dry-run", "--json"
    )
    assert plan(like)[0] == (192, 256)
    wider = swifti2v(
        "generate",
        "--like",
        output,
        "--width",
        320,
        "-o",
        tmp_path / "c.mp4",
        "--dry-run",
        "--json",
    )
    assert plan(wider)[0] == (320, 256)


@pytest.mark.slow
def test_a_run_of_another_size_is_continued_at_that_size(roomy, phone_photo, tmp_path):
    output, work = tmp_path / "out.mp4", tmp_path / "work"
    flags = ("--num-frames", 5, "--work-dir", work)
    succeed(generate(roomy, phone_photo, output, *flags, "--height", LARGE, "--width", LARGE))
    again = json.loads(
        succeed(generate(roomy, phone_photo, output, *flags, "--resume", "--json")).stdout
    )
    assert (again["width"], again["height"]) == (LARGE, LARGE)


@pytest.mark.parametrize(
    ("flags", "size", "note"),
    [
        (
            (),
            (192, 256),
            "size 192x256: the photo's aspect in no more pixels than the model's 256x256",
        ),
        (("--width", 320), (320, 448), "height 448 follows from width 320 and the photo's aspect"),
        (("--set", "height=320"), (256, 320), "width 256 follows from height 320 and the photo's"),
        (("--width", 320, "--height", 64), (320, 64), ""),
    ],
)
def test_the_size_follows_the_photo_unless_it_is_named(
    roomy, phone_photo, tmp_path, flags, size, note
):
    chosen, notes = plan(
        generate(roomy, phone_photo, tmp_path / "o.mp4", *flags, "--dry-run", "--json")
    )
    assert chosen == size
    assert note in notes
    assert note or "aspect" not in notes


def test_a_photo_of_the_models_aspect_needs_no_note(roomy, photo, tmp_path):
    chosen, notes = plan(generate(roomy, photo, tmp_path / "o.mp4", "--dry-run", "--json"))
    assert chosen == (LARGE, LARGE)
    assert "size" not in notes


@pytest.mark.parametrize(
    ("clip", "flags", "size"),
    [
        ((48, 64), (), (192, 256)),  # 4 times larger
        ((96, 128), (), (192, 256)),  # 4 times larger would be more than the model's pixels
        ((96, 128), ("--width", 384), (384, 512)),
        ((72, 72), (), (256, 256)),
        ((72, 40), (), (288, 160)),
    ],
)
def test_refine_takes_the_clips_aspect_exactly(roomy, phone_photo, tmp_path, clip, flags, size):
    motion = save_clip(tmp_path / "m.mkv", 5, *clip)
    run = refine(roomy, motion, phone_photo, tmp_path / "o.mp4", *flags, "--dry-run", "--json")
    assert plan(run)[0] == size


def test_refine_refuses_a_size_that_is_not_the_clips(roomy, phone_photo, tmp_path):
    motion = save_clip(tmp_path / "m.mkv", 5, 90, 64)
    message = error_line(refine(roomy, motion, phone_photo, tmp_path / "o.mp4", "--width", 384))
    assert "m.mkv is 90x64, the output 384x272: the aspects differ" in message


def test_upscale_completes_a_size_by_the_clips_aspect(roomy, tmp_path):
    clip = save_clip(tmp_path / "m.mkv", 5, 48, 32)
    run = swifti2v(
        "upscale",
        clip,
        "--model",
        roomy,
        "-o",
        tmp_path / "o.mp4",
        "--width",
        288,
        "--dry-run",
        "--json",
    )
    chosen, notes = plan(run)
    assert chosen == (288, 192)
    assert "height 192 follows from width 288 and the clip's aspect" in notes


def test_the_pipeline_gives_the_same_size():
    pipe = tiny_pipeline()
    pipe.config = pipe.configure(height=LARGE, width=LARGE)
    portrait = Image.new("RGB", (300, 400))
    assert pipe.size_for(portrait) == (256, 192)
    assert pipe.size_for(portrait, width=320) == (448, 320)
    pipe.require_fit(pipe.configure(**pipe.size_for(portrait)._asdict()))
