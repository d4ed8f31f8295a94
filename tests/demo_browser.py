"""The demo in a process of its own, and a headless Chromium that uses it as a visitor would.

    python -m tests.demo_browser results/demo.png

writes the picture of README.md: a chart and a mosaic, asked about, with the overlay of the latter.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600  # for the start, on a busy machine
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def missing() -> str:
    """What the browser tests lack and how to get it, for the reason of a skip; empty if nothing."""
    modules = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    told = [f"{' and '.join(modules)} (run `make test-demo`)"] if modules else []
    return ", ".join(told + ([] if chromium() else ["chromium (`apt-get install chromium`)"]))


def chromium() -> str | None:
    """Path of the browser."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def running_demo(folder: Path, *arguments: str) -> Iterator[str]:
    """Start the demo on a free port and give its address; end it with the block.

    Args:
        folder: For its uploads and its log.
        arguments: Of the command.
    """
    log = folder / "demo.log"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
    }
    command = [sys.executable, "-m", "adaptive_llava.hub_cards.space.app", "--port", "0", *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    try:
        deadline = time.monotonic() + SECONDS
        while "http://127.0.0.1:" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The demo did not start: {log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield "http://127.0.0.1:" + log.read_text().split("http://127.0.0.1:")[1].split()[0].strip("/")
    finally:
        process.kill()
        process.wait()


@contextmanager
def visitor(address: str, folder: Path) -> Iterator[Any]:
    """A playwright page of the demo, in a fresh browser that reaches this machine alone.

    Args:
        address: Of the demo.
        folder: For the browser's own data.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        profile = tempfile.mkdtemp(dir=folder)
        browser = player.chromium.launch_persistent_context(
            profile, executable_path=chromium(), args=list(_FLAGS), viewport={"width": 1280, "height": 880}
        )
        page = browser.pages[0] if browser.pages else browser.new_page()
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(address) else route.abort())
        page.set_default_timeout(SECONDS * 1000 / 2)
        page.goto(address)
        page.locator("#question textarea").wait_for()
        yield page
        browser.close()


def send(page: Any, text: str, paths: Sequence[Path] = ()) -> None:
    """Upload images, write a question and send it."""
    if paths:
        with page.expect_file_chooser() as chooser:
            page.locator("#question button.upload-button").click()
        chooser.value.set_files([str(path) for path in paths])
        page.locator("#question .thumbnails").wait_for()
    page.locator("#question textarea").fill(text)
    page.locator("#question button.submit-button").click()


def asked(page: Any, text: str, paths: Sequence[Path] = ()) -> dict[str, list[str]]:
    """The table of comparison after a question, by row: chosen, all tokens, ratio."""
    send(page, text, paths)
    # the question is cleared by the answer, together with everything else that it changes
    page.wait_for_function("() => document.querySelector('#question textarea').value === ''")
    page.wait_for_function(
        "() => [...document.querySelectorAll('#overlay img')].every(shown => shown.complete && shown.naturalWidth > 0)"
    )
    rows = page.locator("#comparison tbody tr")
    return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows.all()}


def save_picture(family: str, path: Path, seed: int = 11) -> tuple[Path, dict[str, str]]:
    """A test picture of the study as a PNG, and the answers to its questions."""
    from adaptive_llava.training.study.families import render  # takes seconds, which a waiting browser need not

    picture = render(1, seed=seed, test=True, families=[family])[0]
    picture.image.save(path)
    return path, dict(picture.questions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the screenshot of README.md: a chart and a mosaic, and what the latter was compressed into."""
    (output,) = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = {"chart": "which height at bar2", "mosaic": "which colour at square-1-1"}
        with running_demo(folder) as address, visitor(address, folder) as page:
            for family, question in questions.items():
                asked(page, question, [save_picture(family, folder / f"{family}.png")[0]])
            page.wait_for_timeout(1000)  # for the chat to scroll
            page.screenshot(path=folder / "page.png")
        with Image.open(folder / "page.png") as shot:
            shot.convert("RGB").quantize(128).save(output, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
