"""Push to a Hub, as one commit, and load from it where this package is absent, with both generations of clients."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import transformers

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.hub_cards.upload_plan import UNTRAINED_NOTE, plan_upload
from adaptive_llava.modeling.code_files import MANIFEST_NAME, auto_map, code_files
from tests.fresh_process import run_without_package
from tests.loopback_hub.running import RunningHub, fault
from tests.test_loading_paths import save_checkpoint


pytestmark = pytest.mark.compat

OTHER_PYTHON = os.environ.get("ADAPTIVE_LLAVA_OTHER_PYTHON")
GENERATIONS = {"this": sys.executable} | ({"other": OTHER_PYTHON} if OTHER_PYTHON else {})

# What runs where the package is absent: loads a model and its processor at each revision, and compares.
LOADER = r"""
import json, sys
expected, *wanted = sys.argv[1:]
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
expected = load_file(expected)
generator = torch.Generator().manual_seed(0)
picture = Image.fromarray(torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8, generator=generator).numpy())
report = []
for text in wanted:
    options = json.loads(text)
    try:
        model = AutoModelForImageTextToText.from_pretrained(**options, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(**options, trust_remote_code=True)
    except Exception as error:
        report.append({"error": f"{type(error).__name__}: {error}"})
        continue
    with torch.no_grad():
        logits = model(input_ids=expected["ids"], pixel_values=expected["pixels"]).logits
    found = processor(images=picture, text="w5 <image> w6", return_tensors="pt")
    report.append({
        "module": type(model).__module__,
        "difference": (logits - expected["logits"]).abs().max().item(),
        "same_inputs": found["input_ids"].tolist() == expected["processed_ids"].tolist(),
        "counts": list(model.config.visual_token_counts),
    })
print("REPORT " + json.dumps(report))
"""


def load_all(
    hub: RunningHub,
    folder: Path,
    expected: Path,
    *wanted: dict,
    python: str = sys.executable,
    token: str | None = None,
) -> list[dict]:
    """What `LOADER` reports of several loads, in one process with an empty cache."""
    variables = {key: value for key, value in hub.environment(folder, token=token).items() if key != "PYTHONPATH"}
    options = [json.dumps(one) for one in wanted]
    output = run_without_package(LOADER, expected, *options, folder=folder, python=python, variables=variables)
    (line,) = [line for line in output.splitlines() if line.startswith("REPORT ")]
    return json.loads(line.removeprefix("REPORT "))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model and its processor, with a card, results, and what only trainers read."""
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")
    (folder / "README.md").write_text("---\ntags:\n- adaptive-llava\n---\n# Tiny\n\n![curve](curve.png)\n")
    (folder / "curve.png").write_bytes(b"\x89PNG\0")
    (folder / "results.json").write_text('{"accuracy": 1.0}\n')
    (folder / "optimizer.pt").write_bytes(b"\x80\x02.")
    (folder / ".env").write_text("SECRET=1")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("pushed_by", GENERATIONS)
def test_what_is_pushed_loads_from_an_empty_cache_where_the_package_is_absent(pushed_by, hub, checkpoint, tmp_path):
    name = f"ada/loads-{pushed_by}"
    with hub.client(tmp_path / "pusher", python=GENERATIONS[pushed_by]) as pusher:
        done = pusher.command("push", checkpoint, name)
    assert done.status == 0, done.err
    (commit,) = hub.commits(name)
    assert f"{name}@{commit['id']}" in done.out
    pinned = {"pretrained_model_name_or_path": name, "revision": commit["id"]}
    for generation, python in GENERATIONS.items():
        home = tmp_path / generation
        home.mkdir()
        reports = load_all(
            hub, home, checkpoint / "expected.tensors", {"pretrained_model_name_or_path": name}, pinned, python=python
        )
        for report in reports:
            assert report["module"].startswith("transformers_modules.")
            assert report["difference"] <= 1e-5 and report["same_inputs"] and report["counts"] == [4, 9, 36]


def test_only_what_loading_needs_and_the_card_show_goes_up(hub, client, checkpoint):
    planned = client.command("push", checkpoint, "ada/plan", "--dry-run")
    assert planned.status == 0 and not planned.log
    assert "stays here: .env, checkpoint-5/config.json, expected.tensors, optimizer.pt" in planned.out
    done = client.command("push", checkpoint, "ada/plan", token="hf_ada")
    assert done.status == 0, done.err
    listed = {line.split()[1] for line in planned.out.splitlines() if line[0] == " " and " files " not in line}
    assert set(hub.files("ada/plan")) == listed | {".gitattributes"}
    assert {"README.md", "curve.png", "results.json", "processor_config.json", MANIFEST_NAME} < listed
    assert json.loads(hub.read("ada/plan", "config.json"))["auto_map"] == auto_map()


def test_a_repeat_sends_only_what_is_missing_or_changed(hub, client, checkpoint, tmp_path):
    first = client.command("push", checkpoint, "ada/again")
    again = client.command("push", checkpoint, "ada/again")
    assert first.status == again.status == 0
    assert len(first.requests("PUT")) == 2 and not again.requests("PUT") and not again.requests("POST", "/commit/")
    assert "has all of it already" in again.out and len(hub.commits("ada/again")) == 1
    folder = shutil.copytree(checkpoint, tmp_path / "changed")
    (folder / "results.json").write_text('{"accuracy": 0.5}\n')
    changed = client.command("push", folder, "ada/again")
    assert changed.status == 0 and not changed.requests("PUT") and len(hub.commits("ada/again")) == 2
    (commit,) = changed.requests("POST", "/commit/")
    assert commit["bytes_in"] < 1000
    assert hub.read("ada/again", "results.json") == b'{"accuracy": 0.5}\n'


def test_weights_and_code_of_an_earlier_push_are_removed_with_the_same_commit(hub, client, checkpoint, tmp_path):
    assert client.command("push", checkpoint, "ada/shards").status == 0
    folder = shutil.copytree(checkpoint, tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(checkpoint)
    model.save_pretrained(folder, max_shard_size="60KB")
    done = client.command("push", folder, "ada/shards", "--code", "team/code")
    assert done.status == 0, done.err
    there = set(hub.files("ada/shards"))
    assert len(hub.commits("ada/shards")) == 2
    assert "model.safetensors" not in there and "model.safetensors.index.json" in there
    assert not any(name.endswith(".py") for name in there) and MANIFEST_NAME not in there
    assert {path.name for path in code_files()} < set(hub.files("team/code"))


def test_code_in_a_repository_of_its_own_serves_many_models(hub, client, checkpoint, tmp_path):
    first = client.command("push", checkpoint, "ada/shared-1", "--code", "team/shared")
    second = client.command("push", checkpoint, "ada/shared-2", "--code", "team/shared", "--private")
    assert first.status == second.status == 0, first.err + second.err
    assert len(hub.commits("team/shared")) == 1
    code = hub.commits("team/shared")[0]["id"]
    verified = client.command("verify", "ada/shared-1")
    assert verified.status == 0 and f'code_revision="{code}"' in verified.out
    options = {"pretrained_model_name_or_path": "ada/shared-1"}
    pinned = options | {"revision": hub.commits("ada/shared-1")[0]["id"], "code_revision": code}
    for report in load_all(hub, tmp_path, checkpoint / "expected.tensors", options, pinned):
        assert report["difference"] <= 1e-5 and report["same_inputs"] and "shared" in report["module"], report


def test_other_code_in_the_code_repository_is_not_replaced_unasked(hub, client, checkpoint):
    client.code(
        "from huggingface_hub import HfApi; api = HfApi(); api.create_repo('team/old'); "
        "api.upload_file(repo_id='team/old', path_or_fileobj=b'x = 1', path_in_repo='projector.py')"
    )
    refused = client.command("push", checkpoint, "ada/old-code", "--code", "team/old")
    assert refused.status == 2 and "team/old holds other code than this package" in refused.err
    assert client.command("push", checkpoint, "ada/old-code", "--code", "team/old", "--update-code").status == 0
    assert client.command("verify", "ada/old-code").status == 0


def test_branches_pull_requests_and_private_repositories(hub, client, checkpoint):
    assert client.command("push", checkpoint, "ada/places", "--revision", "tries/1").status == 0
    assert set(hub.files("ada/places")) == {".gitattributes"}
    assert len(hub.commits("ada/places", "tries%2F1")) == 1
    asked = client.command("push", checkpoint, "ada/places", "--create-pr", token="hf_bob")
    assert asked.status == 0 and "/ada/places/discussions/1" in asked.out, asked.err
    assert "config.json" in hub.files("ada/places", "refs%2Fpr%2F1") and not hub.commits("ada/places")
    public = client.command("push", checkpoint, "ada/places", "--private")
    assert public.status == 2 and "ada/places is public already" in public.err
    assert client.command("push", checkpoint, "ada/secret", "--private").status == 0
    assert hub.call("/api/models/ada/secret")["private"]
    hidden = client.command("verify", "ada/secret", token=None)
    assert hidden.status == 2 and "or it is private and this token may not see it" in hidden.err


def test_a_private_repository_loads_with_its_token_and_not_without(hub, client, checkpoint, tmp_path):
    assert client.command("push", checkpoint, "ada/private", "--private").status == 0
    name = {"pretrained_model_name_or_path": "ada/private"}
    expected = checkpoint / "expected.tensors"
    without, given = load_all(hub, tmp_path, expected, name, name | {"token": "hf_ada_read"})
    login = tmp_path / "login"
    login.mkdir()
    (logged_in,) = load_all(hub, login, expected, name, token="hf_ada_read")
    assert "private repository" in without["error"] and "ada/private" in without["error"]
    assert logged_in.get("difference", 1) <= 1e-5, logged_in
    if transformers.__version__ < "5":  # its AutoProcessor forgets the argument before it reads the repository
        assert "private repository" in given["error"]
    else:
        assert given.get("difference", 1) <= 1e-5, given


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (None, "ada/x", "`push ada/x` needs a login. Run `hf auth login`, or set HF_TOKEN."),
        ("hf_wrong", "ada/x", "ada/x was not pushed: the token is not valid"),
        ("hf_ada_read", "ada/x", "ada/x was not pushed: this token may not write there"),
        ("hf_bob", "ada/x", "ada/x was not pushed: this token may not write there"),
        ("hf_ada", "x", "`push x` is no id of a repository. Pass `user/name`."),
    ],
)
def test_tokens_that_may_not_push_are_told_in_one_line(token, name, message, client, checkpoint):
    done = client.command("push", checkpoint, name, token=token)
    assert done.status == 2 and message in done.err and len(done.err.splitlines()) == 1


def test_somebody_else_s_commit_in_between_is_not_overwritten(hub, client, checkpoint):
    assert client.command("push", checkpoint, "ada/busy").status == 0
    meanwhile = fault("POST", "/preupload/", commit_first=["models", "ada/busy"])
    (checkpoint / "results.json").write_text('{"accuracy": 0.75}\n')
    done = client.command("push", checkpoint, "ada/busy", faults=[meanwhile])
    assert done.status == 2 and "somebody else has committed to it meanwhile" in done.err
    assert [commit["title"] for commit in hub.commits("ada/busy")] == ["somebody else's", "Upload model"]
    assert client.command("push", checkpoint, "ada/busy").status == 0
    assert hub.read("ada/busy", "NOTES") == b"mine"


def test_untrained_parts_are_not_shipped_by_accident(hub, client, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "untrained")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"compressor_trained": False}))
    refused = client.command("push", folder, "ada/untrained")
    assert refused.status == 2 and not refused.log
    assert "has `compressor_trained: false`" in refused.err and "pass --untrained" in refused.err
    assert client.command("push", folder, "ada/untrained", "--untrained").status == 0
    card = hub.read("ada/untrained", "README.md").decode()
    assert "- adaptive-llava\n- untrained\n" in card and UNTRAINED_NOTE in card and "# Tiny" in card
    (folder / "README.md").unlink()
    assert client.command("push", folder, "ada/untrained", "--untrained").status == 0
    card = hub.read("ada/untrained", "README.md").decode()
    assert "- untrained\n" in card and UNTRAINED_NOTE in card and "# ada/untrained" in card


# By name: how the folder is spoilt, and what is said.
SPOILT = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "cut off": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors is broken"),
    "pickled": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which runs code when it is loaded",
    ),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "has no processor_config.json"),
    "another model": (lambda folder: (folder / "config.json").write_text("{}"), "`model_type=None`"),
    "changed code": (lambda folder: (folder / "projector.py").write_text("x = 1"), "projector.py in .* differ from"),
    "a shard of none": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
        "holds shards without model.safetensors.index.json",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_folder_that_would_not_load_is_refused(what, checkpoint, tmp_path):
    folder, staging = shutil.copytree(checkpoint, tmp_path / "spoilt"), tmp_path / "staging"
    staging.mkdir()
    spoil, message = SPOILT[what]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        plan_upload(folder, staging)
