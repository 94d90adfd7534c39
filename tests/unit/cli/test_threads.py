"""Threads in a container: control groups of both versions."""

import os
from pathlib import Path

import pytest

from swifti2v.cli.threads import limit_threads, read_quota


def version2(root: Path, text: str) -> Path:
    (root / "cpu.max").write_text(text)
    return root


def version1(root: Path, quota: str, period: str) -> Path:
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (root / "cpu" / "cpu.cfs_period_us").write_text(period)
    return root


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200000 100000\n", 2), ("150000 100000\n", 1.5), ("max 100000\n", None), ("x\n", None)],
)
def test_version_2(text, expected, tmp_path):
    assert read_quota(version2(tmp_path, text)) == expected


@pytest.mark.parametrize(("quota", "expected"), [("50000\n", 0.5), ("-1\n", None), ("400000\n", 4)])
def test_version_1(quota, expected, tmp_path):
    assert read_quota(version1(tmp_path, quota, "100000\n")) == expected


def test_no_control_groups_are_no_limit(tmp_path):
    assert read_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("150000 100000", None, "1"),
        ("50000 100000", None, "1"),
        ("250000 100000", None, "2"),
        ("250000 100000", "7", "7"),
        ("6400000 100000", None, None),  # all of the machine
        ("max 100000", None, None),
    ],
)
def test_threads_are_limited_where_nothing_else_says(text, given, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that it is put back as it was
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    limit_threads(version2(tmp_path, text))
    assert os.environ.get("OMP_NUM_THREADS") == expected
