"""`python -m adaptive_llava freeze-budget`: the same weights at one token count, for engines that know sizes only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from adaptive_llava import AdaptiveLlavaProcessor
from adaptive_llava.__main__ import main
from adaptive_llava.training.freeze_budget import CONFIG, INDEX, PROCESSOR, freeze_budget
from adaptive_llava.training.train_router import RESULTS
from tests.conftest import tiny_model
from tests.fresh_process import run_without_package
from tests.test_convert import character_tokenizer, picture


pytestmark = pytest.mark.compat

PROMPT = "Is <image> like <image>?"


def save(folder: Path, tiling=None, **saving) -> Path:
    model = tiny_model("dfmr", tiling=tiling)
    model.config.calibration = {"target_mean": 14.0}
    model.config.router_training = {"method": "train_router"}
    model.save_pretrained(folder, **saving)
    AdaptiveLlavaProcessor.from_config(model.config, character_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("freeze") / "model")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SERVE = """
import json, sys
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, prompt, *paths = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=[Image.open(path) for path in paths], text=prompt, return_tensors="pt")
with torch.no_grad():
    features = model.get_image_features(inputs["pixel_values"])
    rows = getattr(features, "pooler_output", features)
    logits = model(**inputs).logits
save_file({"logits": logits, "ids": inputs["input_ids"]}, folder + "/served.tensors")
print(json.dumps({
    "module": type(model).__module__,
    "keys": sorted(inputs),
    "from_sizes": processor._get_num_multimodal_tokens(image_sizes=inputs["image_sizes"].tolist())["num_image_tokens"],
    "from_features": [len(row) for row in rows],
    "placeholders": int((inputs["input_ids"] == processor.image_token_id).sum()),
}))
"""


def test_a_frozen_copy_is_served_by_sizes_alone_without_the_package(checkpoint, tmp_path, capsys):
    frozen = tmp_path / "frozen"
    assert main(["freeze-budget", str(checkpoint), "--tokens", "20", "--to", str(frozen)]) == 0
    assert "9 visual tokens for every image (of [4, 9, 36])" in capsys.readouterr().out
    paths = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        picture(seed).save(path)

    report = json.loads(run_without_package(SERVE, frozen, PROMPT, *paths, folder=tmp_path).splitlines()[-1])
    assert report["module"].startswith("transformers_modules.")
    assert report["from_sizes"] == report["from_features"] == [9, 9] and report["placeholders"] == 18
    assert report["keys"] == ["attention_mask", "image_sizes", "input_ids", "mm_token_type_ids", "pixel_values"]

    served = load_file(frozen / "served.tensors")
    original = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    expanded = processor(images=paths, text=PROMPT, visual_token_budget=20, layout="expanded", return_tensors="pt")
    assert torch.equal(served["ids"], expanded["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(served["logits"], original(**expanded).logits, rtol=0, atol=1e-5)
        compact = processor(images=paths, text=PROMPT, return_tensors="pt")
        expected = original(**compact, visual_token_budget=20).logits
    is_text = served["ids"] != processor.image_token_id
    torch.testing.assert_close(
        served["logits"][is_text], expected[compact["input_ids"] != processor.image_token_id], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("tokens", "rung"), [(4, 0), (8, 0), (9, 1), (35, 1), (36, 2), (5000, 2)])
def test_the_largest_count_that_fits_is_taken(checkpoint, tmp_path, tokens, rung):
    config = freeze_budget(checkpoint, tmp_path / "frozen", tokens)
    assert config.router == {"type": "fixed", "rung": rung} and config.calibration is None
    processor = AutoProcessor.from_pretrained(tmp_path / "frozen")
    assert processor.layout == "expanded" and processor.router == config.router
    assert processor.count_tokens(2) == [config.visual_token_counts[rung]] * 2


def test_of_a_tiled_image_every_view_gets_the_count(tmp_path, capsys):
    source = save(tmp_path / "source", tiling={"type": "anyres"})
    assert main(["freeze-budget", str(source), "--tokens", "9", "--to", str(tmp_path / "frozen")]) == 0
    assert "frozen: 9 visual tokens for every view" in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(tmp_path / "frozen")
    # the whole and 1x2 or 2x2 tiles, with a newline behind each row of these
    assert processor.count_tokens(image_sizes=[(24, 48), (48, 48)]) == [3 * 9 + 1, 5 * 9 + 2]


TILINGS = {
    "sequence": {"type": "anyres", "view_layout": "sequence"},
    "joined": {"type": "anyres", "view_layout": "spatial_unpad"},
    "mosaic": {"type": "mosaic", "n": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(TILINGS))
def test_sizes_alone_tell_the_rows_of_a_tiled_image(name, tmp_path):
    freeze_budget(save(tmp_path / "source", tiling=TILINGS[name]), tmp_path / "frozen", 17)
    model, processor = (
        kind.from_pretrained(tmp_path / "frozen") for kind in (AutoModelForImageTextToText, AutoProcessor)
    )
    images = [picture(seed).resize(size) for seed, size in enumerate([(48, 24), (37, 50), (24, 90)])]
    inputs = processor(images=images, text="<image> and <image>, <image>", return_tensors="pt")
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    rows = [len(row) for row in getattr(features, "pooler_output", features)]
    sizes = [(24, 48), (50, 37), (90, 24)]
    assert processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] == rows
    assert inputs["mm_token_type_ids"].sum() == sum(rows)
    # 9 tokens a view, or 16 of the one map of a mosaic
    expected = {
        "sequence": [3 * 9 + 1, 5 * 9 + 2, 4 * 9 + 3],
        "joined": [9 + 3 * 7, 9 + 6 * 5, 9 + 9 * 4],
        "mosaic": [16] * 3,
    }
    assert rows == expected[name]


def test_everything_but_a_few_entries_is_the_sources_byte_by_byte(checkpoint, tmp_path):
    freeze_budget(checkpoint, tmp_path / "frozen", 9)
    before, after = contents(checkpoint), contents(tmp_path / "frozen")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {CONFIG, PROCESSOR}
    for name, changed in ((CONFIG, {"router", "calibration", "router_training"}), (PROCESSOR, {"router", "layout"})):
        old, new = json.loads(before[name]), json.loads(after[name])
        assert {key for key in old | new if old.get(key) != new.get(key)} == changed
    assert not any(path.samefile(checkpoint / path.name) for path in (tmp_path / "frozen").iterdir())


def test_what_trainers_left_and_what_describes_the_router_is_not_copied(checkpoint, tmp_path):
    source = tmp_path / "source"
    save(source)
    names = ("optimizer.pt", "training_args.bin", "README.md", "calibration_histogram.png", RESULTS, ".hidden")
    for name in names:
        (source / name).write_text("x")
    (source / "checkpoint-10").mkdir()
    (source / "LICENSE").write_text("x")
    freeze_budget(source, tmp_path / "frozen", 9)
    assert {path.name for path in source.iterdir()} - {path.name for path in (tmp_path / "frozen").iterdir()} == {
        *names,
        "checkpoint-10",
    }


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_of_the_former_router_are_left_out(tmp_path, shards):
    source = save(tmp_path / "source", max_shard_size="50GB" if shards == 1 else "80KB")
    files = sorted(source.glob("*.safetensors"))
    assert (len(files) > 2) == (shards == 3)
    # one of the router's tensors stands among others, and with several shards one has a shard to itself
    added = {files[0]: {"model.router.head.weight": torch.ones(3, 5)}}
    if shards == 3:
        added[source / "model-router.safetensors"] = {"model.router.head.bias": torch.ones(3)}
    for file, tensors in added.items():
        save_file((load_file(file) if file.exists() else {}) | tensors, file, {"format": "pt"})
    if shards == 3:
        index = json.loads((source / INDEX).read_text())
        before = dict(index["metadata"])
        index["metadata"]["total_size"] += 18 * 4
        index["metadata"]["total_parameters"] = index["metadata"].get("total_parameters", 0) + 18
        index["weight_map"] |= {name: file.name for file, tensors in added.items() for name in tensors}
        (source / INDEX).write_text(json.dumps(index))

    freeze_budget(source, tmp_path / "frozen", 9)
    left = {name for file in (tmp_path / "frozen").glob("*.safetensors") for name in load_file(file)}
    assert left and not any("router" in name for name in left)
    assert not (tmp_path / "frozen" / "model-router.safetensors").exists()
    for file in files[1:]:
        assert (tmp_path / "frozen" / file.name).read_bytes() == file.read_bytes()
    if shards == 3:
        index = json.loads((tmp_path / "frozen" / INDEX).read_text())
        assert set(index["weight_map"]) == left
        assert {name: index["metadata"][name] for name in before} == before
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "frozen", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = tiny_model("dfmr").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_impossible_requests_are_refused_and_leave_nothing_behind(checkpoint, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"`tokens=3` is below the smallest count .*\[4, 9, 36\]\). Pass at least 4"):
        freeze_budget(checkpoint, tmp_path / "frozen", 3)
    with pytest.raises(ValueError, match="is already there, and nothing is overwritten"):
        freeze_budget(checkpoint, checkpoint, 9)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="has no config.json and no processor_config.json. Pass a folder that"):
        freeze_budget(empty, tmp_path / "frozen", 9)
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="It holds an adapter: merge it first"):
        freeze_budget(empty, tmp_path / "frozen", 9)
    for name in (CONFIG, PROCESSOR):
        (empty / name).write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="holds a 'llava' model. Only adaptive LLaVA models"):
        freeze_budget(empty, tmp_path / "frozen", 9)
    assert main(["freeze-budget", str(checkpoint), "--tokens", "3", "--to", str(tmp_path / "frozen")]) == 2
    assert "freeze-budget: error: `tokens=3` is below" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
