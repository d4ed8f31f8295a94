"""What users do with a Hub beside our own commands, by the clients they do it with, and what a killed one leaves."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptive_llava.hub_cards.card_lint import lint_card
from adaptive_llava.hub_cards.card_text import is_as_rendered
from adaptive_llava.hub_cards.stock_card import is_stock
from adaptive_llava.hub_cards.upload_plan import UNTRAINED_NOTE
from adaptive_llava.modeling.code_files import code_files
from tests.loopback_hub.adapters import save_adapter
from tests.loopback_hub.running import ROOT, RunningHub, fault
from tests.loopback_hub.traffic import CHECKPOINT, with_card_by_hand


pytestmark = pytest.mark.compat

METRICS = ROOT / "training" / "metrics"
BIG = 24 * 1024 * 1024  # bytes: clients go on from whole steps of 10 MiB


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def pushed(hub, client) -> str:
    done = client.command("push", CHECKPOINT, "ada/small")
    assert done.status == 0, done.err[-2000:]
    return "ada/small"


@pytest.fixture(scope="module")
def big(hub, client, tmp_path_factory) -> tuple[str, str]:
    """A repository with a file of several steps, and its sha256."""
    folder = tmp_path_factory.mktemp("big")
    (folder / "model.safetensors").write_bytes(os.urandom(BIG))
    done = client.code(
        f"from huggingface_hub import HfApi; HfApi().create_repo('ada/big'); "
        f"HfApi().upload_folder(repo_id='ada/big', folder_path={str(folder)!r})"
    )
    assert done.status == 0, done.err[-2000:]
    return "ada/big", sha256_of(folder / "model.safetensors")


PUSH_PARTS = f"""
from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
for kind in {{kinds}}:
    part = kind.from_pretrained({str(CHECKPOINT)!r})
    part.push_to_hub({{name!r}}, private=True)
"""
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize("first", ["model", "processor"])
def test_model_and_processor_push_themselves_as_one_commit_each_with_their_code(first, hub, client):
    name = f"ada/parts-{first}"
    kinds = ["AdaptiveLlavaForConditionalGeneration", "AdaptiveLlavaProcessor"]
    order = ", ".join(kinds if first == "model" else kinds[::-1])
    code = PUSH_PARTS.format(kinds=f"({order})", name=name)
    done = client.code(code)
    assert done.status == 0, done.err[-2000:]
    assert len(hub.commits(name)) == 2
    (of_the_model,) = [commit for commit in hub.commits(name) if "Generation" in commit["title"]]
    assert MODEL_FILES | {path.name for path in code_files()} < set(hub.files(name, of_the_model["id"]))
    card = hub.read(name, "README.md").decode()
    assert is_as_rendered(card) and f'repo, revision = "{name}", "main"' in card
    assert {line.split(":")[0] for line in lint_card(card)} == {
        "license", "base_model", "datasets", "language", "metrics", "model-index", "text"
    }  # fmt: skip
    verified = client.command("verify", name)
    assert verified.status == 0, verified.out
    again = client.code(code)
    assert again.status == 0 and not again.requests("PUT") and len(hub.commits(name)) == 2


PUSH_UNTRAINED = f"""
import sys
from adaptive_llava import AdaptiveLlavaForConditionalGeneration
model = AdaptiveLlavaForConditionalGeneration.from_pretrained({str(CHECKPOINT)!r})
model.config.compressor_trained = {{trained}}
{{code}}
"""


def test_a_model_with_untrained_parts_pushes_itself_only_if_that_is_said(hub, client, tmp_path):
    def pushed(code: str, trained: bool = False):
        return client.code(PUSH_UNTRAINED.format(trained=trained, code=code))

    saved = f"model.save_pretrained({str(tmp_path / 'saved')!r}, push_to_hub=True, repo_id='ada/raw'"
    for code in ("model.push_to_hub('ada/raw')", f"{saved})"):
        refused = pushed(code)
        assert "ValueError: The model has `config.compressor_trained=False`" in refused.err and not refused.log
    assert pushed(f"{saved}, untrained=True)").status == 0
    card = hub.read("ada/raw", "README.md").decode()
    assert is_as_rendered(card) and UNTRAINED_NOTE in card and "- untrained\n" in card
    # trained meanwhile; and then by somebody who has not installed the package, onto a new repository
    assert pushed("model.push_to_hub('ada/raw')", trained=True).status == 0
    card = hub.read("ada/raw", "README.md").decode()
    assert is_as_rendered(card) and UNTRAINED_NOTE not in card and "- untrained\n" not in card
    absent = (
        "sys.modules['adaptive_llava.hub_cards.pushed_card'] = None; model.push_to_hub('ada/bare', untrained=True)"
    )
    assert pushed(absent).status == 0 and is_stock(hub.read("ada/bare", "README.md").decode())
    client.code("sys.modules.pop('adaptive_llava.hub_cards.pushed_card', None)")
    assert pushed("model.push_to_hub('ada/bare', untrained=True)").status == 0
    assert UNTRAINED_NOTE in hub.read("ada/bare", "README.md").decode()


def test_a_card_that_a_person_wrote_stays_and_says_what_is_untrained(hub, client):
    made = (
        "from huggingface_hub import HfApi; HfApi().create_repo('ada/own'); HfApi().upload_file(repo_id='ada/own', "
        "path_or_fileobj=b'---\\nlicense: mit\\n---\\n# My words\\n', path_in_repo='README.md')"
    )
    assert client.code(made).status == 0
    code = f"{made.split(';')[0]}; model.push_to_hub('ada/own', untrained=True)"
    assert client.code(PUSH_UNTRAINED.format(trained=False, code=code)).status == 0
    card = hub.read("ada/own", "README.md").decode()
    assert "# My words" in card and "license: mit" in card and UNTRAINED_NOTE in card


def test_snapshot_download_and_the_command_line_get_every_file(pushed, hub, client, tmp_path):
    place = str(tmp_path / "a")
    done = client.code(
        f"from huggingface_hub import snapshot_download; snapshot_download({pushed!r}, local_dir={place!r})"
    )
    assert done.status == 0, done.err[-2000:]
    command = [Path(sys.executable).parent / "hf", "download", pushed, "--local-dir", tmp_path / "b"]
    subprocess.run(command, env=hub.environment(tmp_path, token=None), check=True, capture_output=True)
    for name, entry in hub.files(pushed).items():
        for folder in ("a", "b"):
            assert (tmp_path / folder / name).stat().st_size == entry["size"]
    assert sha256_of(tmp_path / "a" / "model.safetensors") == sha256_of(CHECKPOINT / "model.safetensors")
    elsewhere = [entry for entry in done.log if entry["host"] == "localhost"]
    assert elsewhere and not any(entry["with_token"] for entry in elsewhere)


LOAD_METRICS = """
import json
import evaluate
from huggingface_hub import HfApi
api = HfApi()
for name in {names!r}:
    api.create_repo("ada/" + name, repo_type="space", space_sdk="gradio")
    api.upload_folder(repo_id="ada/" + name, repo_type="space", folder_path={metrics!r} + "/" + name)
cases = json.loads({cases!r})
print(json.dumps({{name: evaluate.load("ada/" + name).compute(predictions=pair[0], references=pair[1])
                  for name, pair in cases.items()}}))
"""


def test_our_metrics_load_from_spaces(hub, client):
    cases = {
        "anls": (["ab"], [["ab"]]),
        "gqa": (["Left."], ["left"]),
        "pope": (["Yes"], [{"answer": "yes", "category": "a"}]),
    }
    names = sorted(folder.name for folder in METRICS.iterdir() if (folder / "README.md").is_file())
    done = client.code(LOAD_METRICS.format(names=names, metrics=str(METRICS), cases=json.dumps(cases)))
    assert done.status == 0, done.err[-2000:]
    scores = json.loads(done.out.splitlines()[-1])
    assert scores["anls"]["anls"] == 1.0 and scores["gqa"]["accuracy"] == 1.0 and scores["pope"]["accuracy"] == 1.0


LOAD_DATASET = """
from datasets import Dataset, Features, Image, Sequence, Value, load_dataset
from PIL import Image as Picture
from adaptive_llava.training.conversation_data import load_conversations
rows = [
    {"images": [Picture.new("RGB", (8, 8), (n, 0, 0))], "prompt": "<image> how many?", "completion": str(n)}
    for n in range(5)
]
features = Features({"images": Sequence(Image()), "prompt": Value("string"), "completion": Value("string")})
Dataset.from_list(rows, features=features).push_to_hub("ada/questions", split="test", private=True)
print(*load_dataset("ada/questions", split="test")["completion"])
print(len(load_conversations("ada/questions", split="test")))
"""


def test_datasets_are_pushed_and_loaded(client):
    done = client.code(LOAD_DATASET)
    assert done.status == 0, done.err[-2000:]
    assert done.out.splitlines()[-2:] == ["0 1 2 3 4", "5"]


LOAD_ADAPTER = """
import torch
from peft import PeftModel
from adaptive_llava import AdaptiveLlavaForConditionalGeneration
base = AdaptiveLlavaForConditionalGeneration.from_pretrained({base!r})
here = {{key: value for key, value in PeftModel.from_pretrained(base, {folder!r}).state_dict().items()}}
base = AdaptiveLlavaForConditionalGeneration.from_pretrained({base!r})
there = PeftModel.from_pretrained(base, "ada/adapter").state_dict()
assert any("lora" in key and value.abs().max() > 0 for key, value in here.items())
print(all(torch.equal(value, there[key]) for key, value in here.items()))
"""


def test_an_adapter_alone_is_pushed_and_loaded_onto_its_base(pushed, hub, client, tmp_path):
    folder = str(save_adapter(CHECKPOINT, tmp_path / "adapter"))
    refused = client.command("push", folder, "ada/adapter")
    assert refused.status == 2 and "as its base, which nobody else can load" in refused.err
    done = client.command("push", folder, "ada/adapter", "--base", pushed)
    assert done.status == 0, done.err[-2000:]
    assert {"adapter_config.json", "adapter_model.safetensors"} < set(hub.files("ada/adapter"))
    assert json.loads(hub.read("ada/adapter", "adapter_config.json"))["base_model_name_or_path"] == pushed
    assert not {"config.json", "model.safetensors"} & set(hub.files("ada/adapter"))
    loaded = client.code(LOAD_ADAPTER.format(base=pushed, folder=folder))
    assert loaded.status == 0 and loaded.out.split() == ["True"], loaded.err
    over_a_model = client.command("push", folder, pushed, "--base", pushed)
    assert over_a_model.status == 2 and f"{pushed} holds a whole model, and this is an adapter" in over_a_model.err
    assert f"loading it loads {pushed} too" in client.command("verify", "ada/adapter").out


def start_and_kill(hub: RunningHub, home: Path, *command: object) -> None:
    """A client that is killed once a request of its is held by the server."""
    home.mkdir(exist_ok=True)
    hub.log()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=hub.environment(home), cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    try:
        while not any(entry.get("held") for entry in hub.log(forget=False)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
        hub.order()


def test_a_push_killed_in_the_middle_shows_nothing_and_is_completed_by_the_next(hub, client, tmp_path):
    hub.order(fault("PUT", "/_lfs/", hold_after=100_000))
    folder = with_card_by_hand(tmp_path / "folder")
    start_and_kill(hub, tmp_path / "home", "-m", "adaptive_llava", "push", folder, "ada/killed")
    assert set(hub.files("ada/killed")) == {".gitattributes"} and not hub.commits("ada/killed")
    done = client.command("push", folder, "ada/killed")
    assert done.status == 0 and len(hub.commits("ada/killed")) == 1
    assert hub.files("ada/killed")["model.safetensors"]["lfs"]["oid"] == sha256_of(CHECKPOINT / "model.safetensors")


DOWNLOAD = "from huggingface_hub import snapshot_download; snapshot_download({name!r}, cache_dir={cache!r})"


def test_a_download_killed_in_the_middle_is_whole_after_the_next(big, hub, client, tmp_path):
    name, expected = big
    code = DOWNLOAD.format(name=name, cache=str(tmp_path / "cache"))
    hub.order(fault("GET", "/_cdn/", hold_answer_after=BIG - 100_000))
    start_and_kill(hub, tmp_path / "home", "-c", code)
    assert not list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
    done = client.code(code)
    assert done.status == 0, done.err[-2000:]
    (found,) = (tmp_path / "cache").rglob("snapshots/*/model.safetensors")
    assert sha256_of(found) == expected


def test_a_download_cut_in_the_middle_is_whole_or_an_error(big, hub, client, tmp_path):
    name, expected = big
    code = DOWNLOAD.format(name=name, cache=str(tmp_path / "cache"))
    cut = client.code(code, faults=[fault("GET", "/_cdn/", truncate_after=BIG - 100_000)])
    if cut.status == 0:  # this generation goes on by itself, from the last whole step
        assert any(entry["range"] == f"bytes={2 * 10 * 1024 * 1024}-" for entry in cut.requests("GET", "/_cdn/"))
    else:
        assert "IncompleteRead" in cut.err
        assert not list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
        assert client.code(code).status == 0
    (found,) = (tmp_path / "cache").rglob("snapshots/*/model.safetensors")
    assert sha256_of(found) == expected


def test_a_client_with_xet_on_pushes_and_everybody_loads(hub, tmp_path):
    folder = with_card_by_hand(tmp_path / "folder")
    with hub.client(tmp_path / "xet", xet=True) as with_xet:
        done = with_xet.command("push", folder, "ada/xet")
    assert done.status == 0, done.err[-2000:]
    assert len(hub.commits("ada/xet")) == 1
    assert hub.files("ada/xet")["model.safetensors"]["lfs"]["oid"] == sha256_of(CHECKPOINT / "model.safetensors")
