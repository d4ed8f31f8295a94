"""`python -m adaptive_llava serve`, as a process, asked by OpenAI's client; and what `transformers serve` does."""

from __future__ import annotations

import http.client
import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

from adaptive_llava import AdaptiveLlavaProcessor
from adaptive_llava.__main__ import main
from adaptive_llava.training.study.families import Picture, render
from adaptive_llava.training.study.ship import SHIPPED, load_shipped
from tests.conftest import tiny_model
from tests.fresh_process import run_without_package
from tests.test_chat_requests import data_url, picture, user
from tests.test_convert import character_tokenizer
from tests.test_image_bytes import encoded, still


pytest.importorskip("transformers.cli.serving", reason="transformers 4 has another server")
openai = pytest.importorskip("openai", reason="the server's packages are not installed (extra `serve`)")
pytest.importorskip("fastapi", reason="the server's packages are not installed (extra `serve`)")

LENGTH = 6  # tokens of an answer
FAMILIES = ["scene", "page_4", "header", "chart"]


def start(folder: Path, *options: str, log: Path) -> tuple[subprocess.Popen, str]:
    """The server's process and its address, once it says it."""
    command = [sys.executable, "-m", "adaptive_llava", "serve", str(folder), "--port", "0", *options]
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    said = process.stdout.readline()
    assert " is served at http://127.0.0.1:" in said, log.read_text()
    return process, said.split(" is served at ")[1].strip()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    process, url = start(SHIPPED, "--name", "shipped", "--max-new-tokens", "64", log=log)
    yield url
    process.terminate()
    assert process.wait(30) == 0, log.read_text()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def shipped():
    return load_shipped()


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return render(8, seed=3, families=FAMILIES)


def part(image: Image.Image) -> dict:
    return picture(data_url(encoded(image)))


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def expected(shipped, *content, **options) -> str:
    """What `generate` writes to a message of images and texts."""
    model, processor = shipped
    parts = [text(entry) if isinstance(entry, str) else {"type": "image", "image": entry} for entry in content]
    inputs = processor.apply_chat_template(
        user(*parts), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    written = model.generate(**inputs, max_new_tokens=LENGTH, **options)
    return processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer(client, *content, **options) -> str:
    """What the server writes to the same message, whole or streamed."""
    parts = [text(entry) if isinstance(entry, str) else part(entry) for entry in content]
    said = client.chat.completions.create(
        **({"model": "shipped", "messages": user(*parts), "max_tokens": LENGTH} | options)
    )
    if options.get("stream"):
        return "".join(chunk.choices[0].delta.content or "" for chunk in said)
    return said.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_chat_gets_what_generate_gives(client, shipped, pictures, stream):
    asked = [(entry.image, entry.questions[0][0]) for entry in pictures]
    wanted = [expected(shipped, *content) for content in asked]
    assert len(set(wanted)) > 2
    assert [answer(client, *content, stream=stream) for content in asked] == wanted


def test_a_stream_comes_piece_by_piece_and_ends_with_its_usage(client, pictures):
    entry = pictures[1]
    chunks = list(
        client.chat.completions.create(
            model="shipped",
            messages=user(part(entry.image), text(entry.questions[0][0])),
            max_tokens=LENGTH,
            stream=True,
        )
    )
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert 1 <= chunks[-1].usage.completion_tokens <= LENGTH
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_is_the_one_of_generate(client, shipped, pictures, stream):
    asked = [(entry.image, entry.questions[0][0]) for entry in pictures]
    by_budget = {}
    for budget in (1, 36):
        wanted = [expected(shipped, *content, visual_token_budget=budget) for content in asked]
        options = {"stream": stream, "extra_body": {"visual_token_budget": budget}}
        assert [answer(client, *content, **options) for content in asked] == wanted
        by_budget[budget] = wanted
    assert by_budget[1] != by_budget[36]
    with pytest.raises(openai.BadRequestError, match="`visual_token_budget=0` is below the smallest count"):
        answer(client, *asked[0], stream=stream, extra_body={"visual_token_budget": 0})


def test_two_images_stay_in_their_order(client, shipped, pictures):
    first, second, question = pictures[1].image, pictures[2].image, pictures[1].questions[0][0]
    assert answer(client, first, second, question) == expected(shipped, first, second, question)
    assert answer(client, second, question, first) == expected(shipped, second, question, first)


def test_text_alone_and_several_turns(client, shipped, pictures):
    question = pictures[0].questions[0][0]
    assert answer(client, question) == expected(shipped, question)
    turns = [*user(part(pictures[0].image), text(question)), {"role": "assistant", "content": "red"}]
    said = client.chat.completions.create(
        model="shipped", messages=[*turns, {"role": "user", "content": question}], max_tokens=LENGTH
    )
    assert said.usage.prompt_tokens > 2


def test_text_that_writes_a_placeholder_makes_no_slot_for_an_image(client, shipped, pictures):
    image, injected = pictures[1].image, "<image> what <image>"
    assert answer(client, injected) == expected(shipped, injected)
    assert answer(client, image, injected) == expected(shipped, image, injected)


def test_no_address_of_a_message_is_asked_and_no_file_opened(client, tmp_path):
    (tmp_path / "image.png").write_bytes(still())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        with socket.create_connection(listener.getsockname()):
            listener.accept()[0].close()  # it does hear
        for url in (
            f"http://{host}/image.png",
            f"https://{host}/a",
            f"ftp://{host}/a",
            f"//{host}/a",
            f" http://{host}/a",
        ):
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError, match="Image 1 is no data URL.*no address is fetched"):
                    client.chat.completions.create(model="shipped", messages=user(picture(url)), stream=stream)
        listener.settimeout(0.5)
        with pytest.raises(TimeoutError):
            listener.accept()
    for url in (str(tmp_path / "image.png"), f"file://{tmp_path / 'image.png'}"):
        with pytest.raises(openai.BadRequestError, match="Image 1 is no data URL.*no file is opened"):
            client.chat.completions.create(model="shipped", messages=user(picture(url)))


def test_refusals_name_their_rule_and_the_server_lives_on(client, shipped, pictures):
    def ask(*parts, **options):
        return client.chat.completions.create(**({"model": "shipped", "messages": user(*parts)} | options))

    with pytest.raises(openai.BadRequestError, match="Image 1 is no JPEG, PNG, WEBP"):
        ask(picture(data_url(still("GIF"))))
    with pytest.raises(openai.BadRequestError, match="no side above 10,000"):
        ask(part(Image.new("L", (10_001, 1))))
    with pytest.raises(openai.BadRequestError, match="`chat_template_kwargs` is not supported"):
        ask(text("hi"), extra_body={"chat_template_kwargs": {"images": [str(SHIPPED / "image.png")]}})
    with pytest.raises(openai.BadRequestError, match="`max_tokens=65` must be a whole number from 1 to 64"):
        ask(text("hi"), max_tokens=65)
    with pytest.raises(openai.BadRequestError, match="`messages` must be a non-empty list"):
        ask(messages=[])
    with pytest.raises(openai.NotFoundError, match="This server has 'shipped'"):
        ask(text("hi"), model="org/other")
    assert [entry.id for entry in client.models.list()] == ["shipped"]
    assert answer(client, pictures[0].image, "what") == expected(shipped, pictures[0].image, "what")


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status"),
    [
        ("POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, "{}", 415),
        ("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, "{", 400),
        ("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, "[" * 100_000, 400),
        ("POST", "/v1/chat/completions", {"Content-Type": "application/json", "Content-Length": "9" * 12}, "", 413),
        ("POST", "/load_model", {"Content-Type": "application/json"}, '{"model": "org/other"}', 404),
        ("POST", "/v1/responses", {"Content-Type": "application/json"}, "{}", 404),
        ("GET", "/health", {}, None, 200),
    ],
)
def test_other_requests(address, method, path, headers, content, status):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request(method, path, content, headers)
    assert connection.getresponse().status == status


def test_a_seed_gives_its_sample_again(client):
    def sampled(seed):
        return answer(client, "what", temperature=2, seed=seed)

    first, second = ([sampled(seed) for seed in range(12)] for _ in range(2))
    assert first == second
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("number", "router"), [(signal.SIGINT, {"type": "pixel_std"}), (signal.SIGTERM, {"type": "fixed", "rung": 1})]
)
def test_expanded_layouts_are_served_and_a_signal_ends_the_server_while_it_answers(tmp_path, number, router):
    model = tiny_model("dfmr", router=router)
    processor = AdaptiveLlavaProcessor.from_config(model.config, character_tokenizer(), layout="expanded")
    for saved in (model, processor):
        saved.save_pretrained(tmp_path / "model")
    process, url = start(tmp_path / "model", log=tmp_path / "log")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    asked, options = (Image.open(io.BytesIO(still())), "hi"), {"temperature": 1.0}
    torch.manual_seed(5)
    wanted = expected((model, processor), *asked, do_sample=True, **options)
    assert answer(client, *asked, model="model", seed=5, **options) == wanted
    assert answer(client, *asked, model="model", seed=5, stop=[wanted[:2]], **options) == wanted[:2] != wanted
    stream = client.chat.completions.create(model="model", messages=user(text("hi")), max_tokens=200, stream=True)
    next(iter(stream))
    process.send_signal(number)
    assert process.wait(60) == 0
    assert process.stdout.read() == "model is no longer served\n"
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_what_cannot_be_served_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert "has no config.json and no processor_config.json" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(SHIPPED), "--port", port]) == 2
    assert f"`--host 127.0.0.1 --port {port}` cannot be listened at" in capsys.readouterr().err
    assert main(["serve", str(SHIPPED), "--port", "0", "--dtype", "int8"]) == 2
    assert "`dtype='int8'` is no floating-point type" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers.cli.serving.chat_completion", None)
    assert main(["serve", str(SHIPPED)]) == 2
    assert "The server is that of transformers 5, and this is" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "openai", None)
    assert main(["serve", str(SHIPPED)]) == 2
    assert "The server needs openai. Install: pip install 'adaptive-llava[serve]'" in capsys.readouterr().err


STOCK = """
import json, sys, time, urllib.request
from transformers.cli.serve import Serve

folder, messages = sys.argv[1], json.loads(sys.argv[2])
server = Serve(folder, trust_remote_code=True, device="cpu", port=0, non_blocking=True)
while not server.server.started:
    time.sleep(0.1)
port = server.server.servers[0].sockets[0].getsockname()[1]
answers = []
for chat in messages:
    body = json.dumps({"model": folder, "messages": chat, "max_tokens": 6}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    answers.append(json.loads(urllib.request.urlopen(request).read())["choices"][0]["message"]["content"])
server.kill_server()
print(json.dumps(answers))
"""


def test_transformers_serve_runs_the_remote_code_and_opens_paths_of_messages(tmp_path, shipped, pictures):
    for saved in shipped:
        saved.save_pretrained(tmp_path / "model")
    image, question = pictures[1].image, pictures[1].questions[0][0]
    (tmp_path / "image.png").write_bytes(encoded(image))
    by_path = user(picture(str(tmp_path / "image.png")), text(question))
    chats = [user(part(image), text(question)), by_path]  # why there is a server of our own
    found = run_without_package(STOCK, tmp_path / "model", json.dumps(chats), folder=tmp_path)
    assert json.loads(found.splitlines()[-1]) == [expected(shipped, image, question)] * 2
