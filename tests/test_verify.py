"""`verify` tells this package's code from any other, without running it, and names the commit to pin."""

from __future__ import annotations

import hashlib
import json

import pytest

from adaptive_llava.modeling.code_files import MANIFEST_NAME, code_files
from tests.loopback_hub.running import Client
from tests.test_loading_paths import save_checkpoint


pytestmark = pytest.mark.compat

# Runs in a client's process: makes a repository of a folder, and in it a branch for each change.
MAKER = """
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
api = HfApi()
api.create_repo("ada/good")
api.upload_folder(repo_id="ada/good", folder_path={folder!r})
for name, changes in {changes!r}.items():
    api.create_branch("ada/good", branch=name)
    operations = [
        CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content.encode("latin-1"))
        for path, content in changes.items()
    ]
    api.create_commit("ada/good", operations, revision=name, commit_message="change")
"""

EVIL = "raise SystemExit('this ran')\n"
# By name: what is changed in the repository (None: removed), and what `verify` says of it.
CHANGES: dict[str, tuple[dict, str]] = {
    "code": ({"projector.py": EVIL}, "projector.py: differs from the manifest"),
    "code-and-manifest": (
        {"projector.py": EVIL, MANIFEST_NAME: ""},
        "1 of {count} code files are not those of this package",
    ),
    "more-code": ({"extra.py": EVIL}, "extra.py: not in the manifest, and no file of this package"),
    "less-code": ({"projector.py": None}, "projector.py: in the manifest, but not there"),
    "no-manifest": ({MANIFEST_NAME: None}, f"{MANIFEST_NAME}: there is none that can be read"),
    "code-in-a-folder": ({"custom_generate/generate.py": EVIL}, "custom_generate/generate.py: a program"),
    "pickle": ({"training_args.bin": "\x80\x02."}, "training_args.bin: a pickle"),
    "disguised": ({"vocab.txt": "\x80\x04\x95\xff"}, "vocab.txt: neither text nor a picture"),
    "disguised-program": ({"logo.png": "\x7fELF\x02\xff"}, "logo.png: neither text nor a picture"),
    "script": ({"LICENSE": "#!/bin/sh\n"}, "LICENSE: a script"),
    "weights": ({"model.safetensors": "\x80\x02" * 9}, "model.safetensors: no safetensors file"),
    "reference": (
        {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": [null, "eve/code--fast.Tokenizer"]}}'},
        "tokenizer_config.json: asks for other code (auto_map: eve/code--fast.Tokenizer)",
    ),
    "pipeline": (
        {"generation_config.json": '{"custom_pipelines": {"x": {"impl": "run.Me"}}}'},
        "generation_config.json: asks for other code (custom_pipelines",
    ),
}


@pytest.fixture(scope="module")
def branches(client: Client, tmp_path_factory) -> None:
    """A repository whose `main` nobody changed, with a branch for each change."""
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")
    (folder / "expected.tensors").unlink()
    sums = json.loads((folder / MANIFEST_NAME).read_text())["sha256"]
    sums["projector.py"] = hashlib.sha256(EVIL.encode()).hexdigest()
    changes = {name: dict(change) for name, (change, _) in CHANGES.items()}
    changes["code-and-manifest"][MANIFEST_NAME] = json.dumps({"sha256": sums})
    done = client.code(MAKER.format(folder=str(folder), changes=changes))
    assert done.status == 0, done.err


def test_code_of_this_package_is_told_from_any_other(branches, hub, client):
    good, *changed = [client.command("verify", f"ada/good@{name}") for name in ("main", *CHANGES)]
    commit = hub.commits("ada/good")[0]["id"]
    assert good.status == 0, good.out + good.err
    assert f"its {len(code_files())} code files are those of its manifest and of this package" in good.out
    assert f'from_pretrained("ada/good", revision="{commit}", trust_remote_code=True)' in good.out
    assert not any(entry["path"].endswith(".safetensors") and not entry["range"] for entry in good.requests("GET"))
    for step, (name, (_, message)) in zip(changed, CHANGES.items(), strict=True):
        assert step.status == 1, (name, step.out, step.err)
        assert f"refused: {message.format(count=len(code_files()))}" in step.out, (name, step.out)
        assert "Do not load it with trust_remote_code=True." in step.out
        assert "this ran" not in step.out + step.err
