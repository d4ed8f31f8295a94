"""A checkpoint with missing, foreign, misshapen or spoilt parts loads with finite, trained weights, or is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.__main__ import main
from adaptive_llava.hub_cards.upload_plan import plan_upload
from adaptive_llava.serve import load
from adaptive_llava.training.checkpoint_shards import CheckpointFiles
from tests.conftest import tiny_images, tiny_model
from tests.hostile_cases import cases, check_refusal, refused_well
from tests.test_convert import character_tokenizer


pytestmark = pytest.mark.compat

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROJECTOR, TOWER = "model.multi_modal_projector.linear_1.weight", "model.vision_tower.post_layernorm.weight"
RAN = "hostile_code_ran"  # a file that code of a checkpoint writes, if it runs


class RunsCode:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return (exec, (f"open({RAN!r}, 'w').close()",))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model with every part that learns, and its processor, as they are saved."""
    folder = tmp_path_factory.mktemp("checkpoints") / "whole"
    model = tiny_model("dynamic-resampler", fusion_blocks="default", router_training={"images": 3})
    processor = AdaptiveLlavaProcessor.from_config(model.config, character_tokenizer())
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    """A copy to spoil, in which a run of its code would leave a file."""
    monkeypatch.chdir(tmp_path)
    yield shutil.copytree(whole, tmp_path / "model")
    assert not (tmp_path / RAN).exists()


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors by name, `.` written as `__`; `None` takes one out."""
    tensors = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, part: str | None = None, **entries) -> None:
    stored = json.loads((folder / "config.json").read_text())
    (stored if part is None else stored[part]).update(entries)
    (folder / "config.json").write_text(json.dumps(stored))


def sharded(folder: Path, index: str) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(index)


def pickled(folder: Path, content) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "pytorch_model.bin")


def escaping(folder: Path) -> None:
    names = list(load_file(folder / WEIGHTS))
    shutil.copy(folder / WEIGHTS, folder.parent / WEIGHTS)
    sharded(folder, json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, f"../{WEIGHTS}")}))


# How a folder is spoilt, and what is said of it.
SPOILT = {
    "a router without a bias": (lambda f: rewrite(f, model__router__linear_1__bias=None), "lacks 1 weights.*router"),
    "no query of the compressor": (
        lambda f: rewrite(f, model__compressor__query_9=None),
        "lacks 1 .*compressor.query_9",
    ),
    "no fusion": (
        lambda f: rewrite(f, model__multi_block_fusion__linear_1__weight=None),
        "lacks 1 .*multi_block_fusion",
    ),
    "a misshapen projector": (lambda f: rewrite(f, **{PROJECTOR: torch.ones(3)}), "do not fit its config"),
    "a misshapen tower": (lambda f: rewrite(f, **{TOWER: torch.ones(3)}), "do not fit its config"),
    "an empty file of weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "are damaged.*Download"),
    "half a file of weights": (lambda f: os.truncate(f / WEIGHTS, 5000), "are damaged.*Download"),
    "a pickle by the name of weights": (
        lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({"x": RunsCode()})),
        "are no safetensors",
    ),
    "a pickle in place of weights": (lambda f: pickled(f, {"x": torch.ones(2)}), "as a pickle.*is not read"),
    "a pickle that runs code": (lambda f: pickled(f, {"x": RunsCode()}), "as a pickle.*is not read"),
    "an index that leads away": (escaping, rf"names '../{WEIGHTS}'.*no file outside of its folder"),
    "an index that is no JSON": (lambda f: sharded(f, "{"), "is no index of shards"),
    "an index without files": (lambda f: sharded(f, "{}"), "is no index of shards.*'weight_map'"),
    "weights elsewhere": (
        lambda f: configure(f, transformers_weights="../model.safetensors"),
        "`transformers_weights='../model.safetensors'`.*no file outside",
    ),
    "a kernel of a repository": (
        lambda f: configure(f, attn_implementation="eve/kernel"),
        "`config.json` asks for `attn_implementation='eve/kernel'`, and no file of a checkpoint chooses what code",
    ),
    "a kernel under its inner name": (
        lambda f: configure(f, _attn_implementation="kernels-community/flash-attn"),
        "asks for `_attn_implementation='kernels-community/flash-attn'`",
    ),
    "a kernel for the language model": (
        lambda f: configure(f, "text_config", _attn_implementation="eve/kernel@main:attention"),
        "`text_config` asks for `_attn_implementation=",
    ),
    "a kernel by part": (
        lambda f: configure(f, attn_implementation={"text_config": "eve/kernel"}),
        "asks for `attn_implementation=",
    ),
    "an attention that is not there": (
        lambda f: configure(f, "vision_config", attn_implementation="quantum"),
        "`vision_config` asks for `attn_implementation='quantum'`",
    ),
    "a dtype that is a function": (
        lambda f: configure(f, dtype="load"),
        "`dtype='load'`, which must be a type of torch",
    ),
    "a dtype that is a number": (lambda f: configure(f, dtype=7), "`dtype=7`, which must be"),
    "a quantisation that is a number": (lambda f: configure(f, quantization_config=7), "`quantization_config=7`"),
    "labels that are a number": (lambda f: configure(f, id2label=7), "id2label"),
    "a tie that is a word": (
        lambda f: configure(f, tie_word_embeddings="no"),
        "`tie_word_embeddings='no'` must be true",
    ),
    "trained, in words": (
        lambda f: configure(f, compressor_trained="false"),
        "`compressor_trained='false'` must be true",
    ),
    "a tower of no known type": (
        lambda f: configure(f, "vision_config", model_type="eve", auto_map={"AutoModel": "code.Eve"}),
        "`vision_config` of type 'eve' cannot be read",
    ),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[1]"), "holds no JSON object"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_checkpoint_is_refused_with_the_reason(what, folder, caplog):
    spoil, said = SPOILT[what]
    spoil(folder)
    with pytest.raises(ValueError) as refusal:
        AdaptiveLlavaForConditionalGeneration.from_pretrained(folder)
    check_refusal(refusal.value, said=said)


@pytest.mark.parametrize("what", ["a pickle that runs code", "a kernel of a repository", "an index that leads away"])
def test_no_auto_class_reads_what_the_class_itself_refuses(what, folder):
    spoil, said = SPOILT[what]
    spoil(folder)
    with pytest.raises(ValueError) as refusal:
        AutoModelForImageTextToText.from_pretrained(folder)
    check_refusal(refusal.value, said=said)


def test_a_tensor_nobody_knows_changes_nothing(folder):
    rewrite(folder, eve=torch.full((3,), float("nan")))
    model, info = AdaptiveLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert list(info["unexpected_keys"]) == ["eve"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_backbone_that_lacks_a_weight_is_named_as_transformers_does(folder):
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    rewrite(folder, **{name: None})
    _, info = AdaptiveLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert list(info["missing_keys"]) == [name]


def test_a_projector_started_anew_on_request_is_recorded_as_untrained(folder):
    rewrite(folder, **{PROJECTOR: torch.ones(3)})
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.config.compressor_trained is False


def test_numbers_that_are_none_are_neither_pushed_nor_served(folder, tmp_path, capsys):
    spoilt = load_file(folder / WEIGHTS)[PROJECTOR]
    spoilt[3, 2] = float("nan")
    rewrite(folder, **{PROJECTOR: spoilt})
    (tmp_path / "staging").mkdir()
    with pytest.raises(ValueError) as refusal:
        plan_upload(folder, tmp_path / "staging")
    check_refusal(refusal.value, said=f"holds NaN or infinite numbers in `{PROJECTOR}`")
    with pytest.raises(ValueError) as refusal:
        load(str(folder))
    check_refusal(refusal.value, said=f"holds NaN or infinite numbers in `{PROJECTOR}`")


def test_numbers_beyond_a_narrower_type_are_not_served(folder):
    large = load_file(folder / WEIGHTS)[PROJECTOR]
    large[0, 0] = 1e6
    rewrite(folder, **{PROJECTOR: large})
    load(str(folder))
    with pytest.raises(ValueError, match="holds NaN or infinite numbers.*pass `--dtype auto`"):
        load(str(folder), dtype="float16")


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_a_folder_with_a_config_that_is_none_is_told_in_one_line(content, folder, capsys):
    (folder / "config.json").write_text(content)
    assert main(["freeze-budget", str(folder), "--tokens", "4", "--to", "x"]) == 2
    assert "config.json` holds no JSON object" in capsys.readouterr().err


@cases(12, st.data())
def test_weights_with_any_changes_load_finite_or_are_refused(whole, tmp_path_factory, data):
    folder = _copy(whole, tmp_path_factory)
    tensors = load_file(whole / WEIGHTS)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3, unique=True)):
        value = tensors[name]
        change = data.draw(st.sampled_from(["drop", "flat", "longer", "scalar", "empty", "half", "rename", "zero"]))
        changed = {
            "flat": value.flatten(),
            "longer": torch.cat([value, value]),
            "scalar": value.new_ones(()),
            "empty": value.new_ones(0),
            "half": value.half(),
            "zero": value * 0,
        }.get(change)
        del tensors[name]
        if change == "rename":
            tensors[f"{name}s"] = value
        elif changed is not None:
            tensors[name] = changed
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with refused_well():
        model, info = AdaptiveLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        own = ("compressor.", "router.", "multi_modal_projector.", "multi_block_fusion.")
        assert not any(part in name for name in info["missing_keys"] for part in own)


@cases(12, st.floats(0, 1), st.binary(min_size=1, max_size=12), st.booleans())
def test_a_file_of_weights_with_any_bytes_loads_or_is_refused(whole, tmp_path_factory, where, new, header):
    folder = _copy(whole, tmp_path_factory)
    content = bytearray((whole / WEIGHTS).read_bytes())
    length = 8 + int.from_bytes(content[:8], "little") if header else len(content)
    place = int(where * (length - 1))
    content[place : place + len(new)] = new
    (folder / WEIGHTS).write_bytes(content)
    with refused_well():
        AdaptiveLlavaForConditionalGeneration.from_pretrained(folder)


@cases(200, st.floats(0, 1), st.binary(min_size=1, max_size=12), st.sampled_from(["safetensors", "bin", "index"]))
def test_shards_with_any_bytes_are_read_for_conversion_or_refused(tmp_path_factory, where, new, kind):
    folder = tmp_path_factory.getbasetemp() / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2)}
    index = {"metadata": {"total_size": 32}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    save_file(tensors, folder / ("model-1.safetensors" if kind == "index" else WEIGHTS))
    if kind == "index":
        (folder / INDEX).write_text(json.dumps(index))
    elif kind == "bin":
        (folder / WEIGHTS).unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    (spoilt,) = folder.glob("*.json" if kind == "index" else f"*.{kind}")
    content = bytearray(spoilt.read_bytes())
    place = int(where * (len(content) - 1))
    content[place : place + len(new)] = new
    spoilt.write_bytes(content)
    with refused_well(said=str(folder)):
        files = CheckpointFiles(folder)
        for name, stored in files.stored.items():
            assert tuple(files.read(name).shape) == stored.shape


def _copy(whole: Path, factory) -> Path:
    """A folder with links to all files of another but the weights."""
    folder = factory.getbasetemp() / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in whole.iterdir():
        if path.name != WEIGHTS:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("reader", [AdaptiveLlavaConfig, AutoConfig])
def test_code_that_a_config_asks_for_is_not_run(reader, folder):
    (folder / "eve.py").write_text(f"open({RAN!r}, 'w').close()")
    code = {
        name: "eve.Eve" for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM")
    }
    configure(folder, auto_map=code)
    for part in ("vision_config", "text_config"):
        configure(folder, part, auto_map=code)
    assert type(reader.from_pretrained(folder)) is AdaptiveLlavaConfig
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is AdaptiveLlavaForConditionalGeneration
    assert model(input_ids=torch.tensor([[5, 99, 6]]), pixel_values=tiny_images(1)).logits.isfinite().all()


def test_another_repository_that_a_config_asks_for_is_not_asked(folder):
    configure(folder, auto_map={"AutoConfig": "eve/code--eve.Eve"}, code_repository="eve/code")
    for part in ("vision_config", "text_config"):
        configure(folder, part, auto_map={"AutoModel": "eve/code--eve.Eve"})
    assert AdaptiveLlavaForConditionalGeneration.from_pretrained(folder).config.code_repository == "eve/code"
