"""Fixtures of every test."""

import gc
from functools import cache

import pytest
import typer.testing

# Typer makes all commands anew for each run within the process; they are the same ones.
typer.testing._get_command = cache(typer.testing._get_command)


def pytest_collection_finish() -> None:
    """Imported modules live to the end: no collection of garbage has to walk over them."""
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt embeddings go to a folder of this run, also those of subprocesses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
