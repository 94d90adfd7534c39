"""Reading a data folder, procedural material, and the small version of a clip."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from swifti2v.errors import InputError, MediaError
from swifti2v.media import open_writer
from swifti2v.pipelines.camera_moves import MOVES
from swifti2v.shapes import pixel_frames
from swifti2v.training.data.crops import degrade
from swifti2v.training.nano.material import Material, make_procedural_material, read_material

HEIGHT, WIDTH = 32, 48


def write_clip(path: Path, num_frames: int, fps: int = 16) -> None:
    frames = np.zeros((num_frames, 64, 64, 3), np.uint8)
    frames += (np.arange(num_frames) * 5).astype(np.uint8)[:, None, None, None]
    with open_writer(path, height=64, width=64, fps=fps, codec="ffv1") as writer:
        writer.write(frames)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    (tmp_path / "photos").mkdir()
    write_clip(tmp_path / "clips" / "slow.mkv", 25)
    write_clip(tmp_path / "clips" / "fast.mkv", 20, fps=32)
    Image.new("RGB", (100, 50), (250, 10, 10)).save(tmp_path / "photos" / "red.png")
    (tmp_path / "notes.txt").write_text("not for training")
    return tmp_path


def read(folder: Path, **changes: object) -> Material:
    options = {"height": HEIGHT, "width": WIDTH, "fps": 16, **changes}
    return read_material(folder, **options)  # type: ignore[arg-type]


def test_a_folder_is_read_at_one_size_and_rate(folder: Path) -> None:
    material = read(folder)
    assert [clip.shape for clip in material.clips] == [
        (10, HEIGHT, WIDTH, 3),  # fast: every other frame
        (25, HEIGHT, WIDTH, 3),
    ]
    assert {still.shape for still in material.stills} == {(HEIGHT, WIDTH, 3)}
    # The photo, frame 0 of both clips and frame 20 of the longer one.
    assert len(material.stills) == 4
    assert material.stills[0][0, 0].tolist() == [250, 10, 10]


def test_held_out_names_are_left_out_and_must_exist(folder: Path) -> None:
    material = read(folder, held_out=("slow", "red"))
    assert len(material.clips) == len(material.stills) == 1
    with pytest.raises(InputError, match="missing_one"):
        read(folder, held_out=("missing_one",))


def test_max_frames_bounds_what_is_read(folder: Path) -> None:
    assert max(len(clip) for clip in read(folder, max_frames=9).clips) == 9


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no clip"):
        read(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(MediaError, match=r"broken\.mp4"):
        read(tmp_path)


def test_too_short_clips_are_named(folder: Path) -> None:
    material = read(folder)
    material.require_clips(25)
    with pytest.raises(InputError, match="has 25 frames; at least one must have 33"):
        material.require_clips(33)


@pytest.mark.slow
def test_procedural_material_is_repeatable_and_moves() -> None:
    sizes = {"height": HEIGHT, "width": WIDTH, "num_frames": 9, "num_clips": len(MOVES)}
    first, again = (make_procedural_material(**sizes, seed=3) for _ in range(2))
    other = make_procedural_material(**sizes, seed=4)
    assert [clip.shape for clip in first.clips] == [(9, HEIGHT, WIDTH, 3)] * len(MOVES)
    for a, b, c in zip(first.clips, again.clips, other.clips, strict=True):
        assert np.array_equal(a, b)
        assert not np.array_equal(a, c)
    is_moving = [not np.array_equal(clip[0], clip[-1]) for clip in first.clips]
    assert is_moving == [name != "static" for name in MOVES]  # a hand moves, too
    assert all(still.std() > 5 for still in first.stills)


@given(st.integers(1, 30))
def test_latent_frames_partition_the_pixel_frames(num_latent_frames: int) -> None:
    frames = [p for latent in range(num_latent_frames) for p in pixel_frames(latent)]
    assert frames == list(range(4 * (num_latent_frames - 1) + 1))


def test_pictures_keep_their_size(folder: Path) -> None:
    material = read(folder)
    # The photo, and frame 0 of both clips before they are cropped.
    assert [picture.shape for picture in material.pictures] == [(50, 100, 3), *[(64, 64, 3)] * 2]
    assert material.size == (HEIGHT, WIDTH)
    long = read(folder, fps=64)  # the slow clip has 100 frames then, the fast one 40
    assert len(long.pictures) == 1 + 4 + 2
    made = make_procedural_material(height=HEIGHT, width=WIDTH, num_frames=5, num_clips=2, seed=0)
    assert [picture.shape for picture in made.pictures] == [(2 * HEIGHT, 2 * WIDTH, 3)] * 2
    assert len(made.stills) == 4


def test_degraded_video_keeps_the_photo_and_loses_detail() -> None:
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    reference = degrade(video, 4)
    assert torch.equal(reference[:, :, 0], video[:, :, 0])
    assert reference[:, :, 1:].std() < 0.5 * video[:, :, 1:].std()
    flat = torch.full((1, 3, 5, 32, 32), 127 / 127.5 - 1)  # a whole 8-bit level
    torch.testing.assert_close(degrade(flat, 4), flat, atol=1e-5, rtol=0)
