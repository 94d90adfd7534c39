"""Fixtures of every test."""

import gc

import pytest


def pytest_collection_finish() -> None:
    """Imported modules live to the end: no collection of garbage has to walk over them."""
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt embeddings go to a folder of this run, also those of subprocesses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
