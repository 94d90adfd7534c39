"""The page in a real browser, on the model that ships."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from swifti2v.jobs.settings import read_settings
from swifti2v.serving.data_dir import DataDir
from swifti2v.serving.keys import Keys
from tests.browser.conftest import NANO, WAIT_MILLISECONDS
from tests.helpers.serving import serve, wait

expect.set_options(timeout=WAIT_MILLISECONDS)
SLOW = 30
"""Steps of a video that is still being made when it is looked at."""
BEING_MADE = re.compile("segment [23] of 3")
LATER = "17: zoom in"
PHONE = {"width": 390, "height": 844}
IPHONE = "self.ManagedMediaSource = self.MediaSource; delete self.MediaSource;"
"""What iPhones have in its place."""
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


def fill(page: Page, photo: Path, *, steps: int = 1, seed: int = 7) -> None:
    """Fill the form for a small video."""
    page.set_input_files("#photo", photo)
    page.fill("#prompt", "")
    page.click("#suggestions button:has-text('pan left')")
    page.fill("#width", "96")
    page.fill("#height", "64")
    page.fill("#seed", str(seed))
    page.evaluate("document.querySelector('#more').open = true")
    page.fill("#steps", str(steps))


def make(page: Page, photo: Path, **settings: int) -> str:
    """Send the form; the id of the job."""
    before = page.url
    fill(page, photo, **settings)
    page.click("#submit")
    wait_while(page, lambda: page.url == before)
    return page.url.partition("#")[2]


def drop(page: Page, path: Path, kind: str, event: str = "drop") -> None:
    """Drop a file on the page, or paste it."""
    page.evaluate(
        """([bytes, name, type, event]) => {
          const files = new DataTransfer();
          files.items.add(new File([new Uint8Array(bytes)], name, { type }));
          const settings = { dataTransfer: files, clipboardData: files, bubbles: true };
          const made = event === "drop" ? new DragEvent(event, settings) : new ClipboardEvent(event, settings);
          document.body.dispatchEvent(made);
        }""",
        [list(path.read_bytes()), path.name, kind, event],
    )


def wait_while(page: Page, is_so: Callable[[], bool]) -> None:
    for _ in range(WAIT_MILLISECONDS // 50):
        if not is_so():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it stays so")


def assert_usable(page: Page) -> None:
    """No rule of WCAG 2.2 AA that a program can check is broken, in either theme."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page, options={"runOnly": RULES}).response
        assert len(found["passes"]) > 15
        assert not [(rule["id"], rule["nodes"]) for rule in found["violations"]]


@pytest.mark.slow
def test_a_photo_becomes_a_video_that_plays_while_it_is_made(live, open_page, photo_file, tmp_path):
    page = open_page(live.url, accept_downloads=True)
    assert_usable(page)
    fill(page, photo_file, steps=SLOW)
    page.fill("#later", LATER)
    expect(page.locator("#estimate strong")).to_contain_text("33 frames")
    expect(page.locator("#estimate")).to_contain_text("of memory")
    page.click("#submit")
    player = page.locator("#video")
    expect(player).to_be_visible()
    assert player.evaluate("video => video.src").startswith("blob:")
    assert player.evaluate("video => video.buffered.end(0) < 33 / 16")
    expect(page.locator("#strip img").first).to_be_attached()
    expect(page.locator("#queue-list li")).to_have_count(1)
    assert_usable(page)

    expect(page.locator("#state")).to_have_text("Finished")
    expect(player).to_have_attribute("src", re.compile("/content$"))
    wait_while(page, lambda: player.evaluate("video => video.duration") != 33 / 16)
    expect(page.locator("#strip img")).to_have_count(3)
    expect(page.locator("#gallery-list img")).to_be_visible()
    expect(page.locator("#queue")).to_be_hidden()
    with page.expect_download() as download:
        page.click("#download")
    made = tmp_path / "made.mp4"
    download.value.save_as(made)
    settings = read_settings(made)
    assert (settings.seed, settings.config.later_prompts) == (7, ((17, "zoom in"),))

    other = open_page(live.url)
    drop(other, made, "video/mp4")
    expect(other.locator("#seed")).to_have_value("7")
    expect(other.locator("#problem")).to_contain_text("photo")
    for name, value in {
        "prompt": "pan left",
        "width": "96",
        "seconds": "2",
        "steps": SLOW,
        "later": LATER,
    }.items():
        expect(other.locator(f"#{name}")).to_have_value(str(value))
    other.set_input_files("#photo", photo_file)
    other.set_input_files("#motion", made)
    expect(other.locator("#estimate")).to_contain_text("33 frames")


@pytest.mark.slow
def test_what_is_wrong_is_said_in_the_servers_words(live, open_page, photo_file, tmp_path):
    page = open_page(live.url)
    page.click("#submit")
    expect(page.locator("#problem")).to_have_text("Choose a photo first.")
    fill(page, photo_file)
    page.fill("#height", "7")
    expect(page.locator("#problem")).to_contain_text("must be a multiple of 32")
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    page.fill("#height", "64")
    expect(page.locator("#problem")).to_be_hidden()
    with page.expect_response(lambda got: got.status == 400) as refused:
        page.set_input_files("#photo", text)
    expect(page.locator("#problem")).to_have_text(refused.value.json()["error"]["message"])
    mistakes = (("#seconds", "1e", "not a number"), ("#later", "zoom in", "17: zoom in"))
    for field, typed, words in mistakes:
        page.focus(field)
        page.keyboard.type(typed)
        page.click("#submit")
        expect(page.locator("#problem")).to_contain_text(words)
        expect(page.locator("#estimate")).to_contain_text(words)
        expect(page.locator(field)).to_have_attribute("aria-invalid", "true")
        page.fill(field, "")
    page.set_input_files("#reuse-file", text)
    expect(page.locator("#problem")).to_contain_text("notes.png carries no settings")


@pytest.mark.slow
def test_two_tabs_show_the_same_and_a_reload_goes_on(live, open_page, photo_file):
    first, second = open_page(live.url), open_page(live.url)
    running = make(first, photo_file, steps=SLOW)
    waiting = make(second, photo_file, steps=SLOW, seed=8)
    expect(first.locator("#queue-list li")).to_have_count(2)
    expect(second.locator("#state")).to_have_text("Next in the queue")
    first.locator("#queue-list li").nth(1).get_by_text("Cancel").click()
    expect(second.locator("#state")).to_have_text("Cancelled")
    expect(second.locator("#empty")).to_have_text("Nothing of it was finished.")
    assert live.get(waiting)["status"] == "cancelled"

    expect(first.locator("#state")).to_have_text(BEING_MADE)
    first.reload()
    expect(first.locator("#state")).to_have_text(re.compile("segment|Finished"))
    expect(first.locator("#video")).to_be_visible()
    expect(first.locator("#state")).to_have_text("Finished")
    expect(first.locator("#video")).to_have_attribute("src", f"/v1/videos/{running}/content")

    first.on("dialog", lambda dialog: dialog.accept())
    first.click("#delete")
    expect(first.locator("#empty")).to_have_text("This video is gone.")
    assert live.client.get(f"/v1/videos/{running}").status_code == 404


@pytest.mark.slow
def test_a_restart_of_the_server_is_waited_for_and_the_video_goes_on(
    open_page, photo_file, tmp_path
):
    with serve(NANO, tmp_path) as server:
        port = int(server.url.rpartition(":")[2])
        page = open_page(server.url)
        id = make(page, photo_file, steps=SLOW)
        expect(page.locator("#state")).to_have_text(BEING_MADE)
    expect(page.locator("#server")).to_have_text("The server does not answer. Trying again.")
    with serve(NANO, tmp_path, port=port) as server:
        expect(page.locator("#server")).to_have_text("")
        expect(page.locator("#state")).to_have_text("Finished")
        expect(page.locator("#video")).to_have_attribute("src", f"/v1/videos/{id}/content")
        assert wait(lambda: server.get(id)["status"], lambda status: status == "completed")
        page.close()


@pytest.mark.slow
def test_a_phone_shows_all_of_it_and_what_a_cancelled_video_has(live, open_page, photo_file):
    page = open_page(live.url, script=IPHONE, viewport=PHONE, has_touch=True, is_mobile=True)
    id = make(page, photo_file, steps=SLOW)
    player = page.locator("#video")
    expect(player).to_be_visible()
    assert player.evaluate("video => video.src.startsWith('blob:') && video.disableRemotePlayback")
    assert page.locator("#queue-list .title").evaluate("title => title.clientWidth") > 60
    page.click("#cancel")
    expect(page.locator("#state")).to_have_text("Cancelled")
    expect(page.locator("#download")).to_have_text("Download what is finished")
    expect(player).to_have_attribute("src", f"/v1/videos/{id}/content")
    wait_while(page, lambda: player.evaluate("video => video.readyState") < 2)

    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    small = page.evaluate(
        "[...document.querySelectorAll('button, a.button, input, select, summary')]"
        ".filter(each => each.checkVisibility() && !each.matches('.hidden-input'))"
        ".filter(each => each.getBoundingClientRect().height < 24).map(each => each.outerHTML)"
    )
    assert not small
    assert_usable(page)


@pytest.mark.slow
def test_a_server_with_keys_asks_for_one(open_page, photo_file, tmp_path):
    key = Keys(DataDir(tmp_path).keys).add("someone")
    with serve(NANO, tmp_path) as server:
        page = open_page(server.url, is_ready=False)
        page.fill("#key", "wrong")
        page.click("text=Go on")
        expect(page.locator("#key-problem")).to_contain_text("send a valid API key")
        page.fill("#key", key)
        page.click("text=Go on")
        page.wait_for_selector("#suggestions button")
        make(page, photo_file)
        expect(page.locator("#state")).to_have_text("Finished")
        expect(page.locator("#video")).to_have_attribute("src", re.compile("^blob:"))
        expect(page.locator("#gallery-list img")).to_be_visible()
        page.close()


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(live, open_page, photo_file):
    page = open_page(live.url)
    for place in ("skip", "hidden-input", "hidden-input"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == place
    assert page.evaluate("document.activeElement.id") == "photo"
    drop(page, photo_file, "image/png", "paste")
    page.focus("#prompt")
    page.keyboard.type("zoom in")
    expect(page.locator("[aria-pressed=true]")).to_have_text("zoom in")
    page.fill("#width", "96")
    page.fill("#height", "64")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#shown-prompt")).to_have_text("zoom in")
