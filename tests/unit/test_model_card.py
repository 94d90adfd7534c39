import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from swifti2v.cli import app
from swifti2v.errors import ConfigError, ShapeError
from swifti2v.evaluation.card_tables import (
    END,
    START,
    Card,
    WeightsRow,
    render_tables,
    replace_tables,
    stage2_marks,
)
from swifti2v.evaluation.intervals import Estimate, bootstrap_mean, wilson_share
from swifti2v.evaluation.metrics.camera import CAMERA_LABELS, CameraLabel
from swifti2v.evaluation.model_card import (
    CAMERA_PROMPTS,
    CARRIED,
    COPY_DETAIL,
    FLOW_WARP,
    LANCZOS,
    MODEL,
    MODEL_NO_ANCHOR,
    CameraRow,
    CodecRow,
    Stage2Row,
    clip_psnr,
    downscale,
    measure_camera,
    measure_codec,
    measure_seconds,
    measure_stage2,
    stage2_methods,
)
from swifti2v.media import open_writer
from tests.tiny import NUM_FRAMES, SIZE, tiny_pipeline

FAULTS = {"cadence": 1.25, "carried": 0.875, "blockiness": 1.0625}
numbers = st.floats(-1e3, 1e3, allow_nan=False)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def config(pipe):
    return pipe.configure(segment_size=2)  # then some latent frames start inside a segment


def texture(height: int = SIZE, width: int = SIZE, seed: int = 0) -> np.ndarray:
    """Grey texture with large and fine structure, [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 190, (height // 8, width // 8)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), np.float64)
    grey = smooth + rng.normal(0, 15, (height, width))
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def moving_clip(num_frames: int = NUM_FRAMES) -> np.ndarray:
    picture = texture(SIZE, 2 * SIZE)
    return np.stack([picture[:, shift : shift + SIZE] for shift in range(num_frames)])


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def stage2_row(clip: str, method: str, psnr_db: float, coherence: float) -> Stage2Row:
    return Stage2Row(
        clip=clip,
        method=method,
        psnr_db=psnr_db,
        coherence=coherence,
        seam=1.0,
        hf_ratio=0.9,
        **FAULTS,
    )


def stage2_rows(coherence: float = 0.5, psnr_db: float = 30.0) -> list[Stage2Row]:
    others = {
        LANCZOS: (33.0, 0.2),
        FLOW_WARP: (29.0, 0.4),
        MODEL_NO_ANCHOR: (31.0, 0.3),
        CARRIED: (30.5, 0.45),
    }
    return [
        stage2_row(clip, method, *values)
        for clip in "abc"
        for method, values in {**others, MODEL: (psnr_db, coherence)}.items()
    ]


def camera_row(photo: str, prompt: str, measured: CameraLabel) -> CameraRow:
    return CameraRow(
        photo=photo,
        prompt=prompt,
        asked=CAMERA_PROMPTS[prompt],
        stage="Stage I",
        measured=measured,
        inliers=0.9,
        first_frame_psnr_db=40.0,
        **FAULTS,
    )


def make_card() -> Card:
    return Card(
        model="nano",
        setting="Nine frames.",
        codec=[CodecRow(clip="a", height=64, width=96, psnr_db=math.inf, coherence=1.0)],
        stage2=stage2_rows(),
        camera=[camera_row("a", prompt, "static") for prompt in CAMERA_PROMPTS],
        seconds={"stage2": 2.0, "total": 3.0},
        peak_rss_bytes=2**30,
        weights=[WeightsRow(component="vae", num_parameters=5, num_bytes=7, sha256="0" * 64)],
        machine={"processor": "a"},
    )


@given(st.lists(numbers, min_size=3, max_size=8))
def test_bootstrap_interval_holds_the_mean_and_stays_within_the_values(values):
    estimate = bootstrap_mean(values)
    low, high = ends(estimate)
    slack = 1e-9 * max(1, *map(abs, values))  # rounding of a mean of equal values
    assert min(values) - slack <= low <= estimate.value + slack
    assert estimate.value - slack <= high <= max(values) + slack


def test_bootstrap_interval_narrows_as_the_square_root_of_the_count():
    few, many = (
        ends(bootstrap_mean(np.random.default_rng(1).normal(0, 1, count).tolist()))
        for count in (25, 2500)
    )
    # Ten times narrower; the factor 1.5 allows for the spread of 25 drawn values.
    assert 10 / 1.5 < (few[1] - few[0]) / (many[1] - many[0]) < 10 * 1.5


def test_few_or_unknown_values_have_no_interval():
    assert bootstrap_mean([1.0, 3.0]).low is None
    assert bootstrap_mean([1.0, 3.0, math.nan]).value == 2.0
    assert bootstrap_mean([1.0, 3.0, math.inf]).high is None
    assert math.isnan(bootstrap_mean([math.nan]).value)


def test_wilson_interval_of_a_known_case():
    low, high = ends(wilson_share(8, 10))
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)  # as in every table


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_mirrors(counts):
    successes, trials = counts
    one, other = wilson_share(successes, trials), wilson_share(trials - successes, trials)
    (low, high), (other_low, _) = ends(one), ends(other)
    assert 0 <= low <= one.value <= high <= 1
    assert high == pytest.approx(1 - other_low, abs=1e-12)
    assert high > low


def test_wilson_refuses_more_successes_than_trials():
    with pytest.raises(ValueError, match="4 successes in 3 trials"):
        wilson_share(4, 3)


def test_downscale_takes_means_and_refuses_sides_that_do_not_divide():
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    frames[1, :4, 4:] = 40
    frames[1, 0, 4] = 56  # 41 on average
    low = downscale(frames, 4)
    assert low.shape == (2, 2, 2, 3)
    assert low[1, :, :, 0].tolist() == [[0, 41], [0, 0]]
    with pytest.raises(ShapeError, match="8x8 cannot be divided by 3"):
        downscale(frames, 3)


def test_clip_psnr_stays_finite_with_one_equal_frame():
    truth = texture()[None].repeat(2, axis=0)
    output = truth.copy()
    output[1] ^= 1  # every value off by one: 48.13 dB in one frame, half the error in both
    assert clip_psnr(output, truth) == pytest.approx(48.13 + 3.01, abs=0.01)
    assert clip_psnr(truth, truth) == math.inf


def test_codec_keeps_grey_and_loses_fine_colour(pipe):
    grey = moving_clip(9)
    colour = np.random.default_rng(0).integers(0, 256, grey.shape).astype(np.uint8)
    rows = measure_codec(pipe.components.stage2_vae, {"grey": grey, "colour": colour})
    assert [(row.clip, row.height, row.width) for row in rows] == [
        ("grey", SIZE, SIZE),
        ("colour", SIZE, SIZE),
    ]
    assert rows[0].psnr_db > 50  # nothing but rounding
    assert rows[0].coherence > 0.999
    assert rows[1].psnr_db < 20  # chroma is halved


def test_stage2_rows_of_a_still_clip_know_what_each_method_can_do(pipe, config):
    still = texture()[None].repeat(NUM_FRAMES, axis=0)
    seen: list[Stage2Row] = []
    rows = measure_stage2(pipe, {"still": still}, config, {"twin": config}, on_row=seen.append)
    assert rows == seen
    by_method = {row.method: row for row in rows}
    assert by_method[COPY_DETAIL].psnr_db > 45  # the photo itself, up to rounding
    assert by_method[COPY_DETAIL].hf_ratio == pytest.approx(1, abs=0.01)
    assert by_method[CARRIED].psnr_db > 45
    assert by_method[COPY_DETAIL].carried > 0.95 > 0.6 > by_method[LANCZOS].carried
    assert by_method[COPY_DETAIL].cadence == pytest.approx(1)
    assert by_method[COPY_DETAIL].blockiness == pytest.approx(1, abs=0.1)
    assert by_method[LANCZOS].hf_ratio < 0.2
    assert by_method[LANCZOS].seam == pytest.approx(1)  # all frames are equal
    twin = replace(by_method["twin"], method=MODEL)
    assert twin == by_method[MODEL]
    assert by_method[MODEL_NO_ANCHOR] != replace(twin, method=MODEL_NO_ANCHOR)


def test_without_the_anchor_no_detail_of_the_photo_is_seen(pipe, config):
    photo = texture()
    sharper = photo.copy()
    sharper[::2, ::2] ^= 1
    low = downscale(moving_clip(), 4)
    first, second = (stage2_methods(pipe, low, image, config) for image in (photo, sharper))
    assert np.array_equal(first[MODEL_NO_ANCHOR](), second[MODEL_NO_ANCHOR]())
    assert not np.array_equal(first[MODEL](), second[MODEL]())


def test_stage2_refuses_a_clip_of_another_length_before_any_run(pipe, config):
    rows: list[Stage2Row] = []
    clips = {"good": moving_clip(), "short": moving_clip(9)}
    with pytest.raises(ShapeError, match=r"clip short is \(9, 64, 64, 3\)"):
        measure_stage2(pipe, clips, config, on_row=rows.append)
    assert rows == []


def test_camera_rows_ask_for_every_motion_once(pipe, config):
    photos = {name: Image.fromarray(texture(seed=seed)) for seed, name in enumerate("ab")}
    rows = measure_camera(pipe, photos, config, full_photos=["b"])
    first = [row for row in rows if row.stage == "Stage I"]
    full = [row for row in rows if row.stage == "Stage I + II"]
    assert [(row.photo, row.asked) for row in first] == [
        (p, a) for p in "ab" for a in CAMERA_LABELS
    ]
    assert [(row.photo, row.asked) for row in full] == [("b", label) for label in CAMERA_LABELS]
    assert min(row.first_frame_psnr_db for row in full) > 50  # frame 0 is the photo, which is grey


def test_seconds_of_the_stages_add_up_to_less_than_the_whole(pipe, config):
    seconds = measure_seconds(pipe, Image.fromarray(texture()), "zoom in", config)
    total, first = seconds.pop("total"), seconds.pop("first segment")
    assert set(seconds) == {"text", "stage1", "reference", "stage2", "decode"}
    assert 0 < first < total
    assert sum(seconds.values()) <= total


@pytest.mark.parametrize(
    ("coherence", "psnr_db", "met"),
    [
        (0.5, 30.0, [True, True, True, False, True, False, True, True]),
        (0.36, 32.0, [True, True, True, True, False, True, False, True]),
        (0.34, 28.9, [False, False, True, False, False, False, False, False]),
        (0.3, 29.0, [False, True, False, False, False, False, False, False]),  # at a bar
        (0.45, 30.875, [True, True, True, False, False, True, True, True]),  # equal to another
    ],
)
def test_marks_follow_the_numbers(coherence, psnr_db, met):
    marks = stage2_marks(stage2_rows(coherence, psnr_db))
    assert [mark.is_met for mark in marks] == met
    assert [mark.num_above for mark in marks] == [3 * passed for passed in met]


def test_marks_pair_clips_and_leave_out_what_was_not_measured():
    rows = [stage2_row("a", MODEL, 30, 0.5), stage2_row("b", LANCZOS, 30, 0.1)]
    assert stage2_marks(rows) == []
    (coherence, psnr) = stage2_marks([*rows, stage2_row("b", MODEL, 29, 0.4)])
    assert coherence.difference.value == pytest.approx(0.3)
    assert psnr.difference.num_items == 1


def test_tables_show_every_measurement():
    tables = render_tables(make_card())
    assert "| **nano** | 30.00 [30.00, 30.00] | 0.500 [0.500, 0.500] |" in tables
    assert "| coherence, nano \N{MINUS SIGN} Lanczos: at least +0.15 | +0.30 [" in tables
    assert "| a | 96x64 | exact | 1.000 |" in tables
    assert "| Stage I | 1 of 7 | 1 | 0.14 [0.03, 0.51] |" in tables
    faults = "1.25 [1.25, 1.25] | 0.875 [0.875, 0.875] | 1.062 [1.062, 1.062] |"
    assert f"| 1.00 [1.00, 1.00] | 0.90 [0.90, 0.90] | {faults}" in tables  # Stage II
    assert f"| 40.00 | 0.90 | {faults}" in tables  # Stage I
    assert "| pan left | **0** | 0 | 0 | 0 | 0 | 0 | 1 |" in tables
    assert "| peak memory of the process, held-out clips included | 1.00 GB |" in tables
    assert f"nano \N{MINUS SIGN} {MODEL_NO_ANCHOR.replace(MODEL, 'nano')}: above 0 |" in tables
    assert MODEL_NO_ANCHOR not in tables


def test_every_table_row_has_the_cells_of_its_header():
    counts = []
    for line in [*render_tables(make_card()).splitlines(), ""]:
        if line.startswith("|"):
            counts.append(line.count("|"))
        else:
            assert len(set(counts)) <= 1
            counts = []


@given(before=st.text(), after=st.text(), tables=st.text(alphabet="ab |\n"))
def test_only_what_the_markers_enclose_is_replaced(before, after, tables):
    if START in before + after or END in before + after:
        return
    card = f"{before}{START}old{END}{after}"
    new = replace_tables(card, tables)
    assert new.startswith(before + START)
    assert new.endswith(END + after)
    assert tables.strip() in new
    assert replace_tables(new, tables) == new


@pytest.mark.parametrize("text", ["", START, END + START, START * 2 + END, START + END * 2])
def test_a_card_without_clear_markers_is_refused(text):
    with pytest.raises(ConfigError, match="once each"):
        replace_tables(text, "| a |")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, a clip of 64x64 and a larger photo."""
    root = tmp_path_factory.mktemp("files")
    tiny_pipeline().save_pretrained(root / "model")
    (root / "clips").mkdir()
    (root / "photos").mkdir()
    clip = root / "clips" / "walk.mkv"
    with open_writer(clip, height=SIZE, width=SIZE, fps=15, codec="ffv1") as writer:
        writer.write(moving_clip(NUM_FRAMES + 2))
    Image.fromarray(texture(80, 96)).save(root / "photos" / "hill.png")
    return root


def measure(root: Path, output: Path, *held_out: str, num_frames: int = NUM_FRAMES) -> Result:
    names = [word for name in held_out for word in ("--held-out", name)]
    words: list[object] = ["models", "card", "--model", root / "model", "--clips", root / "clips"]
    words += ["--photos", root / "photos", *names, "--output", output, "--device", "cpu"]
    words += ["--num-frames", num_frames, "--height", SIZE, "--width", SIZE]
    words += ["--variant", "stage2.context_size=0"]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_fills_the_card_and_keeps_its_text(files, tmp_path):
    output = tmp_path / "card.md"
    output.write_text(f"# Tiny\n\n{START}\noutdated\n{END}\n\nMore.\n", encoding="utf-8")
    result = measure(files, output, "walk", "hill.png")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}\n"
    assert "codec: 1 clips" in result.stderr
    text = output.read_text(encoding="utf-8")
    assert text.startswith(f"# Tiny\n\n{START}\n")
    assert text.endswith(f"{END}\n\nMore.\n")
    assert "outdated" not in text
    for part in ("| walk |", "| hill |", "walk, frame 0", "stage2.context_size=0", "16x16"):
        assert part in text
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("held_out", "num_frames", "card", "message"),
    [
        (("hill",), NUM_FRAMES, START + END, "names no clip"),
        (("walk", "valley"), NUM_FRAMES, START + END, "--held-out valley is no file"),
        (("walk", "walk.mkv"), NUM_FRAMES, START + END, "walk is there twice"),
        (("walk",), 21, START + END, "gives 19 frame(s), at least 21 are needed"),
        (("walk",), NUM_FRAMES + 1, START + END, "num_frames 18 does not fit"),
        (("walk",), NUM_FRAMES, "no markers", "needs the lines"),
        (("walk",), NUM_FRAMES, None, "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_card_alone(
    files, tmp_path, held_out, num_frames, card, message
):
    output = tmp_path / "card.md"
    if card is not None:
        output.write_text(card, encoding="utf-8")
    result = measure(files, output, *held_out, num_frames=num_frames)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (output.read_text(encoding="utf-8") if card is not None else None) == card
