"""Rows of tables that people write: CSV and JSON lines."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from swifti2v.errors import InputError

_MAX_FIELD_BYTES = 2**24  # of a CSV; captions may exceed Python's 128 KiB


def read_csv(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a CSV with a header; every cell is a text.

    Raises:
        InputError: It is no CSV in UTF-8, or a row has more cells than the header.
    """
    limit = csv.field_size_limit(_MAX_FIELD_BYTES)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row:
                    raise InputError(
                        f"{path}, line {reader.line_num}: more fields than columns; "
                        "put quotes around texts with commas"
                    )
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(limit)


def read_json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a file with a JSON object on each line; empty lines are passed over.

    Raises:
        InputError: A line is no JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number} must be an object with keys and values")
            yield row
