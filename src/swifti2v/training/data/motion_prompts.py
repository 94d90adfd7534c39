"""Sentences that ask for camera moves, alone or beside what a picture shows."""

from dataclasses import dataclass

import numpy as np

from swifti2v.pipelines.camera_moves import FAST, MOVES, SLOW, CameraMove
from swifti2v.training.engine.draws import choose

AXES = ("pan", "tilt", "zoom", "roll", "dolly", "orbit")
"""Axes that a sentence names at most once."""

_SIDES = {"pan": ("left", "right"), "roll": ("left", "right"), "orbit": ("left", "right")}
_COMMANDS: dict[str, tuple[str, ...]] = {
    "pan": ("pan {}", "pan to the {}", "turn {}", "move {}", "truck {}", "slide {}", "swing {}"),
    "tilt": ("tilt {}", "tilt {}wards", "tilt {}ward", "look {}", "move {}", "pedestal {}"),
    "roll": ("roll {}", "roll to the {}", "rotate {}", "rotate to the {}", "spin {}"),
    "orbit": ("orbit {}", "orbit to the {}", "arc {}", "circle {}", "orbit around to the {}"),
    "zoom in": ("zoom in", "zoom into the scene", "zoom in on the {noun}", "zoom closer"),
    "zoom out": ("zoom out", "zoom out of the scene", "zoom out from the {noun}", "zoom away"),
    "dolly in": ("dolly in", "dolly forward", "push in", "move closer", "move forward", "fly in",
                 "move towards the {noun}"),
    "dolly out": ("dolly out", "dolly back", "pull back", "pull out", "move away", "move backwards",
                  "fly out", "move back"),
}  # fmt: skip
_HANDHELD = ("handheld", "handheld camera", "hand-held camera", "shaky camera", "handheld shot",
             "shaky handheld footage", "handheld style", "with a shaky hand")  # fmt: skip
_STATIC = ("static", "static camera", "the camera does not move", "a still shot", "locked camera",
           "fixed camera", "static shot", "no camera movement", "the camera stays still",
           "tripod shot", "do not move the camera", "camera locked off", "no camera motion",
           "without camera movement", "no motion", "hold still")  # fmt: skip
_DENIALS = ("do not {}", "don't {}", "never {}", "without {ing}", "no {ing}", "not {ing}")
_SLOWLY = ("slowly", "gently", "slow", "very slowly", "softly", "a little")
_QUICKLY = ("quickly", "fast", "rapidly", "very fast", "swiftly", "quick", "a lot")
_JOINTS = (" and ", ", ", " while we ", " and then ", " & ", " + ", " and also ")
_SUBJECTS = ("", "", "", "the camera {}", "camera {}", "let the camera {}", "please {}", "we {}",
             "the camera should {}", "a shot where we {}")  # fmt: skip

_ADJECTIVES = (
    "a red", "a blue", "an old", "a young", "the big", "a small", "a quiet", "a busy",
    "the bright", "the dark", "a green", "a golden", "the", "a", "two", "many",
)  # fmt: skip
_NOUNS = (
    "house", "street", "cat", "dog", "woman", "man", "city", "river", "mountain", "forest", "car",
    "table", "room", "garden", "sea", "beach", "market", "bridge", "tower", "flower", "snake",
    "train", "boat", "sky", "field", "child", "bird", "horse", "kitchen", "shop", "rocket", "moon",
    "face", "lake", "desert", "window", "fireworks", "galaxy", "board", "hall", "people", "cloud",
)  # fmt: skip
_DOINGS = (
    "runs", "moves to the left", "walks to the right", "looks up", "falls down", "flies away",
    "turns around", "stands still", "jumps up and down", "comes closer", "waves", "glows",
    "goes in", "walks out", "rolls down the hill", "spins", "dances", "burns", "drifts by", "smiles",
)  # fmt: skip
_CIRCUMSTANCES = (
    "at sunset", "in the rain", "in the morning", "on a hill", "near the water", "with clouds",
    "under the trees", "in winter", "by the window", "at night", "in sunlight", "on the left",
    "on the right", "up in the air", "down the road", "in slow motion", "4k", "cinematic",
    "high quality", "in the background", "seen from above",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionPrompt:
    """A sentence and what it asks for."""

    text: str
    """Text as a user might type it."""
    move: CameraMove
    """``CameraMove()`` where the camera rests."""
    asks: bool = True
    """False: it says nothing of the camera."""


def draw_prompt(rng: np.random.Generator) -> MotionPrompt:
    """A random sentence: of one move, of two, of a hand, of rest, or of no camera at all."""
    kind = rng.random()
    if kind < 0.08:
        return MotionPrompt(text=_finish(_draw_scene(rng), rng), move=CameraMove(), asks=False)
    if kind < 0.14:
        return _beside_scene(choose(_STATIC, rng), CameraMove(), rng)
    if kind < 0.17:
        return _beside_scene(_deny(choose(AXES, rng), rng), CameraMove(), rng)
    axes = [choose(AXES, rng)]
    if kind > 0.68:
        axes.append(choose([axis for axis in AXES if axis != axes[0]], rng))
    if {"zoom", "dolly"} <= set(axes) or {"pan", "orbit"} <= set(axes):  # both alike or at odds
        axes = axes[:1]
    signs = [1 if rng.random() < 0.5 else -1 for _ in axes]
    phrase = choose(_JOINTS, rng).join(
        _draw_command(axis, sign, rng) for axis, sign in zip(axes, signs, strict=True)
    )
    phrase, speed = _draw_speed(phrase, rng)
    if len(axes) == 1 and rng.random() < 0.06:
        others = [axis for axis in AXES if axis != axes[0]]
        phrase += choose((", ", " but ", " and "), rng) + _deny(choose(others, rng), rng)
    phrase = choose(_SUBJECTS, rng).format(phrase) or phrase
    sway = float(rng.random() < 0.12)
    if kind < 0.23:  # a hand alone
        return _beside_scene(choose(_HANDHELD, rng), CameraMove(sway=1), rng)
    if sway:
        parts = [phrase, choose(_HANDHELD, rng)]
        phrase = ", ".join(parts if rng.random() < 0.5 else parts[::-1])
    ways = {axis: sign * speed for axis, sign in zip(axes, signs, strict=True)}
    return _beside_scene(phrase, CameraMove(sway=sway, **ways), rng)


def ask_for(name: str, rng: np.random.Generator) -> str:
    """A random sentence that asks for one of ``MOVES`` at its usual speed."""
    axis, _, way = name.partition(" ")
    if not way:
        phrase = choose(_STATIC if name == "static" else _HANDHELD, rng)
    else:
        sign = 1 if way in ("right", "down", "in") else -1
        phrase = choose(_SUBJECTS, rng).format(command := _draw_command(axis, sign, rng)) or command
    return _beside_scene(phrase, MOVES[name], rng).text


def _draw_command(axis: str, sign: int, rng: np.random.Generator) -> str:
    command = choose(_list_commands(axis, sign), rng).format(noun=choose(_NOUNS, rng))
    return choose(_conjugate(command), rng) if rng.random() < 0.25 else command


def _list_commands(axis: str, sign: int) -> list[str]:
    """Commands of one way along an axis, ``{noun}`` standing for what may follow."""
    if axis in ("zoom", "dolly"):
        return list(_COMMANDS[f"{axis} {'in' if sign > 0 else 'out'}"])
    side = _SIDES.get(axis, ("up", "down"))[sign > 0]
    return [command.format(side) for command in _COMMANDS[axis]]


def _conjugate(command: str) -> tuple[str, str]:
    """``panning left`` and ``pans left``."""
    verb, _, rest = command.partition(" ")
    is_doubled = verb in ("pan", "spin")
    stem = verb + verb[-1] if is_doubled else verb.removesuffix("e")
    third = f"{verb}es" if verb.endswith("sh") else f"{verb.removesuffix('y')}ies"
    third = third if verb.endswith(("sh", "fly")) else f"{verb}s"
    return f"{stem}ing {rest}", f"{third} {rest}"


def _deny(axis: str, rng: np.random.Generator) -> str:
    """A command that is denied: ``do not zoom in``, ``no panning``."""
    command = _draw_plain(axis, rng)
    ing = _conjugate(command)[0]
    if rng.random() < 0.4:  # the verb alone
        command, ing = command.partition(" ")[0], ing.partition(" ")[0]
    denial = choose(_DENIALS, rng)
    return denial.replace("{ing}", ing) if "{ing}" in denial else denial.format(command)


def _draw_plain(axis: str, rng: np.random.Generator) -> str:
    sign = 1 if rng.random() < 0.5 else -1
    return choose(_list_commands(axis, sign), rng).format(noun=choose(_NOUNS, rng))


def known_phrases() -> dict[str, list[str]]:
    """Phrases for each of ``MOVES``, as ``swifti2v.models.text.doubt_prompt`` reads them."""
    known: dict[str, list[str]] = {}
    for name in MOVES:
        axis, _, way = name.partition(" ")
        if not way:
            known[name] = list(_STATIC if name == "static" else _HANDHELD)
            continue
        plain = _list_commands(axis, 1 if way in ("right", "down", "in") else -1)
        commands = [command.removesuffix(" the {noun}") for command in plain]
        forms = [(command, *_conjugate(command)) for command in commands]
        known[name] = list(dict.fromkeys(form for own in forms for form in own))
    return known


def _draw_speed(phrase: str, rng: np.random.Generator) -> tuple[str, float]:
    draw = rng.random()
    if draw < 0.64:
        return phrase, 1.0
    words, speed = (_SLOWLY, SLOW) if draw < 0.82 else (_QUICKLY, FAST)
    word = choose(words, rng)
    return f"{word} {phrase}" if rng.random() < 0.5 else f"{phrase} {word}", speed


def _draw_scene(rng: np.random.Generator) -> str:
    scene = f"{choose(_ADJECTIVES, rng)} {choose(_NOUNS, rng)}"
    if rng.random() < 0.35:
        scene += f" {choose(_DOINGS, rng)}"
    if rng.random() < 0.4:
        scene += f" {choose(_CIRCUMSTANCES, rng)}"
    return scene


def _beside_scene(phrase: str, move: CameraMove, rng: np.random.Generator) -> MotionPrompt:
    order = rng.random()
    scene = _draw_scene(rng) if order >= 0.4 else ""
    joint = choose((", ", ". ", "; ", " - "), rng)
    text = phrase if not scene else joint.join((scene, phrase) if order < 0.7 else (phrase, scene))
    return MotionPrompt(text=_finish(text, rng), move=move)


def _finish(text: str, rng: np.random.Generator) -> str:
    draw = rng.random()
    text = text.capitalize() if draw < 0.3 else text.upper() if draw < 0.33 else text
    return f"{text}." if rng.random() < 0.25 else text
