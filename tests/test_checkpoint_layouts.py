"""Every kind of LLaVA checkpoint is told by its tensors' names and shapes, or refused with what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig

from adaptive_llava.training.checkpoint_layouts import LAYOUTS, TRANSFORMERS, new_places, recognise
from adaptive_llava.training.checkpoint_plan import SourceTensors, stock_model
from adaptive_llava.training.checkpoint_shards import CheckpointFiles
from adaptive_llava.training.convert import convert
from tests.conftest import IMAGE_TOKEN, tiny_model, tiny_text_config, tiny_vision_config
from tests.original_checkpoints import (
    TOWER_PREFIX,
    decoder_layer,
    language_shapes,
    layers,
    resampler_shapes,
    tower_tensors,
)


pytestmark = pytest.mark.compat

# Vision tower, language model and options of each of transformers' LLaVA models.
STOCK = {
    "Llava": ("clip", "llama", {}),
    "LlavaNext": ("clip", "llama", {"image_grid_pinpoints": [[24, 48], [48, 24]]}),
    "LlavaOnevision": (
        "siglip",
        "qwen2",
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_grid_pinpoints": [[24, 48]]},
    ),
}
KINDS = {
    "Llava": "LLaVA-1.5 in transformers' layout",
    "LlavaNext": "LLaVA-NeXT in transformers' layout",
    "LlavaOnevision": "LLaVA-OneVision in transformers' layout",
}


def stock_checkpoint(name: str, folder):
    vision, text, options = STOCK[name]
    config = getattr(transformers, f"{name}Config")(
        vision_config=tiny_vision_config(vision),
        text_config=tiny_text_config(text),
        image_token_index=IMAGE_TOKEN,
        **options,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", STOCK)
def test_checkpoints_of_transformers_are_recognised_and_fit(tmp_path, name):
    model = stock_checkpoint(name, tmp_path)
    files = CheckpointFiles(tmp_path)
    shapes = {name: tensor.shape for name, tensor in files.stored.items()}
    layout = recognise(shapes, json.loads((tmp_path / "config.json").read_text()))
    assert layout.title == KINDS[name]
    source = SourceTensors(files, layout.rows)
    stock = stock_model(AutoConfig.from_pretrained(tmp_path), source, may_grow=False)
    assert stock.model.language_model.norm.weight.is_meta
    projector, own = (
        stock.model.multi_modal_projector.linear_1.weight,
        model.model.multi_modal_projector.linear_1.weight,
    )
    assert torch.equal(projector, own)
    if name != "Llava":
        assert torch.equal(stock.model.image_newline, model.model.image_newline)


@pytest.mark.parametrize("name", STOCK)
def test_older_and_newer_names_of_a_tensor_have_one_place(name):
    # files of 4.51, modules of 4.57, files of 5.x
    older = ["language_model.model.norm.weight", "language_model.lm_head.weight", "image_newline"]
    older += ["vision_tower.vision_model.embeddings.patch_embedding.weight", "multi_modal_projector.linear_2.bias"]
    newer = ["model.language_model.norm.weight", "lm_head.weight", "model.image_newline"]
    newer += ["model.vision_tower.embeddings.patch_embedding.weight", "model.multi_modal_projector.linear_2.bias"]
    for names in (older, newer):
        assert list(new_places(TRANSFORMERS, dict.fromkeys(names, (2,)))) == newer


def test_our_own_backbones_have_the_places_that_the_tables_name():
    ours = set(tiny_model("mbtf", text="llama").state_dict())
    stored = [
        *language_shapes(),
        *layers("model.mm_projector", 1, 1, 1),
        *(TOWER_PREFIX + name for name in tower_tensors()),
    ]
    stored += layers("model.mm_projector_crosslayer", 1, 1, 1)
    layout = next(layout for layout in LAYOUTS if layout.preset == "mbtf")
    assert set(new_places(layout.rows, dict.fromkeys(stored, (2,)))) == ours


WIDTH = {"mm_hidden_size": 32, "model_type": "llava_llama"}
PLAIN = layers("model.mm_projector", 32, 32, 32)
WINDOWS = layers("model.mm_projector", 128, 512, 32)
CROSSLAYER = layers("model.mm_projector_crosslayer", 64, 32, 32)
MINI = resampler_shapes(1) | decoder_layer("model.prefusion_layers.0") | decoder_layer("model.prefusion_layers.1")


@pytest.mark.parametrize(
    ("shapes", "config", "title", "preset"),
    [
        (PLAIN, WIDTH, "LLaVA-1.5 in its authors' layout", None),
        (PLAIN, WIDTH | {"model_type": "llava"}, "LLaVA-1.5 in its authors' layout", None),
        (PLAIN | {"model.image_newline": (32,)}, WIDTH, "LLaVA-NeXT in its authors' layout", None),
        (WINDOWS, WIDTH, "LLaVA-STF (spatial token fusion alone)", "stf"),
        (PLAIN | CROSSLAYER, WIDTH, "LLaVA-STF (multi-block fusion alone)", "mbtf"),
        (WINDOWS | CROSSLAYER, WIDTH, "LLaVA-STF (multi-block and spatial token fusion)", "stf-mbtf"),
        (PLAIN | MINI, WIDTH | {"model_type": "llava_mini_llama"}, "LLaVA-Mini", "llava-mini"),
    ],
)
def test_checkpoints_of_the_authors_are_told_apart(shapes, config, title, preset):
    tower = {TOWER_PREFIX + name: value.shape for name, value in tower_tensors().items()}
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    for more in ({}, tower, frequencies):
        layout = recognise(language_shapes() | shapes | more, config)
        assert (layout.title, layout.preset, layout.original) == (title, preset, True)
    assert recognise(language_shapes() | shapes | tower, {**config, "mm_hidden_size": None}).title == title


def test_a_joint_input_projection_is_cut_in_three():
    layout = next(layout for layout in LAYOUTS if layout.preset == "llava-mini")
    places = new_places(layout.rows, {"model.compressor.attn.in_proj_weight": (96, 32)})
    assert [(origin.piece, origin.pieces) for origin in places.values()] == [(0, 3), (1, 3), (2, 3)]
    assert [place.split(".")[-2][0] for place in places] == ["q", "k", "v"]


@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        ({}, WIDTH, r"tensors it must have are missing: model.mm_projector.0.weight"),
        (
            PLAIN | {"multi_modal_projector.linear_1.weight": (32, 32)},
            WIDTH,
            r"Nearest is LLaVA-1.5 in its authors' layout, but:\n  tensors it does not have: multi_modal_proj",
        ),
        (
            PLAIN | {f"model.query_abstractor.{index}": (1,) for index in range(20)},
            WIDTH,
            r"tensors it does not have: (model.query_abstractor.\d+, ){8}and 12 more",
        ),
        (
            PLAIN,
            WIDTH | {"model_type": "llava_mpt"},
            "`model_type` llava_llama or llava_mistral or llava_qwen or llava, here: llava_mpt",
        ),
        (layers("model.mm_projector", 80, 320, 32), WIDTH, "reads one patch of width 32, here: 80 numbers"),
        (
            PLAIN | {"lm_head.weight": (9, 32), "model.mm_projector.weight": (32, 32)},
            WIDTH,
            "does not have: model.mm_projector.weight",
        ),
        (
            resampler_shapes(1) | PLAIN,
            WIDTH,
            "LLaVA-Mini, but:\n  tensors it must have are missing: .*prefusion_layers",
        ),
    ],
)
def test_what_fits_no_kind_is_refused_with_a_list(shapes, config, message):
    with pytest.raises(ValueError, match=message) as error:
        recognise(language_shapes() | shapes, config)
    assert "are of no known kind" in str(error.value) and "LLaVA-OneVision in transformers' layout" in str(error.value)


def test_two_names_of_one_place_are_refused():
    shapes = {"multi_modal_projector.linear_1.weight": (32, 32), "lm_head.weight": (9, 9)}
    with pytest.raises(ValueError, match="more than one tensor for the same place: lm_head.weight"):
        recognise(shapes | {"language_model.lm_head.weight": (9, 9)}, {"model_type": "llava"})


def test_a_checkpoint_without_part_of_its_projector_is_refused(tmp_path):
    stock_checkpoint("Llava", tmp_path / "source")
    files = CheckpointFiles(tmp_path / "source")
    kept = {name: files.read(name).clone() for name in files.stored if not name.endswith("linear_2.weight")}
    save_file(kept, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model.multi_modal_projector.linear_2.weight"):
        convert(tmp_path / "source", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    with pytest.raises(ValueError, match=r"brings its vision tower. Leave out `--vision-tower`"):
        convert(tmp_path / "source", tmp_path / "ours", vision_tower=tmp_path)
