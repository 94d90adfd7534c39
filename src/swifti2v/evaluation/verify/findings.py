"""Results of checks, and the running of them: one that fails does not hide the others."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from swifti2v.errors import SwiftI2VError

Status = Literal["ok", "off", "skipped"]
PATH = re.compile(r"(?<![\w.])~?/(?:[^\s/:;,'\"()]+/)*")
"""Folders of an absolute path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Result of one check."""

    check: str
    """Name of the check, such as ``denoising of stage2``."""
    status: Status
    """``off`` where something is not as expected; ``skipped`` where another fault prevents the check."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Measured values by name."""
    expected: str = ""
    """Expectation in words."""
    cause: str = ""
    """Likely cause of what is off, or the reason for skipping."""


class SkippedError(Exception):
    """A check cannot be made because of a fault that another check names."""


def judge(
    check: str, values: Mapping[str, Any], expected: str, causes: Mapping[str, bool]
) -> Finding:
    """Finding of a check that ran.

    Args:
        check: Name of the check.
        values: Measured values.
        expected: Expectation in words.
        causes: Whether each cause explains the values; the first that does is named.
    """
    cause = next((text for text, holds in causes.items() if holds), "")
    status: Status = "off" if cause else "ok"
    return Finding(check=check, status=status, values=values, expected=expected, cause=cause)


def attempt(check: str, run: Callable[[], Finding]) -> Finding:
    """Run a check; whatever it raises becomes its finding."""
    try:
        return run()
    except SkippedError as error:
        return Finding(check=check, status="skipped", cause=str(error))
    except (SwiftI2VError, OSError, MemoryError) as error:
        text = "; ".join([str(error), *getattr(error, "__notes__", ())])
        return Finding(check=check, status="off", cause=without_paths(text))
    except Exception as error:  # a report of a fault is worth more than none
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Finding(check=check, status="off", cause=without_paths(text))


def without_paths(text: str) -> str:
    """The text with files, but without the folders that hold them: it is meant to be posted."""
    return PATH.sub("", text.replace(str(Path.home()), "~"))
