"""``swifti2v compare``: the page, what it is made of, and the tally; no browser is needed."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.evaluation.side_by_side.page import render_page
from swifti2v.evaluation.side_by_side.tally import tally
from swifti2v.media import open_writer, read_metadata
from tests.helpers.command_line import assert_same_frames, error_line, succeed, swifti2v
from tests.helpers.evaluation_clips import panning_clip


def save(path: Path, *, step: int = 1, num_frames: int = 9, fps: int = 8, **size: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    clip = panning_clip(num_frames, step, **{"height": 32, "width": 48, **size})
    height, width = clip.shape[1:3]
    comment = {"comment": f"made in {path.parent.name}"}
    with open_writer(path, height=height, width=width, fps=fps, metadata=comment) as writer:
        writer.write(clip[:5])
        writer.write(clip[5:])
    return path


@pytest.fixture
def sets(tmp_path):
    for index, name in enumerate(("alley", "boat", "cup", "door", "elm", "fog")):
        save(tmp_path / "ours" / f"{name}.mp4", step=index)
        save(tmp_path / "theirs" / f"{name}.mp4", step=index + 1)
    return tmp_path / "ours", tmp_path / "theirs"


def data_of(page: Path) -> dict[str, Any]:
    (text,) = re.findall(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    values: dict[str, Any] = json.loads(text)
    return values


class Links(HTMLParser):
    """Files that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.slow
def test_page_is_blind_shuffled_and_whole(tmp_path, sets):
    result = succeed(swifti2v("compare", *sets, "-o", tmp_path / "page"))
    page = Path(result.stdout.strip())
    data = data_of(page)
    assert data["names"] == ["ours", "theirs"]
    assert {pair["name"] for pair in data["pairs"]} == {path.stem for path in sets[0].iterdir()}
    assert {pair["left"] for pair in data["pairs"]} == {"first", "second"}
    for pair in data["pairs"]:
        order = sets if pair["left"] == "first" else sets[::-1]
        for folder, file in zip(order, pair["files"], strict=True):
            assert_same_frames(page.parent / file, folder / f"{pair['name']}.mp4")
            assert not read_metadata(page.parent / file)
            assert pair["name"] not in file
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    assert links.found == []
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(", text)
    shown, _, _ = text.partition('id="data">')
    assert not {"ours", "theirs"} & set(re.findall(r"\w+", shown))


@pytest.mark.slow
def test_the_seed_decides_sides_and_order(tmp_path, sets):
    def build(name: str, seed: int) -> list[tuple[str, str]]:
        succeed(swifti2v("compare", *sets, "-o", tmp_path / name, "--seed", seed))
        pairs = data_of(tmp_path / name / "index.html")["pairs"]
        return [(pair["name"], pair["left"]) for pair in pairs]

    assert build("a", 1) == build("b", 1) != build("c", 2)


def test_copies_can_be_sought_and_hold_nothing_else(tmp_path, sets):
    succeed(swifti2v("compare", sets[0] / "cup.mp4", sets[1] / "cup.mp4", "-o", tmp_path / "page"))
    data = data_of(tmp_path / "page/index.html")
    assert data["names"] == ["ours/cup.mp4", "theirs/cup.mp4"]
    with av.open(str(tmp_path / "page" / data["pairs"][0]["files"][0])) as container:
        assert len(container.streams) == 1
        assert container.streams.video[0].frames == 9  # a table of frames, not pieces
        assert container.duration == pytest.approx(9 / 8 * av.time_base, rel=0.02)


def test_names_cannot_break_the_page():
    name = '</script><script>alert("x")</script>\u2028'
    text = render_page({"names": [name, "b"], "pairs": []})
    assert "</script><script>alert" not in text
    (stored,) = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(stored)["names"][0] == name


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_frames": 13}, "has 9 frames, .* has 13; cut them"),
        ({"width": 64}, "is 48x32, .* is 64x32; scale one"),
        ({"fps": 16}, "plays at 8 fps, .* at 16; resample one"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(tmp_path, other, message):
    first, second = save(tmp_path / "a/x.mp4"), save(tmp_path / "b/x.mp4", **other)
    line = error_line(swifti2v("compare", first, second, "-o", tmp_path / "page"))
    assert re.search(message, line)
    assert not (tmp_path / "page").exists()


def test_wrong_sets_are_refused_before_any_work(tmp_path, sets):
    first, second = sets
    page = tmp_path / "page"

    def message(*arguments: object) -> str:
        return error_line(swifti2v("compare", *arguments))

    (second / "fog.mp4").rename(second / "gate.mp4")
    assert "fog only in" in (line := message(first, second, "-o", page))
    assert "gate only in" in line
    (tmp_path / "empty").mkdir()
    assert "holds no videos" in message(first, tmp_path / "empty", "-o", page)
    assert "does not exist" in message(first, tmp_path / "none", "-o", page)
    assert "two videos or two folders" in message(first, second / "cup.mp4", "-o", page)
    assert "compared with itself" in message(first, first, "-o", page)
    assert "not an empty folder" in message(first, second, "-o", first)
    lossless = tmp_path / "a.mkv"
    with open_writer(lossless, height=32, width=48, fps=8, codec="ffv1") as writer:
        writer.write(np.zeros((9, 32, 48, 3), np.uint8))
    assert "ffv1, which browsers do not play" in message(lossless, first / "cup.mp4", "-o", page)
    assert not page.exists()


def save_result(path: Path, votes: str, /, **changes: object) -> Path:
    """A viewer's file; votes and sides as pairs of letters, such as ``fs`` for first, on the right."""
    words = {"f": "first", "s": "second", "t": "tie"}
    values = {
        "format": 1,
        "page": "p",
        "viewer": path.stem,
        "names": ["ours", "theirs"],
        "num_pairs": 4,
        "votes": [
            {"pair": str(index), "vote": words[pair[0]], "left": words[pair[1]], "seconds": 2.5}
            for index, pair in enumerate(votes.split())
        ],
    }
    path.write_text(json.dumps(values | changes))
    return path


def test_tally_adds_up_viewers(tmp_path):
    files = [
        save_result(tmp_path / "a.json", "ff fs ff ts"),
        save_result(tmp_path / "b.json", "ff sf sf"),
    ]
    votes = json.loads(succeed(swifti2v("compare", "tally", *files, "--json")).stdout)
    counts = {name: votes[f"num_{name}"] for name in ("viewers", "first", "second", "ties", "open")}
    assert counts == {"viewers": 2, "first": 4, "second": 2, "ties": 1, "open": 1}
    # Wilson's interval for 4 of 6, worked by hand.
    share = votes["share_first"]
    assert (share["value"], share["num_items"]) == (pytest.approx(2 / 3), 6)
    assert (share["low"], share["high"]) == (
        pytest.approx(0.300, abs=1e-3),
        pytest.approx(0.903, abs=1e-3),
    )
    assert votes["share_left"]["value"] == pytest.approx(3 / 6)
    text = succeed(swifti2v("compare", "tally", *files)).stdout
    assert "ours: 4 votes\ntheirs: 2 votes\nties: 1, not voted on: 1\n" in text
    assert "votes for ours without ties: 66.7% of 6, 95 % interval 30.0% to 90.3%" in text


def test_tally_of_ties_has_no_share(tmp_path):
    text = succeed(swifti2v("compare", "tally", save_result(tmp_path / "a.json", "tf"))).stdout
    assert "votes for ours without ties: none" in text


def test_bad_results_are_refused(tmp_path):
    good = save_result(tmp_path / "a.json", "ff")

    def message(*files: Path) -> str:
        return error_line(swifti2v("compare", "tally", *files))

    assert "given twice" in message(good, good)
    copy = save_result(tmp_path / "copy.json", "ff", viewer="a")
    assert "are of one viewer" in message(good, copy)
    assert "one comparison at a time" in message(
        good, save_result(tmp_path / "b.json", "ff", names=["ours", "others"])
    )
    assert "not a result of 'swifti2v compare'" in message(
        save_result(tmp_path / "c.json", "ff", format=2)
    )
    assert "has no votes" in message(save_result(tmp_path / "d.json", ""))
    double = [{"pair": "x", "vote": "tie", "left": "first", "seconds": 1}] * 2
    assert "two votes on 'x'" in message(save_result(tmp_path / "e.json", "", votes=double))
    assert "2 votes on 1 pairs" in message(save_result(tmp_path / "h.json", "ff ff", num_pairs=1))
    (tmp_path / "f.json").write_text("{")
    assert "is not JSON" in message(tmp_path / "f.json")
    assert "No such file" in message(tmp_path / "g.json")


@given(st.lists(st.sampled_from(["ff", "fs", "sf", "ss", "tf", "ts"]), min_size=1, max_size=4))
def test_no_vote_is_lost(tmp_path_factory, votes):
    path = save_result(tmp_path_factory.mktemp("votes") / "a.json", " ".join(votes))
    counted = tally([path])
    assert counted.num_first + counted.num_second + counted.num_ties == len(votes)
    assert counted.num_open == 4 - len(votes)
