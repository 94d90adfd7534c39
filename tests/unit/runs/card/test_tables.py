"""Marks follow the numbers, and the tables show them."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs.card.camera import ASKS, FURTHER_ASKS, CameraAsk, CameraRow, CameraStage
from runs.card.marks import Bar, Card, Mark, WeightsRow, describe_card, find_marks
from runs.card.stages import CARRIED, LANCZOS, MODEL, MODEL_NO_ANCHOR, CodecRow, Stage2Row
from runs.card.tables import END, START, render_marks, render_tables, replace_tables
from swifti2v.errors import ConfigError
from swifti2v.units import MB

UNKNOWN = float("nan")


def stage2_row(clip: str, method: str, psnr_db: float, coherence: float) -> Stage2Row:
    return Stage2Row(
        clip=clip,
        method=method,
        psnr_db=psnr_db,
        coherence=coherence,
        seam=1.0,
        hf_ratio=0.9,
        cadence=1.25,
        carried=0.875,
        blockiness=1.0625,
    )


def stage2_rows(clips: str, psnr_db: float = 31.0, coherence: float = 0.5) -> list[Stage2Row]:
    methods = {
        LANCZOS: (27.0, 0.2),
        CARRIED: (30.5, 0.45),
        MODEL: (psnr_db, coherence),
        MODEL_NO_ANCHOR: (28.0, 0.3),
    }
    return [stage2_row(clip, name, *values) for clip in clips for name, values in methods.items()]


def camera_row(photo: str, ask: CameraAsk, stage: CameraStage, **changes: Any) -> CameraRow:
    row = CameraRow(
        photo=photo,
        prompt=ask.prompt,
        asked=ask.labels,
        stage=stage,
        measured=() if ask.labels == ("static",) else ask.labels,
        pan=-0.125,
        tilt=-0.0001,
        zoom=0.25,
        roll_degrees=-3.0,
        inliers=0.75,
        displacement_px=UNKNOWN if ask.has_parallax or stage == "Stage I + II" else 0.125,
        first_frame_psnr_db=45.0,
        hf_ratio=0.9,
        cadence=1.0625,
        carried=0.9375,
        blockiness=1.03125,
    )
    return replace(row, **changes)


def good_card() -> Card:
    """Meets every mark."""
    asks = {"a": (*ASKS, *FURTHER_ASKS), "b": ASKS}
    stages: tuple[CameraStage, ...] = ("Stage I", "Stage I + II")
    return Card(
        model="nano",
        setting="Nine frames.",
        codec=[CodecRow(clip="a", height=64, width=96, psnr_db=60.0, coherence=1.0)],
        stage2=stage2_rows("stuv"),
        moving=["u", "v"],
        camera=[camera_row(p, ask, stage) for p in asks for ask in asks[p] for stage in stages],
        seconds={"stage2": 2.0, "total": 3.0},
        peak_rss_bytes=2**30,
        weights=[WeightsRow(component="vae", num_parameters=5, num_bytes=7, sha256="0" * 64)],
        machine={"processor": "a"},
    )


def mark_of(card: Card, text: str) -> Mark:
    (mark,) = [mark for mark in find_marks(card) if text in mark.text]
    return mark


def change_rows(stage: CameraStage, prompts: tuple[str, ...] | None = None, **changes: Any) -> Card:
    """The good card with other values in some rows of the camera."""
    card = good_card()
    rows = [
        replace(row, **changes)
        if row.stage == stage and (prompts is None or row.prompt in prompts)
        else row
        for row in card.camera
    ]
    return replace(card, camera=rows)


def test_a_card_that_meets_every_mark():
    marks = find_marks(good_card())
    assert len(marks) == 14
    assert [mark.is_met for mark in marks] == [True] * 14
    assert all(mark.num_passing == mark.measured.num_items for mark in marks)


@pytest.mark.parametrize(
    ("text", "stage", "prompts", "changes", "value"),
    [
        ("camera as asked", "Stage I + II", ("zoom in",), {"measured": ()}, 12 / 14),
        ("displacement", "Stage I", None, {"displacement_px": 0.25}, 0.25),
        ("pans and tilts", "Stage I + II", ("tilt up",), {"carried": 0.5}, 0.828125),
        ("zooms", "Stage I + II", ("zoom out",), {"carried": 0.5}, 0.71875),
        ("detail energy", "Stage I + II", None, {"hf_ratio": 1.5}, 1.5),
        ("detail energy", "Stage I + II", None, {"hf_ratio": 0.5}, 0.5),
        ("cadence", "Stage I + II", None, {"cadence": 1.5}, 1.5),
        ("blockiness", "Stage I + II", None, {"blockiness": 1.125}, 1.125),
        ("first frame", "Stage I + II", None, {"first_frame_psnr_db": 38.0}, 38.0),
    ],
)
def test_a_mark_that_is_missed_is_the_only_one(text, stage, prompts, changes, value):
    card = change_rows(stage, prompts, **changes)
    mark = mark_of(card, text)
    assert mark.is_met is False
    assert mark.measured.value == pytest.approx(value)
    assert mark.num_passing < mark.measured.num_items
    assert [other.is_met for other in find_marks(card)].count(False) == 1


def test_further_moves_count_for_displacement_alone():
    names = tuple(ask.prompt for ask in FURTHER_ASKS)
    card = change_rows("Stage I + II", names, cadence=9.0, carried=0.0, measured=("tilt up",))
    assert find_marks(card) == find_marks(good_card())
    card = change_rows("Stage I", names, displacement_px=9.0)
    assert mark_of(card, "displacement").is_met is False


@pytest.mark.parametrize(
    ("psnr_db", "coherence", "met"),
    [
        (30.8125, 0.4375, (True, False)),
        (30.75, 0.5, (False, True)),
        (31.0, 0.45, (True, False)),  # as good is not better
    ],
)
@pytest.mark.parametrize(
    ("group", "clips", "others"), [("still", "st", "uv"), ("moving", "uv", "st")]
)
def test_stage2_is_held_against_the_carried_photo_in_each_group(
    group, clips, others, psnr_db, coherence, met
):
    rows = [*stage2_rows(clips, psnr_db, coherence), *stage2_rows(others)]
    card = replace(good_card(), stage2=rows)
    own = [mark_of(card, f"{group} clips: {name}") for name in ("dB", "coherence")]
    assert [mark.measured.num_items for mark in own] == [2, 2]
    assert tuple(mark.is_met for mark in own) == met
    assert [mark.is_met for mark in find_marks(card)].count(False) == 1


def test_cost_is_held_against_its_marks():
    large = WeightsRow(component="vae", num_parameters=5, num_bytes=41 * MB, sha256="0" * 64)
    card = replace(good_card(), seconds={"total": 10.5}, weights=[large])
    assert (mark_of(card, "weights").is_met, mark_of(card, "seconds").is_met) == (False, False)


def test_a_mark_without_measurements_is_neither_met_nor_missed():
    card = replace(good_card(), moving=[], weights=())
    card = replace(card, camera=[replace(row, displacement_px=UNKNOWN) for row in card.camera])
    unknown = [mark.text for mark in find_marks(card) if mark.is_met is None]
    assert len(unknown) == 4  # displacement, two of moving clips, weights
    assert render_marks(card).count("| not measured |") == 4
    described = json.loads(json.dumps(describe_card(card), allow_nan=False))
    assert [mark["text"] for mark in described["marks"] if mark["is_met"] is None] == unknown


@given(st.floats(-2, 2), st.floats(-1, 1), st.floats(0, 1))
def test_a_bar_holds_its_ends_unless_it_is_open(value, low, length):
    bar = Bar(low=low, high=low + length)
    assert bar.holds(value) == (low <= value <= low + length)
    assert bar.holds(low)
    assert not Bar(low=low, is_open=True).holds(low)
    assert not bar.holds(UNKNOWN)


def test_tables_show_every_measurement():
    tables = render_tables(good_card())
    assert (
        "| **nano** | 31.00 | 0.500 | 1.00 | 0.90 | 1.25 | 0.875 | 1.062 | +0.50 | +0.050 |"
        in tables
    )
    assert "| a | 96x64 | 60.00 | 1.000 |" in tables
    assert "a still camera**: s, t." in tables
    assert "a moving camera**: u, v." in tables
    assert "| camera as asked, share of clips | at least 0.95 | 1.000 [" in tables
    assert "| 14 of 14 | yes |" in tables
    assert (
        "| roll left | 1 of 1 | -12.5 | 0.0 | 25.0 | -3.0 | 0.125 | 0.90 | 1.06 | 0.938 |" in tables
    )
    assert (
        "| orbit left |  | -12.5 | 0.0 | 25.0 | -3.0 | \N{EN DASH} | 0.90 | 1.06 | 0.938 |"
        in tables
    )
    assert "| peak memory of the process, held-out clips included | 1.00 GB |" in tables
    assert MODEL_NO_ANCHOR not in tables  # the model's own name stands for it
    assert "| nano without the photo's detail | 28.00 |" in tables


def test_a_wrong_camera_is_told_by_what_was_measured():
    tables = render_tables(
        change_rows("Stage I + II", ("zoom in",), measured=("roll left", "tilt up"))
    )
    assert "| zoom in | 0 of 2 |" in tables
    assert "| zoom in | roll left, tilt up | roll left, tilt up |" in tables
    assert "**no**" in tables


def test_every_table_row_has_the_cells_of_its_header():
    counts = []
    for line in [*render_tables(good_card()).splitlines(), ""]:
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
