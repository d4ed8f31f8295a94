"""No stranger is trusted by default: no code, pickle, address or path is taken on the word of a file or a chat."""

from __future__ import annotations

import ast
import io
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive_llava.chat_requests import read_messages
from adaptive_llava.hub_cards.space.upload_check import read_uploads
from adaptive_llava.image_bytes import MAX_BYTES, MAX_PIXELS, read_image_bytes
from adaptive_llava.training.conversation_data import load_conversations, read_example
from tests.test_chat_requests import data_url, picture, user
from tests.test_hostile_images import FILES, png
from tests.test_image_bytes import noise
from tests.test_processing_adaptive_llava import build


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("adaptive_llava", "modeling", "processing", "training", "hub_cards")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def calls(path: Path) -> list[tuple[int, str, str, dict[str, ast.expr]]]:
    """Line, module or object, name and keyword arguments of every call in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
            found.append((node.lineno, owner, name, {word.arg: word.value for word in node.keywords if word.arg}))
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_call_here_runs_what_it_reads():
    found = []
    for path in SOURCES:
        for line, owner, name, words in calls(path):
            constant = {word: getattr(value, "value", None) for word, value in words.items()}
            bad = (
                (name in ("eval", "exec", "__import__") and not owner)
                or (owner in ("os",) and name in ("system", "popen"))
                or (
                    owner in ("pickle", "dill", "joblib", "marshal", "cloudpickle", "shelve")
                    and name != "UnpicklingError"
                )
                or (owner == "torch" and name == "load" and constant.get("weights_only") is not True)
                or (owner == "yaml" and name in ("load", "unsafe_load", "full_load"))
                or constant.get("allow_pickle") is True
                or constant.get("shell") is True
            )
            if bad:
                found.append(f"{name_of(path)}:{line} {owner}.{name}")
    assert len(SOURCES) > 100 and not found


def test_trust_remote_code_is_the_users_to_set():
    said = set()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        said |= {ast.unparse(value) for value in trust_of(ast.parse(text))}
        for match in re.finditer(r'"--trust-remote-code"(.*)', text):
            assert "store_true" in text[match.start() : match.start() + 200], name_of(path)
    # nothing, an option of a command line that is off unless it is given, and what that option is handed on as
    assert said == {"False", "options.trust_remote_code", "trust_remote_code", "job['trust_remote_code']"}
    recipes = [*ROOT.glob("training/recipes/**/*.yaml"), *ROOT.glob("hub_cards/**/*.txt")]
    assert recipes and not [path for path in recipes if "trust_remote_code" in path.read_text(encoding="utf-8")]


def trust_of(tree: ast.AST) -> list[ast.expr]:
    """What `trust_remote_code` is given: by keyword, as a dictionary's entry, as a default."""
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [word.value for word in node.keywords if word.arg == "trust_remote_code"]
        elif isinstance(node, ast.Dict):
            keys = [getattr(key, "value", None) for key in node.keys]
            found += [value for key, value in zip(keys, node.values, strict=True) if key == "trust_remote_code"]
        elif isinstance(node, ast.arguments):
            named = [*node.posonlyargs, *node.args][len(node.posonlyargs) + len(node.args) - len(node.defaults) :]
            pairs = [*zip(named, node.defaults, strict=True), *zip(node.kwonlyargs, node.kw_defaults, strict=True)]
            found += [value for name, value in pairs if name.arg == "trust_remote_code" and value is not None]
    return found


def test_urls_are_fetched_in_one_place_and_only_on_request():
    fetching = {
        name_of(path)
        for path in SOURCES
        for _, owner, name, _ in calls(path)
        if name in ("urlopen", "urlretrieve") or owner in ("requests", "httpx", "urllib3", "aiohttp")
    }
    assert fetching == {"processing/image_loading.py"}
    asking = {
        name_of(path)
        for path in SOURCES
        for _, _, _, words in calls(path)
        if "allow_urls" in words and ast.unparse(words["allow_urls"]) == "True"
    }
    assert not asking


@pytest.fixture(scope="module")
def processor():
    return build()


@pytest.fixture
def no_files_no_addresses(monkeypatch):
    """Makes every opened file and every connection an error."""

    def opened(*arguments, **_):
        raise AssertionError(f"something was opened: {arguments[:1]}")

    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(socket, "create_connection", opened)
    monkeypatch.setattr(socket.socket, "connect", opened)
    monkeypatch.setattr("urllib.request.urlopen", opened)


LURES = [
    "http://127.0.0.1:9/a.png",
    "https://example.org/a.png",
    "file:///etc/passwd",
    "/etc/passwd",
    __file__,
    "~/x.png",
]
LURES += [
    "ftp://127.0.0.1/a",
    "data:image/png,raw",
    "data:;base64,L2V0Yy9wYXNzd2Q=",
    "\\\\host\\share",
    "a/../../b.png",
]


@pytest.mark.parametrize("lure", LURES)
def test_no_address_and_no_path_of_a_request_is_opened(lure, no_files_no_addresses):
    for part in (
        picture(lure),
        {"type": "image_url", "image_url": lure},
        {"type": "image", "path": lure},
        {"type": "image", "image": lure},
        {"type": "image", "url": lure},
        {"type": "video", "path": lure},
        {"type": "input_audio", "input_audio": {"data": lure}},
    ):
        with pytest.raises(
            ValueError, match="(is no data URL|has a part of type|is no JPEG, PNG, WEBP|no valid base64)"
        ):
            read_messages(user(part))
    with pytest.raises(TypeError, match="no path or address is read"):
        read_uploads([lure])


@pytest.mark.parametrize("lure", LURES)
def test_text_that_names_a_file_stays_text(lure, processor, no_files_no_addresses):
    written = f"<image>{lure} <img src='{lure}'> ![]({lure}) {{% include '{lure}' %}} {{{{ open('{lure}') }}}}"
    chat = read_messages(user({"type": "text", "text": written}))
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    plain = prompt.replace("\ufdd0", "")
    assert written in plain and "<image>" not in prompt


def test_a_row_of_training_data_follows_no_address(processor, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"images": ["http://127.0.0.1:9/a.png"], "messages": [{"role": "user", "content": "<image>what"}]}\n'
    )
    row = read_example(load_conversations(tmp_path / "rows.jsonl")[0])
    with pytest.raises(ValueError, match="is a URL, and URLs are not fetched unless you ask for it"):
        processor(images=row["images"], text="<image>what")


STRANGERS_DOORS = {
    "serve": lambda content: read_messages(user(picture(data_url(content)))),
    "demo": lambda content: read_uploads([content]),
    "the check itself": read_image_bytes,
}


@pytest.mark.parametrize("door", STRANGERS_DOORS)
def test_bytes_are_checked_before_a_pixel_is_decoded(door, monkeypatch):
    refused = {
        png(6000, 6000): f"at most {MAX_PIXELS:,}",
        png(20_000, 1): "no side above 10,000",
        FILES["bomb.png"][0](): "is too large",
        FILES["animated.gif"][0](): "is no JPEG, PNG, WEBP",
        FILES["svg named.png"][0](): "is no JPEG, PNG, WEBP",
        bytes(MAX_BYTES + 1): f"at most {MAX_BYTES:,}",
    }
    for place in ("PIL.Image.Image.load", "PIL.ImageFile.ImageFile.load", "adaptive_llava.image_bytes.load_image"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("a pixel was decoded"))
    for content, said in refused.items():
        with pytest.raises(ValueError, match=said):
            STRANGERS_DOORS[door](content)


def test_the_command_line_reads_no_image_beyond_the_limit_of_its_header(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bomb.png").write_bytes(FILES["bomb.png"][0]())
    noise().save(tmp_path / "images" / "good.png")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30));"
        "from adaptive_llava.training.image_source import open_images;"
        "[image for _, image in open_images(sys.argv[1])]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "images")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert re.search(r"ValueError: Image 0 \(.*bomb.png\) is too large: .* scale it down first", done.stderr)
