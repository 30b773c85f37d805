"""The page in a real browser: a prompt goes in, a picture comes out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.e2e.system import System, poll

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium is not installed (apt install chromium chromium-driver)"
)
pytestmark = needs_browser

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
)

# True once the picture is there and its pixels are not all alike: drawn, not a placeholder.
HAS_PIXELS = """
const image = document.querySelector("#pictures img:not(.halo)");
if (!image || !image.complete || image.naturalWidth !== 64) return false;
const canvas = document.createElement("canvas");
canvas.width = canvas.height = 64;
const context = canvas.getContext("2d");
context.drawImage(image, 0, 0);
return new Set(new Uint32Array(context.getImageData(0, 0, 64, 64).data.buffer)).size > 16;
"""


class Page:
    """The playground as a person sees it."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def find(self, css: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def state(self) -> str | None:
        return self.find("#stage").get_attribute("data-state")

    def draw(self, prompt: str) -> None:
        box = self.find("#prompt")
        box.clear()
        box.send_keys(prompt + Keys.ENTER)

    def choose(self, name: str, value: object) -> None:
        """Press one of the buttons of a group."""
        self.browser.execute_script(
            f"document.querySelector('input[name={name}][value=\"{value}\"]').click()"
        )

    def wait_for_state(self, state: str) -> None:
        poll(lambda: self.state() == state)

    def problems(self) -> list[str]:
        """What the browser complained about: failed loads, blocked resources, exceptions."""
        return [str(entry["message"]) for entry in self.browser.get_log("browser")]


@contextmanager
def open_page(url: str, profile: Path) -> Iterator[Page]:
    """The page at `url` in a browser of its own, whose profile lies in `profile`."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        browser.get(url)
        yield Page(browser)
    finally:
        browser.quit()


@pytest.fixture
def page(system: System, tmp_path: Path) -> Iterator[Page]:
    with open_page(system.url, tmp_path) as page:
        yield page


def test_prompt_becomes_a_picture_with_its_timing(page: Page) -> None:
    poll(lambda: page.find("#status").get_attribute("data-state") == "ready")
    page.draw("a large red sphere on the left")
    page.wait_for_state("done")

    assert poll(lambda: page.browser.execute_script(HAS_PIXELS))
    stages = [
        one.get_attribute("data-stage") for one in page.browser.find_elements(By.CSS_SELECTOR, "#bar span")
    ]
    assert {"denoise", "decode", "pack"} <= set(stages)  # one that took less than a millisecond is not shown
    assert page.find("#used-seed").text.isdigit()
    assert page.find("#elapsed").text
    assert page.find("#used-model").text == "tiny"
    assert page.problems() == []


def test_seed_and_steps_are_kept_and_several_pictures_fit(page: Page) -> None:
    poll(lambda: page.find("#status").get_attribute("data-state") == "ready")
    page.find("#seed").send_keys("123")
    for name, value in (("steps", 2), ("count", 4)):
        page.choose(name, value)
    page.draw("a blue cube")
    page.wait_for_state("done")

    assert (page.find("#used-seed").text, page.find("#used-steps").text) == ("123", "2")
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "#pictures .picture")) == 4


def test_what_the_model_does_not_hear_is_shown_beside_the_picture(page: Page) -> None:
    poll(lambda: page.find("#status").get_attribute("data-state") == "ready")
    page.draw("a red cube on a zebra")
    page.wait_for_state("done")
    assert page.find("#warnings").text == "the model does not know: zebra"
    page.draw("a red cube")
    poll(lambda: page.find("#caption").text == "a red cube")
    assert not page.find("#warnings").is_displayed()


def test_error_is_shown_in_words_with_its_code(page: Page) -> None:
    page.browser.execute_script("document.getElementById('prompt').value = 'x'.repeat(3000)")
    page.find("#draw").click()
    page.wait_for_state("error")

    assert "at most 2000" in page.find("#overlay-text").text
    assert "prompt_too_long" in page.find("#overlay-text").text


def test_page_works_without_a_mouse(page: Page) -> None:
    poll(lambda: page.find("#status").get_attribute("data-state") == "ready")
    for prompt in ("a red cube", "a blue cone"):
        page.draw(prompt)
        poll(lambda prompt=prompt: page.find("#caption").text == prompt and page.state() == "done")  # type: ignore[misc]
    page.find("#prompt").send_keys(Keys.ESCAPE)
    page.find("body").send_keys(Keys.ARROW_RIGHT)

    assert page.find("#caption").text == "a red cube"
