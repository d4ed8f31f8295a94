"""`convert` on LLaVA-NeXT and LLaVA-OneVision, in transformers' layout and in the authors'."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoImageProcessor, AutoProcessor

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration
from adaptive_llava.training.checkpoint_shards import CheckpointFiles
from adaptive_llava.training.convert import convert
from adaptive_llava.training.original_llava import stock_config
from tests.conftest import IMAGE_TOKEN
from tests.original_checkpoints import (
    ROWS,
    llava_config,
    llava_tensors,
    save_checkpoint,
    save_tower,
    tower_config,
)
from tests.test_checkpoint_layouts import stock_checkpoint
from tests.test_convert import character_tokenizer, picture


pytestmark = pytest.mark.compat

needs_tiling = pytest.mark.skipif(not hasattr(AdaptiveLlavaConfig(), "tiling"), reason="no tiling here")
TILED = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[24, 48], [72, 24]],
}


def image_processor(name: str):
    found = getattr(transformers, name + "Pil", None) or getattr(transformers, name)
    sizes = {"size": {"height": 24, "width": 24}, "image_grid_pinpoints": [[24, 48], [48, 24]]}
    if name == "LlavaNextImageProcessor":
        sizes |= {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return found(**sizes)


@needs_tiling
@pytest.mark.parametrize("preset", ["llava", "avg-pool", "dfmr"])
@pytest.mark.parametrize("name", ["LlavaNext", "LlavaOnevision"])
def test_a_conversion_equals_the_model_made_in_memory(tmp_path, name, preset):
    stock = stock_checkpoint(name, tmp_path / "source")
    character_tokenizer().save_pretrained(tmp_path / "source")
    images = image_processor(f"{name}ImageProcessor")
    images.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", preset, max_shard_bytes=50_000)
    expected = AdaptiveLlavaForConditionalGeneration.from_llava(stock, preset=preset)
    found = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert found.config.tiling == expected.config.tiling and found.config.compressor_trained
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
    inputs = AutoProcessor.from_pretrained(tmp_path / "ours")(picture(size=(60, 20)), "<image>", return_tensors="pt")
    own = AutoImageProcessor.from_pretrained(tmp_path / "source")(picture(size=(60, 20)), return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], own["pixel_values"])
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == 1


def test_the_authors_sizes_become_heights_and_widths():
    config = stock_config(llava_config("tower", **TILED), tower_config(), AdaptiveLlavaConfig().text_config, 9)
    assert config.model_type == "llava_next" and config.image_grid_pinpoints == [[48, 24], [24, 72]]
    with pytest.raises(ValueError, match=r"`image_grid_pinpoints='\(1x1\),.*'` in config.json is no list of sizes"):
        stock_config({**TILED, "image_grid_pinpoints": "(1x1),..."}, tower_config(), None, 9)
    for fields in ({"mm_patch_merge_type": "flat"}, {"image_aspect_ratio": "anyres_max_9"}):
        with pytest.raises(
            ValueError, match=r"is unknown here. Known are plain images, and 'anyres' with 'spatial_unpad'"
        ):
            stock_config({**TILED, **fields}, tower_config(), None, 9)


@needs_tiling
def test_llava_next_in_its_authors_layout_keeps_newline_and_sizes(tmp_path):
    tower = save_tower(tmp_path / "tower")
    tensors = llava_tensors({"model.image_newline": (32,)})
    done = convert(save_checkpoint(tmp_path / "source", tensors, llava_config(tower, **TILED)), tmp_path / "ours")
    assert done.kind == "LLaVA-NeXT in its authors' layout"
    assert done.config.tiling["pinpoints"] == [[48, 24], [24, 72]]
    stored = CheckpointFiles(tmp_path / "ours")
    (newline,) = [name for name in stored.stored if name.endswith("image_newline")]
    assert torch.equal(stored.read(newline), tensors["model.image_newline"])
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    inputs = processor(picture(size=(60, 20)), "<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 4, 3, 24, 24) and (inputs["input_ids"] == ROWS).sum() == 1
    with torch.no_grad():
        outputs = model(**inputs)
    # the tiles form a 6x18 map, all of which the image covers, with a newline after each row; the whole image is first
    assert outputs.logits.isfinite().all() and outputs.num_visual_tokens.tolist() == [36 + 6 * 19]


def test_newline_and_config_must_agree(tmp_path):
    tower = save_tower(tmp_path / "tower")
    source = save_checkpoint(tmp_path / "source", llava_tensors({"model.image_newline": (32,)}), llava_config(tower))
    with pytest.raises(
        ValueError, match=r"without a place in the model that its config describes: model.image_newline"
    ):
        convert(source, tmp_path / "ours")
