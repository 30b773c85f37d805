"""Clips, end to end: a system with a model of each kind, OpenAI's client, and the page in a real browser."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import openai
import pytest
from PIL import Image

from server.worker.mp4 import boxes
from server.worker.packing import read_provenance
from tests.e2e.system import TIMEOUT_S, System, poll, running
from tests.e2e.test_examples import EXAMPLES, pixels_of, run
from tests.e2e.test_page import Page, needs_browser, open_page
from tests.shared import clips_bundle

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

# What a player that can show the clip knows of it; `readyState` 2: there is a frame to show.
VIDEO = """
const video = document.querySelector("#pictures video");
return video && video.readyState >= 2 && {
  width: video.videoWidth, height: video.videoHeight, duration: video.duration, controls: video.controls,
  error: video.error && video.error.message,
};
"""
# True once the frame on show is not all alike: drawn, not a placeholder.
HAS_PIXELS = """
const video = document.querySelector("#pictures video");
const canvas = document.createElement("canvas");
canvas.width = canvas.height = 32;
const context = canvas.getContext("2d");
context.drawImage(video, 0, 0);
return new Set(new Uint32Array(context.getImageData(0, 0, 32, 32).data.buffer)).size > 16;
"""


@pytest.fixture(scope="module")
def system(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system that serves the tiny image model and the shipped one for clips, each by a worker."""
    bundles = f"{bundle},{clips_bundle(tmp_path_factory)}"
    with running(System(tmp_path_factory.mktemp("videos"), bundles, workers=2)) as system:
        yield system


@pytest.fixture
def client(system: System) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key="none", timeout=TIMEOUT_S) as client:
        yield client


@pytest.fixture
def page(system: System, tmp_path: Path) -> Iterator[Page]:
    with open_page(system.url, tmp_path) as page:
        yield page


def test_openais_client_gets_a_clip_that_players_understand(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(
        prompt="a red cube moving left",
        model="clips",
        seconds="1",  # type: ignore[arg-type] # it sends any string
        size="32x32",  # type: ignore[arg-type]
        extra_body={"seed": 7, "steps": 2},
    )

    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "1", "32x32")
    assert client.videos.retrieve(video.id) == video
    assert video.id in [one.id for one in client.videos.list()]
    content = client.videos.download_content(video.id).read()
    with av.open(io.BytesIO(content), "r") as file:
        (stream,) = file.streams.video
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, codec.width, codec.height) == ("h264", "yuv420p", 32, 32)
        assert (stream.average_rate, stream.frames, len(list(file.decode(video=0)))) == (Fraction(8), 9, 9)
    order = [kind for kind, _ in boxes(content)]
    assert order.index(b"moov") < order.index(b"mdat")
    provenance = read_provenance(content)
    assert provenance is not None
    assert (provenance.model, provenance.seed, provenance.num_steps) == ("clips", 7, 2)

    thumbnail, sheet = [
        Image.open(io.BytesIO(client.videos.download_content(video.id, variant=variant).read()))
        for variant in ("thumbnail", "spritesheet")
    ]
    assert (thumbnail.format, thumbnail.size) == ("WEBP", (32, 32))
    assert (sheet.format, sheet.size) == ("JPEG", (96, 96))
    remix = client.videos.remix(video.id, prompt="a blue cube moving right")
    assert client.videos.poll(remix.id).status == "completed"
    assert client.videos.retrieve(remix.id).remixed_from_video_id == video.id

    assert client.videos.delete(video.id).deleted
    assert video.id not in [one.id for one in client.videos.list()]
    with pytest.raises(openai.APIStatusError) as gone:
        client.videos.download_content(video.id)
    assert (gone.value.status_code, gone.value.code) == (410, "result_expired")


def test_readme_says_how_to_get_a_clip(
    client: openai.OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n([^`]*client\.videos[^`]*)^```$", readme, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)

    exec(example, {"client": client})  # noqa: S102 - our own lines

    with av.open("clip.mp4", "r") as file:
        assert len(list(file.decode(video=0))) == 9


def test_example_shows_the_progress_of_a_clip(system: System, tmp_path: Path) -> None:
    said = run(sys.executable, EXAMPLES / "client.py", system.url, cwd=tmp_path)

    assert re.search(r"^vid_\S+: (queued|in_progress), \d+ %$", said, flags=re.MULTILINE)
    assert said.splitlines()[-1] == "clip.mp4: 1 s of 32x32"
    with av.open(str(tmp_path / "clip.mp4"), "r") as file:
        assert len(list(file.decode(video=0))) == 9
    assert pixels_of(tmp_path / "picture.png")


def test_both_kinds_are_served_side_by_side(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"tiny", "clips"}
    with pytest.raises(openai.UnprocessableEntityError) as wrong:
        client.videos.create(prompt="a red cube", model="tiny")
    assert (wrong.value.code, wrong.value.param) == ("wrong_kind", "model")
    assert client.images.generate(prompt="a red cube", model="tiny").data


@needs_browser
def test_page_makes_a_clip_and_plays_it(page: Page) -> None:
    poll(lambda: page.find("#status").get_attribute("data-state") == "ready")
    page.choose("model", "clips")
    page.draw("a red cube moving left")
    page.wait_for_state("done")

    video = poll(lambda: page.browser.execute_script(VIDEO))
    assert video == {"width": 32, "height": 32, "duration": 9 / 8, "controls": True, "error": None}
    assert poll(lambda: page.browser.execute_script(HAS_PIXELS))
    assert page.find("#used-model").text == "clips"
    assert page.find("#used-seed").text.isdigit()
    assert str(page.find("#download").get_attribute("download")).endswith(".mp4")
    assert not page.find("#count").is_displayed()
    assert page.find("#length").text.split() == ["Seconds", "1"]

    page.choose("model", "tiny")
    page.draw("a red cube")
    poll(lambda: page.find("#used-model").text == "tiny" and page.state() == "done")
    assert page.find("#count").is_displayed()
    assert len(page.browser.find_elements("css selector", "#history video")) == 1
    assert page.problems() == []
