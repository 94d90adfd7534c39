"""Fixtures of every test."""

import gc
from functools import cache
from typing import Any

import pytest
import typer.testing

# Typer makes all commands anew for each run within the process; they are the same ones.
testing: Any = typer.testing
testing._get_command = cache(testing._get_command)


NUM_SLOW = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Slow tests that are left out are counted; a process of xdist tells the first one."""
    config, number = items[0].config, sum("slow" in item.keywords for item in items)
    config.stash[NUM_SLOW] = number
    getattr(config, "workeroutput", {})["num_slow"] = number


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[NUM_SLOW] = getattr(node, "workeroutput", {}).get("num_slow", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if number := config.stash.get(NUM_SLOW, 0):
        terminalreporter.write_line(f"{number} slow tests were left out: make test-all runs them")


def pytest_collection_finish() -> None:
    """Imported modules live to the end: no collection of garbage has to walk over them."""
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt embeddings go to a folder of this run, also those of subprocesses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
