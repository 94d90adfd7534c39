"""What README and docs show works as it stands there: commands, Python, names of files."""

import ast
import importlib
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from swifti2v.cli import app
from swifti2v.config import GenerationConfig, parse_config
from swifti2v.media import probe_clip
from swifti2v.models.loading.sources import find_model
from swifti2v.shipped import shipped_configs
from tests.helpers.command_line import save_lora, save_photo, succeed, swifti2v
from tests.helpers.documents import (
    DOCUMENTS,
    PLACEHOLDER,
    ROOT,
    Passage,
    arguments_of,
    find_blocks,
    find_commands,
    find_spans,
)
from tests.helpers.training_clips import save_counting_clip, save_csv

PROGRAM: Any = typer.main.get_command(app)
COMMANDS = [
    (passage, arguments)
    for path in DOCUMENTS
    for passage, words in find_commands(path)
    if (arguments := arguments_of(words)) is not None
]
MENTIONS = [
    passage
    for path in DOCUMENTS
    for passage in find_spans(path)
    if passage.text.removeprefix("swifti2v ").split(" ")[0] in PROGRAM.commands
]
PYTHON = [block for path in DOCUMENTS for block in find_blocks(path, "python")]
SCRIPTS = [p for p in sorted((ROOT / "runs").rglob("*")) if p.suffix in (".py", ".sh", ".md")]
per_command = pytest.mark.parametrize(
    ("passage", "arguments"), COMMANDS, ids=[f"{p.path.name}:{p.line}" for p, _ in COMMANDS]
)
per_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def fail(passage: Passage, error: object) -> None:
    pytest.fail(f"{passage}\n{error}", pytrace=False)


def leaves(command: Any) -> list[Any]:
    """The commands below a group, without groups."""
    if not hasattr(command, "commands"):
        return [command]
    return [leaf for below in command.commands.values() for leaf in leaves(below)]


def options_of(command: Any) -> list[str]:
    return [name for own in command.params for name in (*own.opts, *own.secondary_opts)]


def find_command(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that some words name, and the words behind its name."""
    command, words = PROGRAM, list(arguments)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    return command, words


def test_there_is_something_to_check():
    assert len(COMMANDS) > 40
    assert len(MENTIONS) > 20
    assert PYTHON


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Names of the commands that were called; none of them runs."""
    names: list[Any] = []
    for leaf in leaves(PROGRAM):
        monkeypatch.setattr(leaf, "callback", lambda _name=leaf.name, **_: names.append(_name))
    return names


@per_command
def test_a_command_parses(passage, arguments, parsed):
    try:
        PROGRAM.main(arguments, standalone_mode=False)
    except Exception as error:  # of the command line's parser, whose class is typer's own
        fail(passage, error)
    assert len(parsed) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "photo.jpg", "-o", "out.mp4", "--colour", "red"],
        ["generate", "photo.jpg", "-o", "out.mp4", "--num-frames", "many"],
        ["train", "stage3", "--output-dir", "out"],
        ["animate", "photo.jpg"],
    ],
)
def test_what_is_no_command_does_not_parse(arguments, parsed):
    with pytest.raises(BaseException, match=r"(?i)no such|valid integer|not a valid"):
        PROGRAM.main(arguments, standalone_mode=False)
    assert not parsed


@pytest.mark.parametrize("passage", MENTIONS, ids=lambda p: f"{p.path.name}:{p.line}")
def test_a_command_within_a_sentence_has_these_options(passage):
    command, words = find_command(shlex.split(passage.text.removeprefix("swifti2v ")))
    if words and hasattr(command, "commands") and not PLACEHOLDER.match(words[0]):
        fail(passage, f"there is no command {words[0]}")
    options = {name for leaf in leaves(command) for name in options_of(leaf)}
    for word in words:
        if word.startswith("-") and word.partition("=")[0] not in options:
            fail(passage, f"there is no option {word}")


SMALL = ("--num-frames", 5, "--height", 64, "--width", 96)
"""Of the run that is begun."""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who reads, with what commands before made; ``begun`` has a run."""
    folder: Path = tmp_path_factory.mktemp("reader")
    (folder / "begun").mkdir()
    (folder / "ComfyUI/models").mkdir(parents=True)
    for place in (folder, folder / "begun"):
        save_photo(place / "photo.jpg", 160, 96)
    for name in ("small.mp4", "clip.mp4"):
        save_counting_clip(folder / name, 5, height=64, width=96)
    save_csv(
        folder / "photos.csv", ("image", "prompt"), [{"image": "photo.jpg", "prompt": "pan left"}]
    )
    save_csv(folder / "clips.csv", ("video", "prompt"), [{"video": "clip.mp4", "prompt": "fog"}])
    made = ("generate", "photo.jpg", "-p", "zoom in", "-o", folder / "out.mp4", *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "begun")
        succeed(swifti2v(*made, "--work-dir", "run1"))
        patch.chdir(folder)
        succeed(swifti2v("configs", "copy", "presets/paper", "-o", "my_paper.yaml"))
    for lora in ("style.safetensors", "out/relay/relay2.safetensors"):
        (folder / lora).parent.mkdir(parents=True, exist_ok=True)
        save_lora(folder / lora, 384)  # as wide as nano
    return folder


PLANNED = {
    " ".join(arguments): (passage, arguments)
    for passage, arguments in COMMANDS
    if "--dry-run" in options_of(find_command(arguments)[0])
    and not any(PLACEHOLDER.fullmatch(word) for word in arguments)
}
"""Each of them once."""


@pytest.mark.slow
@pytest.mark.parametrize("command", PLANNED)
def test_a_command_with_a_dry_run_plans(command, reader, monkeypatch):
    passage, arguments = PLANNED[command]
    words: list[object] = [word for word in arguments if word != "--dry-run"]
    if {"--work-dir", "--resume"} <= {*words}:
        words += SMALL
    if "--memory" in words:  # counts the work of a 2K clip, see test_placing.py and test_stored.py
        del words[words.index("--memory") : words.index("--memory") + 2]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(reader / "hub"))
    monkeypatch.chdir(reader / "begun" if "--resume" in words else reader)
    result = swifti2v(*words, "--dry-run")
    if result.exit_code:
        fail(passage, result.stderr)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.path.name}:{block.line}")
def test_python_compiles_and_its_imports_are_there(block):
    tree = ast.parse(block.text, str(block.path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.slow
def test_the_python_example_saves_its_video(tmp_path, monkeypatch):
    (block,) = find_blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    save_photo(tmp_path / "photo.jpg", 80, 48)

    exec(compile(block.text, str(block.path), "exec"), {})

    config = parse_config(GenerationConfig, find_model("nano")[0].settings, "nano")
    info = probe_clip(tmp_path / "out.mp4")
    assert (info.num_frames, info.width, info.height, info.fps) == (
        config.num_frames, config.width, config.height, config.fps,
    )  # fmt: skip


@per_document
def test_modules_that_are_named_are_there(path):
    """``swifti2v.room.module`` or a name in it."""
    for passage in find_spans(path):
        for name in re.findall(r"^swifti2v(?:\.\w+)+$", passage.text):
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError) as error:
                fail(passage, error)


@per_document
def test_files_that_are_named_are_there(path):
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r"(?<![\w/.])(?:docs|examples|runs|src|tests)/[\w/]+\.\w+", text):
        if not (ROOT / found[0]).exists():
            line = text.count("\n", 0, found.start()) + 1
            fail(Passage(found[0], path, line), "there is no such file")


@per_document
def test_targets_of_make_are_there(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for passage, words in find_commands(path):
        if words[0] == "make":
            for word in words[1:]:
                if not word.startswith("-") and "=" not in word and word not in targets:
                    fail(passage, f"the Makefile has no target {word}")


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=lambda path: path.name)
def test_configs_that_are_named_ship(path):
    named = set(re.findall(r"--config ([a-z][\w/]+)(?![.\w])", path.read_text("utf-8")))
    assert named <= shipped_configs().keys()
