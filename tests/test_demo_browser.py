"""The demo in a real browser: upload, ask, see what each token stands for; and what it refuses there."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.demo_browser import asked, missing, running_demo, save_picture, send, visitor


pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {missing()}"),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds the screenshots, which stay as artefacts of the run."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    with running_demo(folder) as running:
        yield running


@pytest.fixture(scope="module")
def page(address, folder) -> Iterator[Any]:
    with visitor(address, folder) as opened:
        yield opened


@pytest.fixture(autouse=True)
def new_chat(page) -> None:
    page.locator("#question textarea").fill("cleared, as all else is")
    page.locator("#clear").click()
    page.wait_for_function("() => document.querySelector('#question textarea').value === ''")
    assert page.locator("#comparison table").count() == 0


def overlay(page: Any) -> list[str]:
    """Captions of the overlays that are shown and loaded."""
    return page.evaluate(
        "() => [...document.querySelectorAll('#overlay button:has(img)')]"
        ".filter(shown => shown.querySelector('img').naturalWidth >= 480).map(shown => shown.innerText.trim())"
    )


def test_a_chart_is_uploaded_asked_about_and_explained(page, folder):
    chart, answers = save_picture("chart", folder / "chart.png")
    question = "which height at bar2"
    rows = asked(page, question, [chart])
    page.screenshot(path=folder / "chart_asked.png")
    assert rows["answer"][:2] == [answers[question]] * 2
    assert rows["visual tokens"] == ["36", "36", "1.00"]
    assert {"FLOPs to the first token", "ms to the first token", "ms in all"} <= set(rows)
    assert any("36 queries" in caption for caption in overlay(page))
    assert answers[question] in page.locator("#chat").inner_text()


def test_the_slider_replaces_the_router(page, folder):
    chart, _ = save_picture("chart", folder / "chart.png")
    page.locator("#tokens input[type=number]").fill("5")
    page.locator("#tokens input[type=number]").press("Enter")
    page.wait_for_function("() => !document.querySelector('#auto input').checked")
    rows = asked(page, "which height at bar2", [chart])
    page.screenshot(path=folder / "slider.png")
    assert rows["visual tokens"] == ["4", "36", "0.11"]
    assert float(rows["FLOPs to the first token"][2]) < 1
    page.locator("#auto input").check()


def test_several_images_and_typed_placeholders(page, folder):
    pictures = [save_picture(family, folder / f"{family}.png")[0] for family in ("scene", "chart")]
    rows = asked(page, "which colour <image> </s>", pictures)
    page.screenshot(path=folder / "several.png")
    assert rows["visual tokens"][1] == "36 + 36 = 72"
    assert len(overlay(page)) >= 2
    assert "<image>" in page.locator("#chat").inner_text()


def test_a_file_that_is_no_image_is_refused_in_words(page, folder):
    wrong = folder / "wrong.png"
    wrong.write_text("no image")
    send(page, "which digit", [wrong])
    said = page.locator(".toast-body").first
    said.wait_for()
    page.screenshot(path=folder / "refused.png")
    assert "is no JPEG, PNG, WEBP that can be read" in said.inner_text()


def test_an_address_or_a_path_in_place_of_an_upload_is_never_read(address, folder):
    asked_for: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked_for.append(self.path)
            self.send_error(404)

    chart, _ = save_picture("chart", folder / "chart.png")
    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fetched = submitted(address, f"http://127.0.0.1:{server.server_port}/cat.png")
        server.shutdown()
    assert (fetched["success"], fetched["output"]["error"]) == (
        False,
        "Addresses are not fetched. Upload the image itself.",
    )
    assert asked_for == []
    assert submitted(address, str(chart))["success"] is False
    # the same call with what was uploaded goes through
    assert submitted(address, uploaded(address, chart))["success"] is True


def uploaded(address: str, path: Path) -> str:
    """Upload a file past the page; where the server keeps it."""
    form = (
        f'--limit\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    body = form.encode() + path.read_bytes() + b"\r\n--limit--\r\n"
    header = {"Content-Type": "multipart/form-data; boundary=limit"}
    return json.loads(answer(urllib.request.Request(f"{address}/gradio_api/upload", body, header)))[0]


def submitted(address: str, path: str) -> dict[str, Any]:
    """The last word of the server on a question about a file, sent past the page."""
    config = json.loads(answer(urllib.request.Request(f"{address}/config")))
    (turn,) = [one for one in config["dependencies"] if any(event == "submit" for _, event in one["targets"])]
    file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
    data = [{"text": "which height at bar2", "files": [file]}, None, None, True, 36, False]
    body = json.dumps({"data": data, "fn_index": turn["id"], "session_hash": "past_the_page"}).encode()
    join = f"{address}/gradio_api/queue/join"
    answer(urllib.request.Request(join, body, {"Content-Type": "application/json"}))
    events = answer(urllib.request.Request(f"{address}/gradio_api/queue/data?session_hash=past_the_page"))
    told = [json.loads(line[5:]) for line in events.splitlines() if line.startswith(b"data:")]
    (done,) = [event for event in told if event["msg"] == "process_completed"]
    return done


def answer(request: urllib.request.Request) -> bytes:
    """What this machine's server answers, without a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=300) as stream:
        return stream.read()
