"""From samples to the frames that are trained on."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from swifti2v.errors import MediaError
from swifti2v.media import iter_frames
from swifti2v.shapes import PixelShape
from swifti2v.training.data.buckets import MediaFacts, plan_usable, probe
from swifti2v.training.data.decoding import decode_clip, decode_pair
from tests.helpers.training_clips import (
    numbers,
    sample_of,
    save_counting_clip,
    save_damaged_clip,
    save_picture,
)

BUCKET = PixelShape(5, 32, 48)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.slow
def test_the_first_frame_is_drawn_from_all_that_fit(tmp_path: Path) -> None:
    sample = sample_of(save_counting_clip(tmp_path / "a.mkv", 8))
    firsts: Counter[int] = Counter()
    for seed in range(25):
        frames = decode_clip(sample, BUCKET, 16, rng(seed))
        assert frames.shape == (5, 32, 48, 3)
        assert frames.dtype == np.uint8
        shown = numbers(frames)
        assert shown == list(range(shown[0], shown[0] + 5))
        firsts[shown[0]] += 1
        assert np.array_equal(frames, decode_clip(sample, BUCKET, 16, rng(seed)))
    assert set(firsts) == {0, 1, 2, 3}


@pytest.mark.parametrize(("source", "step"), [(8, Fraction(1, 2)), (32, 2), (24, Fraction(3, 2))])
def test_clips_are_resampled(tmp_path: Path, source: float, step: Fraction) -> None:
    sample = sample_of(save_counting_clip(tmp_path / "a.mkv", 48, fps=source))
    for seed in range(5):
        shown = numbers(decode_clip(sample, BUCKET, 16, rng(seed)))
        assert any(shown == [int((first + k) * step) for k in range(5)] for first in range(96)), (
            shown
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ({"start": 1.0, "end": 1.4}, range(16, 23)),
        ({"start": 1.03}, range(17, 24)),
        ({"end": 0.3125}, range(5)),
    ],
)
def test_only_the_stated_part_is_used(tmp_path, part, allowed):
    sample = sample_of(save_counting_clip(tmp_path / "a.mkv", 24), **part)
    shown = [numbers(decode_clip(sample, BUCKET, 16, rng(seed))) for seed in range(40)]
    assert {min(each) for each in shown} >= {allowed.start}
    assert {frame for each in shown for frame in each} == set(allowed)


def save_uneven(path: Path, times: list[int]) -> Path:
    """Frame i is shown from times[i], in sixteenths of a second."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1600)
        for index, moment in enumerate(times):
            frame = av.VideoFrame.from_ndarray(
                np.full((32, 48, 3), 4 * index, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = 100 * moment, Fraction(1, 1600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_frames_of_uneven_length_are_shown_for_their_time(tmp_path: Path) -> None:
    sample = sample_of(save_uneven(tmp_path / "a.mp4", [0, 1, 4, 5, 6, 7, 8]))
    whole = (0, 1, 1, 1, 2, 3, 4, 5, 6)
    assert len(plan_usable(sample, probe(sample), 16)) == len(whole)
    shown = {
        tuple(numbers(decode_clip(sample, PixelShape(8, 32, 48), 16, rng(seed))))
        for seed in range(25)
    }
    assert shown == {whole[:8], whole[1:]}


def test_a_clip_that_got_shorter_meanwhile_is_refused(tmp_path: Path) -> None:
    path = save_counting_clip(tmp_path / "a.mkv", 9)
    before = MediaFacts(height=32, width=48, num_frames=10, fps=16)
    with pytest.raises(MediaError, match=r"sample a\.mkv: it has 9 frames .* needs 10"):
        decode_clip(sample_of(path), PixelShape(10, 32, 48), 16, rng(), facts=before)


def test_frames_cover_the_bucket_and_are_cropped_at_the_centre(tmp_path: Path) -> None:
    picture = np.zeros((64, 160, 3), np.uint8)
    picture[:, :20] = picture[:, -20:] = 255  # exactly what is cut off
    picture[:32, 20:-20, 0] = 200
    Image.fromarray(picture).save(tmp_path / "a.png")
    frames = decode_clip(sample_of(tmp_path / "a.png"), PixelShape(1, 32, 60), 16, rng())
    assert frames.shape == (1, 32, 60, 3)
    assert frames[0, :, 4:-4, 1:].max() == 0
    assert frames[0, :12, 4:-4, 0].min() == 200
    assert frames[0, 20:, 4:-4, 0].max() == 0


def test_a_damaged_clip_names_its_sample(tmp_path: Path) -> None:
    path = save_damaged_clip(tmp_path / "a.mkv")
    assert next(iter_frames(path)).shape == (32, 48, 3)  # it begins well
    whole = PixelShape(30, 32, 48)
    facts = MediaFacts(height=32, width=48, num_frames=30, fps=16)
    with pytest.raises(MediaError, match=r"^sample clips/7: clip .*a\.mkv is .*damaged"):
        decode_clip(sample_of(path, id="clips/7"), whole, 16, rng(), facts=facts)


def test_what_does_not_fill_the_bucket_is_refused(tmp_path: Path) -> None:
    clip = sample_of(save_counting_clip(tmp_path / "a.mkv", 8))
    picture = sample_of(save_picture(tmp_path / "p.png"))
    with pytest.raises(MediaError, match=r"a\.mkv: it has 8 frames to use; bucket 9x32x48 needs 9"):
        decode_clip(clip, PixelShape(9, 32, 48), 16, rng())
    with pytest.raises(MediaError, match=r"a\.mkv: it is 48x32 px; bucket 5x34x48 would enlarge"):
        decode_clip(clip, PixelShape(5, 34, 48), 16, rng())
    with pytest.raises(MediaError, match=r"p\.png: it is 48x32 px"):
        decode_clip(picture, PixelShape(1, 34, 48), 16, rng())
    with pytest.raises(MediaError, match=r"p\.png is a picture; bucket 5x32x48 is not for it"):
        decode_clip(picture, BUCKET, 16, rng())
    with pytest.raises(MediaError, match=r"a\.mkv is a video; bucket 1x32x48 is not for it"):
        decode_clip(clip, PixelShape(1, 32, 48), 16, rng())


@pytest.mark.slow
def test_a_pair_shows_the_same_moments(tmp_path: Path) -> None:
    clip = save_counting_clip(tmp_path / "a.mp4", 60, fps=32)
    reference = save_counting_clip(tmp_path / "small.mkv", 9, height=8, width=12)
    sample = sample_of(clip, start=0.5, reference=reference)
    seen = set()
    for seed in range(25):
        frames, small = decode_pair(sample, BUCKET, 16, rng(seed))
        assert frames.shape == (5, 32, 48, 3)
        assert small.shape == (5, 8, 12, 3)
        # Frame k of the reference belongs to 0.5 s + k / 16 s: frame 16 + 2k of the clip.
        assert numbers(frames) == [16 + 2 * k for k in numbers(small)]
        seen.add(numbers(small)[0])
        assert np.array_equal(frames, decode_clip(sample, BUCKET, 16, rng(seed)))
    assert seen == {0, 1, 2, 3, 4}


def test_a_pair_needs_a_reference_that_can_be_read(tmp_path: Path) -> None:
    sample = sample_of(save_counting_clip(tmp_path / "a.mkv", 8))
    with pytest.raises(MediaError, match=r"sample a\.mkv has no reference"):
        decode_pair(sample, BUCKET, 16, rng())
    reference = save_counting_clip(tmp_path / "small.mkv", 8, height=8, width=12)
    paired = sample_of(tmp_path / "a.mkv", reference=reference)
    facts = probe(paired)
    reference.write_bytes(b"")
    with pytest.raises(MediaError, match=r"sample a\.mkv \(reference\): .*empty"):
        decode_pair(paired, BUCKET, 16, rng(), facts=facts)
