"""VBench-I2V: the suite, photos, formulas and scores."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from swifti2v.errors import ConfigError, InputError, MediaError, ShapeError
from swifti2v.evaluation.vbench import formulas, official
from swifti2v.evaluation.vbench.dimensions import DIMENSIONS, LITE, choose_dimensions
from swifti2v.evaluation.vbench.generation import take_shard
from swifti2v.evaluation.vbench.photos import check_photo, plan_photo_fit
from swifti2v.evaluation.vbench.scores import (
    DimensionResult,
    find_result_files,
    read_results,
    require_complete,
    score,
)
from swifti2v.evaluation.vbench.suite import (
    find_photos,
    find_videos,
    list_videos,
    read_suite,
    select_entries,
)
from swifti2v.media import fit_image, load_image

CAT: dict[str, Any] = {
    "prompt_en": "a cat",
    "dimension": ["i2v_subject", "dynamic_degree"],
    "image_type": "animal",
    "image_name": "a cat.jpg",
}
FIELD = CAT | {"prompt_en": "a field", "dimension": ["i2v_background"], "image_name": "f.jpg"}
PAN = CAT | {"prompt_en": "a field, camera pans left", "dimension": ["camera_motion"]}


def save_suite(path: Path, *entries: object) -> Path:
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_suite_names_videos_as_vbench_does(tmp_path):
    entries = read_suite(save_suite(tmp_path / "suite.json", CAT, FIELD, PAN))
    assert [video.name for video in list_videos(entries, 2)] == [
        "a cat-0.mp4", "a field-0.mp4", "a field, camera pans left-0.mp4",
        "a cat-1.mp4", "a field-1.mp4", "a field, camera pans left-1.mp4",
    ]  # fmt: skip
    assert select_entries(entries, ["dynamic_degree"]) == entries[:1]
    with pytest.raises(InputError, match="no entry of the suite is measured for imaging_quality"):
        select_entries(entries, ["imaging_quality"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((), "at least one entry"),
        ((CAT, CAT), "'a cat' twice"),
        ((CAT, FIELD | {"dimension": ["sharpness"]}), "entry 2.*'sharpness' is unknown"),
        ((CAT | {"prompt_en": "a/b"},), "'a/b' cannot be part of a file name"),
        ((CAT | {"image_name": " "},), "cannot be part of a file name"),
        (("a cat",), "entry 1"),
        ((CAT | {"fps": 8},), "fps"),
    ],
)
def test_bad_suites_are_refused(tmp_path, entries, message):
    path = save_suite(tmp_path / "suite.json", *entries)
    with pytest.raises((InputError, ConfigError), match=message):
        read_suite(path)


def test_missing_or_broken_suite_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: No such file"):
        read_suite(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text("[{")
    with pytest.raises(InputError, match="is not JSON"):
        read_suite(tmp_path / "cut.json")


def test_missing_files_are_counted_and_named(tmp_path):
    entries = read_suite(save_suite(tmp_path / "suite.json", CAT, FIELD))
    with pytest.raises(InputError, match="a folder for every ratio"):
        find_photos(entries, tmp_path, "16-9")
    (tmp_path / "16-9").mkdir()
    (tmp_path / "16-9/f.jpg").touch()
    with pytest.raises(InputError, match=r"1 of 2 photos are missing \(a cat.jpg\)"):
        find_photos(entries, tmp_path, "16-9")
    videos = tmp_path / "videos"
    with pytest.raises(InputError, match="does not exist"):
        find_videos(entries, 1, videos)
    videos.mkdir()
    with pytest.raises(InputError, match="is empty"):
        find_videos(entries, 1, videos)
    (videos / "a cat-0.mp4").touch()
    with pytest.raises(InputError, match=r"3 of 4 videos are missing \(a field-0.mp4, a cat-1"):
        find_videos(entries, 2, videos)
    with pytest.raises(InputError, match="samples is 0; VBench takes"):
        find_videos(entries, 0, videos)


def test_dimensions_are_checked_by_name():
    assert choose_dimensions(None, LITE) == LITE
    assert choose_dimensions(["dynamic_degree", "i2v_subject"], LITE) == LITE[:1] + LITE[4:5]
    with pytest.raises(InputError, match="'sharpness' is unknown; there are i2v_subject"):
        choose_dimensions(["sharpness"], DIMENSIONS)
    with pytest.raises(InputError, match=r"camera_motion is not part of this: .* non-commercial"):
        choose_dimensions(["camera_motion"], LITE)


@given(num_entries=st.integers(1, 30), num_samples=st.integers(1, 5), num_shards=st.integers(1, 9))
def test_shards_hold_every_video_once(num_entries, num_samples, num_shards):
    entry = read_one()
    entries = [replace(entry, prompt_en=f"prompt {index}") for index in range(num_entries)]
    videos = list_videos(entries, num_samples)
    shards = [take_shard(videos, index, num_shards) for index in range(1, num_shards + 1)]
    assert sorted(video.name for shard in shards for video in shard) == sorted(
        video.name for video in videos
    )
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def read_one() -> Any:
    from swifti2v.config import parse_config
    from swifti2v.evaluation.vbench.suite import SuiteEntry

    return parse_config(SuiteEntry, CAT, "test")


def test_2560x1408_loses_16_rows_at_either_end_of_a_16_9_crop():
    fit = plan_photo_fit("16-9", 1408, 2560)
    assert (fit.scaled_width, fit.scaled_height) == (2560, 1440)
    assert (fit.cut_columns, fit.cut_rows) == (0, 32)


@given(
    ratio=st.sampled_from(["1-1", "8-5", "7-4", "16-9", "5-4"]),
    height=st.integers(64, 1500),
    width=st.integers(64, 2600),
)
def test_a_fit_covers_the_clip_and_cuts_little_or_names_a_remedy(ratio, height, width):
    try:
        fit = plan_photo_fit(ratio, height, width)
    except ShapeError as error:
        _, _, remedy = str(error).partition("use --ratio ")
        if not remedy:
            return
        fit = plan_photo_fit(remedy, height, width)
    assert fit.cut_rows >= 0
    assert fit.cut_columns >= 0
    assert min(fit.cut_rows, fit.cut_columns) <= 1
    assert fit.cut_rows <= 0.06 * fit.scaled_height + 1
    assert fit.cut_columns <= 0.06 * fit.scaled_width + 1


@pytest.mark.parametrize(
    ("ratio", "size", "message"),
    [
        ("16-9", (384, 640), "loses 6% of a side; use --ratio 8-5"),
        ("16-9", (640, 384), "use another output size"),
        ("wide", (384, 640), "not of the form W-H"),
        ("2-1", (384, 768), "outside the suite's range"),
    ],
)
def test_ratios_that_do_not_fit_are_refused(ratio, size, message):
    with pytest.raises((InputError, ShapeError), match=message):
        plan_photo_fit(ratio, *size)


def test_photos_keep_their_middle(tmp_path):
    rows = np.zeros((144, 256, 3), np.uint8)
    rows[:2], rows[-2:] = 255, 255
    Image.fromarray(rows).save(tmp_path / "a.png")
    check_photo(tmp_path / "a.png", "16-9")
    with pytest.raises(MediaError, match="is 256x144, not 8-5"):
        check_photo(tmp_path / "a.png", "8-5")
    photo = np.asarray(fit_image(load_image(tmp_path / "a.png"), 140, 256).image)
    assert photo.shape == (140, 256, 3)
    assert not photo[4:-4].any()


def test_photo_similarity_by_hand():
    # Angles of 0, 60 and 90 degrees: cosines to the photo 1, .5, 0; steps .5 and cos(30 deg).
    angles = torch.deg2rad(torch.tensor([0.0, 60.0, 90.0]))
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    step = math.cos(math.radians(30))
    expected = 0.4 * 1 + 0.3 * (0.5 + step) / 2 + 0.3 * 0.5
    value = formulas.photo_similarity(features, torch.tensor([3.0, 0.0]))
    assert value == pytest.approx(expected, abs=1e-6)
    opposite = formulas.photo_similarity(features, torch.tensor([-1.0, -1.0]))
    assert opposite == pytest.approx(expected - 0.4, abs=1e-6)


def test_consistency_by_hand():
    angles = torch.deg2rad(torch.tensor([0.0, 60.0, 180.0]))
    features = 7 * torch.stack([angles.cos(), angles.sin()], dim=1)
    # Frame 1: (.5 + .5) / 2; frame 2 is 120 degrees on and opposite to frame 0, both count as 0.
    assert formulas.consistency(features) == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(ShapeError, match="at least two frames"):
        formulas.consistency(features[:1])


def test_dynamic_degree_by_hand():
    flow = torch.zeros(2, 10, 20)
    flow[0, 0, :10], flow[1, 0, :10] = 3, 4  # 5 % of the pixels move by 5
    assert formulas.fastest_flow(flow) == pytest.approx(5)
    # 81 frames at 16 a second: every 2nd, 41 of them, 10 pairs above 33 pixels at 1408 rows.
    assert formulas.sampling_step(16) == 2
    assert formulas.is_dynamic([33.1] * 10 + [32.9] * 30, 41, 1408, 2560)
    assert not formulas.is_dynamic([33.1] * 9 + [32.9] * 31, 41, 1408, 2560)
    assert not formulas.is_dynamic([], 1, 1408, 2560)


def test_weighted_mean_counts_frames():
    assert formulas.weighted_mean([1.0, 0.4], [1, 3]) == pytest.approx(0.55)


def result(value: float) -> DimensionResult:
    return DimensionResult(value=value, num_videos=5, num_prompts=1)


def test_total_by_hand():
    values = {
        "i2v_subject": 0.9, "i2v_background": 0.95, "camera_motion": 0.3,
        "subject_consistency": 0.9, "background_consistency": 0.95, "motion_smoothness": 0.98,
        "dynamic_degree": 0.4, "aesthetic_quality": 0.6, "imaging_quality": 0.7,
        "temporal_flickering": 0.1,
    }  # fmt: skip
    scores = score({name: result(value) for name, value in values.items()})
    subject, background = (0.9 - 0.1462) / 0.8538, (0.95 - 0.2615) / 0.7385
    smooth = (0.98 - 0.706) / 0.2915
    quality = (subject + background + smooth + 0.5 * 0.4 + 0.6 + 0.7) / 5.5
    i2v = (subject + background + 0.1 * 0.3) / 2.1
    assert scores.quality.value == pytest.approx(quality)
    assert scores.i2v.value == pytest.approx(i2v)
    assert scores.total == pytest.approx((quality + i2v) / 2)
    require_complete(scores)


@given(st.sets(st.sampled_from(sorted(DIMENSIONS))))
def test_missing_dimensions_are_named_and_never_zeros(present):
    scores = score({name: result(DIMENSIONS[name].high) for name in present})
    for group in (scores.quality, scores.i2v):
        assert math.isnan(group.value) or group.value == pytest.approx(1)
    assert set(scores.missing) == DIMENSIONS.keys() - present - {"temporal_flickering"}
    if scores.missing:
        with pytest.raises(InputError, match=f"{len(scores.missing)} dimensions are missing"):
            require_complete(scores)


def official_result(mean: Any, *names: str) -> list[Any]:
    return [mean, [{"video_path": f"/v/{name}", "video_results": 0.5} for name in names]]


def save_result(path: Path, **values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_official_result_files_are_read(tmp_path):
    camera = official_result(0.25, "a field, camera pans left-0.mp4")
    camera.insert(1, {"pan_left": 0.25})
    save_result(tmp_path / "a_eval_results.json", camera_motion=camera)
    names = ("a cat-0.mp4", "a cat-1.mp4", "a dog-0.mp4")
    save_result(tmp_path / "b_eval_results.json", i2v_subject=official_result(0.9, *names))
    (tmp_path / "b_full_info.json").write_text("[]")
    results = read_results(find_result_files([tmp_path]))
    assert list(results) == ["i2v_subject", "camera_motion"]
    assert results["i2v_subject"] == DimensionResult(value=0.9, num_videos=3, num_prompts=2)
    assert results["camera_motion"].value == 0.25


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sharpness": official_result(0.5, "a-0.mp4")}, "'sharpness' is unknown"),
        ({"i2v_subject": official_result(0.5)}, "no video was measured"),
        ({"i2v_subject": official_result(math.nan, "a-0.mp4")}, "no video was measured"),
        ({"i2v_subject": official_result(57.3, "a-0.mp4")}, r"57.3 is outside 0 .. 1"),
        ({"i2v_subject": 0.5}, r"not \[mean, videos\]"),
        ({"i2v_subject": [0.5, [0.5]]}, "no video_path"),
        ({"kind": "vbench-lite"}, "holds vbench-lite results: they do not belong"),
        ({}, "holds no results"),
    ],
)
def test_bad_result_files_are_refused(tmp_path, values, message):
    path = save_result(tmp_path / "a.json", **values)
    with pytest.raises(InputError, match=message):
        read_results([path])


def test_result_files_are_found_or_refused(tmp_path):
    with pytest.raises(InputError, match="holds no"):
        find_result_files([tmp_path])
    with pytest.raises(InputError, match="does not exist"):
        find_result_files([tmp_path / "a.json"])
    first = save_result(tmp_path / "a.json", dynamic_degree=official_result(0.5, "a-0.mp4"))
    second = save_result(tmp_path / "b.json", dynamic_degree=official_result(0.6, "a-0.mp4"))
    with pytest.raises(InputError, match=r"dynamic_degree is in .* and in"):
        read_results([first, second])


def test_setup_writes_exact_pins_and_a_script_that_runs_up_to_the_download(tmp_path):
    script = official.write_setup(tmp_path / "vbench")
    assert official.COMMIT in script.read_text()
    assert "@" not in script.read_text()
    pins = (tmp_path / "vbench" / official.REQUIREMENTS).read_text().splitlines()
    packages = [line for line in pins if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in packages)
    assert {"torch==2.5.1", "torchvision==0.20.1", "setuptools==80.9.0"} <= set(packages)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    result = subprocess.run(
        ["bash", script], env={"PATH": "/usr/bin:/bin", "PYTHON": "no-python"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "error: no-python is needed" in result.stderr
    with pytest.raises(InputError, match="run 'swifti2v vbench setup"):
        official.find_installation(tmp_path / "vbench")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        official.write_setup(tmp_path / "file")
