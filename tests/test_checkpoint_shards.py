"""Checkpoints are read and written a shard at a time, in little memory, and pickles hold nothing that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from adaptive_llava.training.checkpoint_shards import CheckpointFiles, PlannedTensor, checkpoint_folder, write_shards
from adaptive_llava.training.original_llava import read_text_config
from tests.original_checkpoints import layers, llava_config, llava_tensors, save_checkpoint, save_tower


def planned(values, dtype=None):
    return {n: PlannedTensor(tuple(v.shape), dtype or v.dtype, v.clone) for n, v in values.items()}


TENSORS = {f"part.{index}": torch.full((4, 8), float(index)) for index in range(5)}


def test_shards_are_bounded_and_indexed_as_transformers_does(tmp_path):
    files = write_shards(tmp_path, planned(TENSORS), max_bytes=2 * 4 * 8 * 4)
    assert files == [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 4 * 8 * 4
    assert {name: load_file(tmp_path / file)[name][0, 0].item() for name, file in index["weight_map"].items()} == {
        f"part.{number}": number for number in range(5)
    }
    again = CheckpointFiles(tmp_path)
    assert set(again.stored) == set(TENSORS) and torch.equal(again.read("part.3"), TENSORS["part.3"])


def test_one_shard_has_no_index_and_types_change_on_the_way(tmp_path):
    assert write_shards(tmp_path, planned(TENSORS, torch.bfloat16), max_bytes=10**6) == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    stored = CheckpointFiles(tmp_path).stored["part.1"]
    assert stored.dtype == torch.bfloat16 and stored.shape == (4, 8)


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path):
    assert len(write_shards(tmp_path, planned(TENSORS), max_bytes=1)) == 5


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_pickled_shards_are_read_without_their_buffers_of_other_kinds(tmp_path, zipped):
    shared = torch.arange(8.0)
    values = {"a": shared, "b": shared.view(2, 4), "step": 7}
    torch.save(values, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    files = CheckpointFiles(tmp_path)
    assert {name: tensor.shape for name, tensor in files.stored.items()} == {"a": (8,), "b": (2, 4)}
    # views of one storage become tensors of their own
    write_shards(tmp_path, planned({name: files.read(name) for name in files.stored}), max_bytes=10**6)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["b"], shared.view(2, 4))


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruder",)


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Intruder()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is no file of plain tensors, and nothing else is opened"):
        CheckpointFiles(tmp_path)
    assert not (tmp_path / "intruder").exists()


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"holds no weights: neither model.safetensors nor pytorch_model.bin.*adapter"
    ):
        CheckpointFiles(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x09\x00\x00\x00")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        CheckpointFiles(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is"):
        CheckpointFiles(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match=r"model-2.safetensors is missing. Download"):
        CheckpointFiles(tmp_path)
    save_file({"c": torch.ones(1)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match="names 1 tensors that its files do not hold: b"):
        CheckpointFiles(tmp_path)


def test_quantised_tensors_are_refused(tmp_path):
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a is of type F8_E4M3. Quantised"):
        CheckpointFiles(tmp_path)


def test_a_hub_id_is_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    torch.save(TENSORS, snapshot / "pytorch_model.bin")
    assert set(CheckpointFiles(checkpoint_folder("org/tiny")).stored) == set(TENSORS)
    assert checkpoint_folder("org/tiny", with_weights=False) == snapshot
    with pytest.raises(ValueError, match="`--from='org/other'` has no config.json that can be read"):
        checkpoint_folder("org/other")


MEASURE = """
import sys
from pathlib import Path
from adaptive_llava.training.convert import convert

def memory(field):  # bytes
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

source, target = map(Path, sys.argv[1:])
convert(source / "small", target / "small")  # imports and first uses
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
convert(source / "large", target / "large", "avg-pool", max_shard_bytes=10_000_000)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="peak memory is measured through Linux's /proc"
)
@pytest.mark.parametrize("pickled", [True, False], ids=["bin", "safetensors"])
def test_a_conversion_takes_the_memory_of_about_a_shard(tmp_path, pickled):
    tower = save_tower(tmp_path / "tower")
    save_checkpoint(tmp_path / "small", llava_tensors(), llava_config(tower))
    fields = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 4000}
    text = read_text_config(llava_config(tower, **fields), 4000)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(text).state_dict().items()}
    tensors = {
        name: torch.zeros(shape) for name, shape in (shapes | layers("model.mm_projector", 32, 256, 256)).items()
    }
    size = sum(value.nbytes for value in tensors.values())
    save_checkpoint(tmp_path / "large", tensors, llava_config(tower, **fields), shards=12, pickled=pickled)
    del tensors
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert size > 150_000_000
    assert int(done.stdout) < size / 4
    assert len(list((tmp_path / "out" / "large").glob("*.safetensors"))) > 12
