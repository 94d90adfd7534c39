import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from swifti2v.shipped import PACKAGE
from tests.helpers.serving import Live, photo, serve

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
WAIT_MILLISECONDS = 90_000
NANO = PACKAGE / "nano"
OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; it ends with its tests, as others cannot run an event loop beside Playwright's."""
    found = next(filter(None, map(shutil.which, EXECUTABLES)), None)
    if found is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with sync_playwright() as tools:
        yield tools.chromium.launch(executable_path=found, args=["--no-sandbox"])


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("served")
    with serve(NANO, folder) as server:
        yield server


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens the page of a server; no script may fail in it, and nothing come from elsewhere."""
    contexts: list[BrowserContext] = []
    errors: list[str] = []
    urls: list[tuple[str, str]] = []

    def open_one(url: str, *, script: str = "", is_ready: bool = True, **settings: Any) -> Page:
        context = browser.new_context(**settings)
        contexts.append(context)
        context.set_default_timeout(WAIT_MILLISECONDS)
        context.add_init_script(script)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: urls.append((url, request.url)))
        page.goto(url)
        if is_ready:
            page.wait_for_selector("#suggestions button")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not errors
    assert not [used for own, used in urls if not used.startswith((own, "blob:", "data:"))]


@pytest.fixture(scope="session")
def photo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "hills.png"
    path.write_bytes(photo(96, 64))
    return path
