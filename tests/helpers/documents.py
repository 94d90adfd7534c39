"""What README and docs tell a reader to type: commands, Python, and files of the repository."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md"),
]
"""All but records of the past."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+")
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_0-9]*|\.\.\.|\$\w+")
"""What a reader puts something else in place of."""


@dataclass(frozen=True)
class Passage:
    """Some words of a document."""

    text: str
    path: Path
    line: int
    """Of its first character, from 1."""

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.text}"


def find_blocks(path: Path, language: str | None = None) -> list[Passage]:
    """Blocks of code, fenced or set in by four spaces; of one language or of all."""
    text = path.read_text(encoding="utf-8")
    fenced = [(m.start(2), m[2], m[1]) for m in FENCE.finditer(text)]
    outside = FENCE.sub(lambda m: re.sub(r"[^\n]", "x", m[0]), text)
    indented = [(m.start(), m[0], "") for m in INDENTED.finditer(outside)]
    return [
        Passage(body, path, text.count("\n", 0, start) + 1)
        for start, body, own in sorted(fenced + indented)
        if language is None or own == language
    ]


def find_spans(path: Path) -> list[Passage]:
    """Code within sentences; one that goes over the end of a line is joined."""
    text = path.read_text(encoding="utf-8")
    prose = INDENTED.sub(_blank, FENCE.sub(_blank, text))
    return [
        Passage(re.sub(r"\s+", " ", found[1]), path, prose.count("\n", 0, found.start()) + 1)
        for found in SPAN.finditer(prose)
    ]


def find_commands(path: Path) -> list[tuple[Passage, list[str]]]:
    """Lines of shell in the blocks of a document, and their words; comments are left out."""
    return [
        (passage, words)
        for block in find_blocks(path)
        for passage in _logical_lines(block)
        if (words := _split(passage.text))
    ]


def arguments_of(words: list[str]) -> list[str] | None:
    """What a line gives ``swifti2v``, which it may run by a launcher; None of other programs."""
    for index, word in enumerate(words):
        if Path(word).name == "swifti2v" and (index == 0 or words[index - 1] == "-m"):
            return words[index + 1 :]
    return None


def _logical_lines(block: Passage) -> Iterator[Passage]:
    """Lines, joined where one ends with a backslash."""
    begun, first = "", block.line
    for number, line in enumerate(block.text.splitlines(), block.line):
        begun, first = (begun, first) if begun else ("", number)
        if line.endswith("\\"):
            begun += line[:-1]
            continue
        yield Passage((begun + line).strip(), block.path, first)
        begun = ""


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a drawing
        return []


def _blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])
