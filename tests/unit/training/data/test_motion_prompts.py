"""Sentences ask for what they are said to ask for, and labels tell it to the text encoder."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from swifti2v.models.text import doubt_prompt
from swifti2v.pipelines.camera_moves import FAST, MOVES, SLOW, CameraMove
from swifti2v.training.data.motion_prompts import (
    AXES,
    MotionPrompt,
    ask_for,
    draw_prompt,
    known_phrases,
)
from swifti2v.training.nano.text_encoder import QUESTIONS, label_prompt
from tests.unit.models.test_text import known_to

PROMPTS = [draw_prompt(np.random.default_rng(seed)) for seed in range(3000)]
WAYS = {"pan": ("left", "right"), "tilt": ("up", "down"), "roll": ("left", "right"),
        "orbit": ("left", "right")}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_what_asks_for_a_move_is_known_and_asks_for_that_move(name):
    encoder = known_to(known_phrases())
    rng = np.random.default_rng(0)
    prompts = {ask_for(name, rng) for _ in range(60)}
    assert len(prompts) > 25
    own = known_to({name: known_phrases()[name]})
    for prompt in prompts:
        assert doubt_prompt(encoder, prompt) is None
        assert doubt_prompt(own, prompt) is None, prompt


def test_phrases_of_a_move_are_its_alone():
    known = known_phrases()
    assert known.keys() == MOVES.keys()
    owners = Counter(phrase for phrases in known.values() for phrase in phrases)
    assert max(owners.values()) == 1
    for name, phrases in known.items():
        assert len(phrases) >= 8
        axis, _, way = name.partition(" ")
        if axis in WAYS:
            assert all(WAYS[axis][way == WAYS[axis][1]] in phrase for phrase in phrases)
    assert {"pan left", "panning left", "pans left"} <= set(known["pan left"])
    assert {"push in", "pushing in", "pushes in", "flies in"} <= set(known["dolly in"])
    assert {"rotating left", "spinning left"} <= set(known["roll left"])


def test_every_move_is_asked_for_at_three_speeds_and_alone_or_with_another():
    ways = Counter[tuple[str, float]]()
    numbers = Counter[int]()
    for prompt in PROMPTS:
        moved = {axis: getattr(prompt.move, axis) for axis in AXES if getattr(prompt.move, axis)}
        ways.update(moved.items())
        numbers[len(moved)] += 1
    speeds = [sign * speed for sign in (1, -1) for speed in (SLOW, 1.0, FAST)]
    assert ways.keys() == {(axis, speed) for axis in AXES for speed in speeds}
    assert min(ways.values()) > 30
    assert numbers.keys() == {0, 1, 2}
    assert numbers[1] > numbers[0] > 300
    assert numbers[2] > 300


def test_some_prompts_ask_for_no_camera_move():
    silent = [prompt for prompt in PROMPTS if not prompt.asks]
    assert 0.05 < len(silent) / len(PROMPTS) < 0.11
    assert all(prompt.move == CameraMove() for prompt in silent)


def axes_of_verbs() -> dict[str, set[str]]:
    """Axes along which a command begins with a verb: ``panning`` is of pans alone."""
    axes: dict[str, set[str]] = {}
    for name, phrases in known_phrases().items():
        axis = name.partition(" ")[0]
        if axis in AXES:
            for phrase in phrases:
                axes.setdefault(phrase.partition(" ")[0], set()).add(axis)
    return axes


def test_denied_moves_are_not_made():
    verbs = axes_of_verbs()
    denial = re.compile(
        rf"\b(?:do not|don't|never|without|no|not) ({'|'.join(verbs)})\b(?! the camera)"
    )
    found = [(denial.search(prompt.text.lower()), prompt.move) for prompt in PROMPTS]
    denied = [(verbs[match[1]], move) for match, move in found if match]
    assert sum(move == CameraMove() for _, move in denied) > 60
    assert sum(move != CameraMove() for _, move in denied) > 60  # beside another that is made
    for axes, move in denied:
        asked = {axis for axis in AXES if getattr(move, axis)}
        assert len(asked) <= 1
        assert asked != axes


def test_slow_and_fast_words_tell_the_speed():
    for prompt in PROMPTS:
        words = prompt.text.lower()
        speed = max(abs(getattr(prompt.move, axis)) for axis in AXES)
        if any(word in words for word in ("slowly", "gently", "softly")):
            assert speed == SLOW
        elif any(word in words for word in ("quickly", "rapidly", "swiftly")):
            assert speed == FAST
        elif speed in (SLOW, FAST):
            assert any(word in words for word in ("slow", "a little", "fast", "quick", "a lot"))


def test_zooms_are_not_mixed_with_dollies_nor_pans_with_orbits():
    for prompt in PROMPTS:
        move = prompt.move
        assert not (move.zoom and move.dolly)
        assert not (move.pan and move.orbit)


def test_a_hand_is_named_where_it_sways():
    for prompt in PROMPTS:
        words = prompt.text.lower()
        is_named = any(word in words for word in ("handheld", "hand-held", "shaky"))
        assert is_named == (prompt.move.sway == 1), prompt.text
    assert 0.08 < sum(prompt.move.sway for prompt in PROMPTS) / len(PROMPTS) < 0.3


def test_a_seed_draws_a_sentence_and_no_two_are_alike():
    assert draw_prompt(np.random.default_rng(5)) == draw_prompt(np.random.default_rng(5))
    assert len({prompt.text for prompt in PROMPTS}) > 0.9 * len(PROMPTS)
    longest = max(len(prompt.text.encode()) for prompt in PROMPTS)
    assert longest < 200
    assert all("{" not in prompt.text and "  " not in prompt.text for prompt in PROMPTS)


@pytest.mark.parametrize(
    ("text", "move", "signs", "speed", "sway"),
    [
        ("pan left", CameraMove(pan=-1), {"pan": 0}, 1, 0),
        ("quickly tilt down", CameraMove(tilt=FAST), {"tilt": 2}, 2, 0),
        ("slowly zoom out", CameraMove(zoom=-SLOW), {"zoom": 0}, 0, 0),
        ("dolly in and roll left", CameraMove(dolly=1, roll=-1), {"dolly": 2, "roll": 0}, 1, 0),
        ("orbit right, handheld", CameraMove(orbit=1, sway=1), {"orbit": 2}, 1, 1),
        ("a shaky camera", CameraMove(sway=1), {}, 1, 1),
        ("static", CameraMove(), {}, 1, 0),
    ],
)
def test_labels_are_the_answers(text, move, signs, speed, sway):
    expected = [signs.get(axis, 1) for axis in AXES]
    prompt = MotionPrompt(text=text, move=move)
    assert label_prompt(prompt) == (*expected, speed, sway, 1)
    assert label_prompt(replace(prompt, asks=False)) == (*expected, speed, sway, 0)


def test_drawn_prompts_have_labels_among_the_answers():
    labels = np.array([label_prompt(prompt) for prompt in PROMPTS])
    assert labels.shape[1] == len(QUESTIONS)
    for question, number in enumerate(QUESTIONS):
        assert set(labels[:, question]) == set(range(number))
