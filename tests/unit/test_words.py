"""Docstrings, help texts and documents are plain sentences that name their noun."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"),
    *sorted((ROOT / "src").rglob("*.yaml")),
]
NO_NOUN = re.compile(r"(Of|What|How|As|Where|When|Why|Who|Which|Whose|Likewise|Gets)\b")
DROPPED = re.compile(r"\b([Ll]ikewise|[Ss]hall|[Ww]hoever|thereof|is none|as \w+( \w+)? has it)\b")


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings, those of fields included, and help texts, with their lines."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text
            case ast.keyword(arg="help", value=ast.Constant(value=str(text))):
                yield node.value.lineno, text


def places(found: Iterator[tuple[int, str]], path: Path) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}" for line, text in found]


def test_a_riddle_is_found():
    source = (
        'class Plan:\n    seconds: float\n    """Of the run."""\n    size: int\n    """Bytes."""\n'
    )
    assert [line for line, text in texts(source) if NO_NOUN.match(text)] == [3]


def test_docstrings_and_help_texts_begin_with_a_noun_or_a_verb():
    riddles = []
    for path in SOURCES:
        found = texts(path.read_text(encoding="utf-8"))
        riddles += places(((line, text) for line, text in found if NO_NOUN.match(text)), path)
    assert not riddles, "name the noun again, such as 'Seed of the initial noise.'"


def test_dropped_words_stay_out():
    found = []
    for path in [*SOURCES, *DOCUMENTS]:
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        found += places(((line, text) for line, text in lines if DROPPED.search(text)), path)
    assert not found, "say it with a noun and a verb"
