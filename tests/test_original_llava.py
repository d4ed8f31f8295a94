"""`convert` on checkpoints of the LLaVA authors' code base: LLaVA-1.5, LLaVA-NeXT, LLaVA-STF and LLaVA-Mini."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.__main__ import main
from adaptive_llava.modeling.preset_table import PRESETS
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.training.checkpoint_shards import CheckpointFiles
from adaptive_llava.training.convert import convert, describe
from adaptive_llava.training.original_llava import check_stored_positions, fused_windows, original_image_processor
from tests.conftest import tiny_images, tiny_text_config
from tests.fresh_process import run_without_package
from tests.original_checkpoints import (
    ROWS,
    TOWER_PREFIX,
    layers,
    llava_config,
    llava_tensors,
    save_checkpoint,
    save_tower,
    tower_config,
    tower_tensors,
)
from tests.test_convert import LOAD, picture


IMAGE = ROWS  # the id that `<image>` gets
IDS = torch.tensor([[1, 40, IMAGE, 41, 42, 43]])


@pytest.fixture
def tower(tmp_path):
    return save_tower(tmp_path / "tower")


def stock_llava(tensors, **options) -> LlavaForConditionalGeneration:
    """transformers' own LLaVA with the same weights, mapped by hand; one row more for `<image>`."""
    config = LlavaConfig(
        vision_config=tower_config(),
        text_config=tiny_text_config("llama", vocab_size=ROWS + 1, rms_norm_eps=1e-5),
        image_token_index=IMAGE,
        image_seq_length=36,
        **options,
    )
    model = LlavaForConditionalGeneration(config).eval()
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    tower.load_state_dict(tower_tensors())
    language = {
        name.removeprefix("model."): value
        for name, value in tensors.items()
        if name.startswith(("model.layers", "model.norm", "model.embed_tokens"))
    }
    extra = torch.zeros(1, 32)
    language["embed_tokens.weight"] = torch.cat([language["embed_tokens.weight"], extra])
    model.model.language_model.load_state_dict(language)
    model.lm_head.load_state_dict({"weight": torch.cat([tensors["lm_head.weight"], extra])})
    projector = model.model.multi_modal_projector
    for name, layer in (("0", projector.linear_1), ("2", projector.linear_2)):
        layer.load_state_dict({kind: tensors[f"model.mm_projector.{name}.{kind}"] for kind in ("weight", "bias")})
    return model


def inside(tensors):
    """The same with the tower among them, as after training it."""
    return tensors | {TOWER_PREFIX + name: value for name, value in tower_tensors().items()}


@torch.no_grad()
def logits_difference(stock, model, tokens: int = 36) -> float:
    pixels = tiny_images(1)
    wide = torch.tensor([[token for token in IDS[0].tolist() for _ in range(tokens if token == IMAGE else 1)]])
    expected = stock(input_ids=wide, pixel_values=pixels).logits[
        0, [0, 1, tokens + 1, tokens + 2, tokens + 3, tokens + 4]
    ]
    found = model(input_ids=IDS, pixel_values=pixels).logits[0]
    return (found - expected)[:, :ROWS].abs().max().item()


@pytest.mark.compat
@pytest.mark.parametrize(("tower_inside", "pickled", "shards"), [(False, True, 2), (True, False, 3)])
def test_llava_in_its_authors_layout_gives_the_logits_of_the_same_weights(tmp_path, tower_inside, pickled, shards):
    tower = save_tower(tmp_path / "tower", weights=not tower_inside)
    tensors = llava_tensors()
    stored = inside(tensors) if tower_inside else tensors
    source = save_checkpoint(tmp_path / "source", stored, llava_config(tower), shards=shards, pickled=pickled)
    done = convert(source, tmp_path / "ours", max_shard_bytes=40_000)
    assert done.kind == "LLaVA-1.5 in its authors' layout" and done.preset == "llava"
    assert any(f"token <image> as id {IMAGE}" in note for note in done.notes)
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert logits_difference(stock_llava(tensors), model) <= 2e-5
    assert model.config.compressor_trained
    embeddings = model.get_input_embeddings().weight
    assert embeddings.shape[0] == model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == ROWS + 1
    torch.testing.assert_close(embeddings[IMAGE], tensors["model.embed_tokens.weight"].mean(0))
    assert not list((tmp_path / "ours").glob("*.bin")) and len(list((tmp_path / "ours").glob("*.safetensors"))) > 2


@pytest.mark.compat
def test_its_images_and_prompts_are_those_of_the_authors(tmp_path, tower, shared):
    source = save_checkpoint(tmp_path / "source", llava_tensors(), llava_config(tower))
    convert(source, tmp_path / "ours", "dfmr")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    golden = json.loads((shared / "golden" / "llava15" / "prompts.json").read_text())
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == golden["prompts"]["vicuna_v1"]
    inputs = processor(images=picture(size=(48, 30)), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 24, 24) and inputs["image_sizes"].tolist() == [[30, 48]]
    # the strips above and below are of the mean colour, which normalisation makes (about) 0
    assert inputs["pixel_values"][0, :, 0].abs().max() < 0.02 and inputs["pixel_values"][0, :, 12].abs().max() > 0.5
    assert "(4, 9, 36)" in run_without_package(LOAD, tmp_path / "ours", folder=tmp_path)


@pytest.mark.compat
def test_oblong_images_are_laid_on_a_square_as_the_authors_do(tmp_path, shared):
    golden = load_file(shared / "golden" / "anyres" / "preprocess_tiles_uint8.safetensors")
    processor = original_image_processor({"image_aspect_ratio": "pad"}, tmp_path, tower_config())
    mean = np.array([0.48145466, 0.4578275, 0.40821073])  # CLIP's, since the folder names none
    for index in range(5):
        image = Image.fromarray(golden[f"input.image_{index}"].numpy())
        expected = golden[f"output.square_{index}"].numpy()
        side = expected.shape[0]
        plain = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        pixels = processor([image], **plain, image_std=[1.0, 1.0, 1.0])["pixel_values"][0]
        found = (np.asarray(pixels).transpose(1, 2, 0) + mean) * 255
        assert np.abs(found - expected).max() < 1e-3


def test_without_padding_the_middle_is_cut_out(tower):
    processor = original_image_processor({"image_aspect_ratio": "square"}, tower, tower_config())
    wide = Image.new("RGB", (72, 24))
    wide.paste((255, 255, 255), (24, 0, 48, 24))
    pixels = np.asarray(processor([wide])["pixel_values"][0])
    assert pixels.min() == pixels.max(axis=(1, 2)).min()


@pytest.mark.compat
def test_the_authors_projector_keeps_its_outputs(tmp_path, shared):
    golden = load_file(shared / "golden" / "llava15" / "projector_mlp2x_gelu.safetensors")
    weights = {f"model.{name[7:]}": value for name, value in golden.items() if name.startswith("weight.")}
    tower = save_tower(tmp_path / "tower", tower_config(width=8))
    config = llava_config(tower, hidden_size=12, mm_hidden_size=8)
    source = save_checkpoint(tmp_path / "source", llava_tensors(projector=(8, 12, 12)) | weights, config)
    convert(source, tmp_path / "ours")
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        tokens = model.model.multi_modal_projector(golden["input.features"])
    assert (tokens - golden["output.tokens"]).abs().max() <= 1e-5


def test_other_language_models_are_read_by_their_config(tmp_path, tower):
    biases = {f"model.layers.{i}.self_attn.{n}_proj.bias": (32 if n == "q" else 16,) for i in range(2) for n in "qkv"}
    fields = {"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"]}
    source = save_checkpoint(tmp_path / "source", llava_tensors(biases), llava_config(tower, **fields))
    assert convert(source, tmp_path / "ours").config.text_config.model_type == "qwen2"
    template = (tmp_path / "ours" / "chat_template.jinja").read_text()
    assert "<|im_start|>" in template
    source = save_checkpoint(tmp_path / "llama", llava_tensors(biases), llava_config(tower))
    with pytest.raises(
        ValueError, match=r"do not fit its config.json:\n.*without a place.*layers.0.self_attn.k_proj.bias"
    ):
        convert(source, tmp_path / "other")


def test_tied_embeddings_are_written_once(tmp_path, tower):
    tensors = llava_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    config = llava_config(tower, tie_word_embeddings=True)
    convert(save_checkpoint(tmp_path / "tied", tensors, config), tmp_path / "ours")
    model, info = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert model.config.tie_word_embeddings and not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    # tied by the config, but not by the tensors: these count
    convert(save_checkpoint(tmp_path / "apart", llava_tensors(), config), tmp_path / "other")
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "other").eval()
    assert not model.config.tie_word_embeddings
    assert logits_difference(stock_llava(llava_tensors()), model) <= 2e-5


def test_each_tensor_keeps_its_type_unless_another_is_asked_for(tmp_path, tower, capsys):
    tensors = {name: value.to(torch.bfloat16) for name, value in llava_tensors().items()}
    source = save_checkpoint(tmp_path / "source", tensors, llava_config(tower))
    arguments = ["--from", str(source), "--preset", "avg-pool", "--vision-tower", str(tower)]
    for dtype, expected in (("auto", {torch.bfloat16, torch.float32}), ("float16", {torch.float16})):
        target = tmp_path / dtype
        assert main(["convert", *arguments, "--to", str(target), "--dtype", dtype]) == 0
        printed = capsys.readouterr().out
        assert (
            "source       LLaVA-1.5 in its authors' layout" in printed
            and "added        token <image> as id 99" in printed
        )
        stored = CheckpointFiles(target).stored
        assert {tensor.dtype for tensor in stored.values()} == expected
        language = "bfloat16" if dtype == "auto" else dtype
        assert f"(preset 'avg-pool', torch.{language})" in printed
        model = AdaptiveLlavaForConditionalGeneration.from_pretrained(target, dtype="auto")
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, language)}


def test_a_model_without_a_known_prompt_format_is_told_so(tmp_path, tower):
    config = llava_config(tower, model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"])
    done = convert(save_checkpoint(tmp_path / "source", llava_tensors(), config), tmp_path / "ours")
    assert done.config.text_config.model_type == "mistral"
    assert any("chat template: none is known" in line for line in describe(done))


@pytest.mark.compat
def test_a_text_template_of_the_tokenizer_gets_images(tmp_path, tower, shared):
    source = save_checkpoint(tmp_path / "source", llava_tensors(), llava_config(tower, model_type="llava_mistral"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    golden = json.loads((shared / "golden" / "llava15" / "prompts.json").read_text())["prompts"]["mistral_instruct"]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == "<s>" + golden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_vision_tower": None}, r"names no vision tower \(`mm_vision_tower`\). Pass `--vision-tower`"),
        ({"mm_vision_tower": "/nowhere/clip"}, r"`--vision-tower='/nowhere/clip'`: there is no such folder"),
        ({"mm_vision_select_feature": "cls_patch"}, r"keeps the \[CLS\] token among the patches"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"mm_use_im_start_end": True}, "frame images"),
        ({"num_hidden_layers": 3}, r"missing: model.language_model.layers.2"),
        ({"intermediate_size": 48}, r"of another shape: .*down_proj.weight \[32, 64\] instead of \[32, 48\]"),
        ({"vocab_size": 500, "mm_hidden_size": 5}, "its projector reads one patch of width 5, here: 32 numbers"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused(tmp_path, tower, fields, message):
    source = save_checkpoint(tmp_path / "source", llava_tensors(), llava_config(tower) | fields)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.compat
def test_a_tower_can_be_named_and_must_be_clip(tmp_path, tower):
    source = save_checkpoint(tmp_path / "source", llava_tensors(), llava_config("openai/some-clip-tower"))
    with pytest.raises(ValueError, match=r"`--vision-tower='openai/some-clip-tower'` has no config.json"):
        convert(source, tmp_path / "ours")
    convert(source, tmp_path / "ours", vision_tower=tower)
    (tmp_path / "siglip").mkdir()
    (tmp_path / "siglip" / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    with pytest.raises(ValueError, match="'siglip_vision_model'.*CLIP towers only"):
        convert(source, tmp_path / "other", vision_tower=tmp_path / "siglip")


@pytest.mark.parametrize(
    ("reads", "window", "expected"),
    [(4, None, (2, 1)), (2, None, (2, 2)), (9, None, (3, 1)), (8, None, (4, 2)), (4, 4, (4, 4)), (16, 8, (8, 4))],
)
def test_windows_are_told_by_what_the_projector_reads(reads, window, expected):
    assert fused_windows(32 * reads, 32, window) == expected


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match="reads 128 numbers, which is no window of patches of width 32 with `--window 3`"
    ):
        fused_windows(128, 32, 3)
    with pytest.raises(ValueError, match="reads 100 numbers"):
        fused_windows(100, 32)


def on_grid(patches, side: int) -> VisionFeatures:
    return VisionFeatures(patches, (side, side), None, torch.zeros(len(patches), 3, 1, 1), (1,) * len(patches))


def crosslayer(sources: int, width: int = 32) -> dict:
    return layers("model.mm_projector_crosslayer", sources * width, sources * width // 2, width)


needs_spatial_fusion = pytest.mark.skipif("stf-mbtf" not in PRESETS, reason="no spatial fusion here")
needs_llava_mini = pytest.mark.skipif("llava-mini" not in PRESETS, reason="no LLaVA-Mini here")


@pytest.mark.compat
def test_block_fusion_is_converted_with_its_blocks(tmp_path):
    tower = save_tower(tmp_path / "tower", tower_config(layers=8))
    tensors = llava_tensors(crosslayer(8))
    source = save_checkpoint(tmp_path / "source", tensors, llava_config(tower))
    with pytest.raises(
        ValueError, match=r"fuses 8 hidden states.*the authors' 7 are \[7, 6, 5, 4, 3, 2, 1\].*`--fusion-b"
    ):
        convert(source, tmp_path / "ours")
    done = convert(source, tmp_path / "ours", fusion_blocks=[7, 8, 6, 5, 4, 3, 2, 1])
    assert done.kind.startswith("LLaVA-STF (multi-block fusion alone)") and done.preset == "mbtf"
    assert done.config.fusion_blocks == [7, 8, 6, 5, 4, 3, 2, 1] and done.config.compressor_trained
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    fusion = model.model.multi_block_fusion
    assert torch.equal(fusion.linear_1.weight, tensors["model.mm_projector_crosslayer.0.weight"])
    assert torch.equal(fusion.linear_2.bias, tensors["model.mm_projector_crosslayer.2.bias"])


def test_block_fusion_gives_the_authors_features(tmp_path, shared):
    golden = load_file(shared / "golden" / "stf_mbtf" / "stf_mbtf_k2_m1.safetensors")
    weights = {f"model.{name[7:]}": value for name, value in golden.items() if "crosslayer" in name}
    tower = save_tower(tmp_path / "tower", tower_config(width=8, layers=24, side=32))
    config = llava_config(tower, hidden_size=24, mm_hidden_size=8)
    source = save_checkpoint(tmp_path / "source", llava_tensors(projector=(8, 24, 24)) | weights, config)
    done = convert(source, tmp_path / "ours")
    assert done.config.fusion_blocks == [23, 21, 18, 15, 12, 9, 6, 3]
    assert any("assumed" in note and "[23, 21" in note for note in done.notes)
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        fused = model.model.multi_block_fusion(dict(enumerate(golden["input.hidden_states"][:, :, 1:])))
    assert (fused - golden["output.fused"]).abs().max() <= 1e-5


@needs_spatial_fusion
@pytest.mark.compat
def test_llava_stf_gives_the_authors_tokens(tmp_path, shared):
    golden = load_file(shared / "golden" / "stf_mbtf" / "stf_mbtf_k2_m1.safetensors")
    weights = {f"model.{name[7:]}": value for name, value in golden.items() if name.startswith("weight.")}
    tower = save_tower(tmp_path / "tower", tower_config(width=8, layers=24, side=32))
    config = llava_config(tower, hidden_size=24, mm_hidden_size=8)
    source = save_checkpoint(tmp_path / "source", llava_tensors(projector=(32, 128, 24)) | weights, config)
    done = convert(source, tmp_path / "ours")
    assert done.kind == "LLaVA-STF (multi-block and spatial token fusion)" and done.preset == "stf-mbtf"
    assert any("window=2, fused_tokens=1" in note for note in done.notes) and done.config.compressor_trained
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    states = dict(enumerate(golden["input.hidden_states"][:, :, 1:]))
    with torch.no_grad():
        features = on_grid(model.model.multi_block_fusion(states), 8)
        tokens = model.model.compressor.compress(features, 0)
    assert (tokens - golden["output.tokens"]).abs().max() <= 1e-5


@needs_spatial_fusion
def test_spatial_fusion_alone_can_be_told_its_window(tmp_path, tower):
    source = save_checkpoint(tmp_path / "source", llava_tensors(projector=(128, 512, 32)), llava_config(tower))
    assert convert(source, tmp_path / "two").config.compressor["window"] == 2
    done = convert(source, tmp_path / "four", window=4)
    assert (done.preset, done.config.compressor["window"], done.config.compressor["fused_tokens"]) == ("stf", 4, 4)
    assert not any("assumed" in note for note in done.notes)
    with pytest.raises(ValueError, match=r"preset 'stf'. Leave out `--preset=dfmr`"):
        convert(source, tmp_path / "ours", "dfmr")


@needs_llava_mini
@pytest.mark.compat
def test_llava_mini_gives_the_authors_tokens(tmp_path, shared):
    """The golden compressor has 2x2 queries; the golden pre-fusion has two layers of a language model of width 48."""
    golden = load_file(shared / "golden" / "llava_mini" / "compressor_C2.safetensors")
    weights = load_file(shared / "golden" / "llava_mini" / "prefusion_std_inference.safetensors") | golden
    released = {f"model.{name[7:]}": value for name, value in weights.items() if name.startswith("weight.")}
    del released["model.embed_tokens.weight"]
    tensors = inside(llava_tensors(projector=(32, 48, 48)) | released)
    fields = {"model_type": "llava_mini_llama", "compressor_size": 2, "prefusion_layer_num": 2, "hidden_size": 48}
    tower = save_tower(tmp_path / "tower", weights=False)
    source = save_checkpoint(tmp_path / "source", tensors, llava_config(tower, resolution_ratio=1, **fields))
    done = convert(source, tmp_path / "ours", max_shard_bytes=40_000)
    assert (done.kind, done.preset) == ("LLaVA-Mini", "llava-mini")
    assert done.config.visual_token_counts == (4,) and done.config.compressor_trained
    assert (done.config.prefusion_layers, done.config.prefusion_padding) == (2, "released")
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        tokens = model.model.compressor.compress(on_grid(golden["input.features"], 8), 0)
        logits = model(input_ids=IDS, pixel_values=tiny_images(1)).logits
    assert (tokens - golden["output.tokens"]).abs().max() <= 1e-5
    assert logits.isfinite().all()
    prefusion = model.model.modality_prefusion.state_dict()
    layers_only = {name: value for name, value in released.items() if "prefusion_layers" in name}
    assert len(prefusion) == len(layers_only)
    for name, value in layers_only.items():
        found = [own for own in prefusion if own.endswith(name.removeprefix("model.prefusion_"))]
        assert len(found) == 1 and torch.equal(prefusion[found[0]], value)


@pytest.mark.parametrize("shape", [(4, 32), (3, 32)])
def test_positions_that_are_not_llava_minis_own_are_refused(shape):
    with pytest.raises(ValueError, match=r"pos_embed` of shape \(\d, 32\) is not the sine-cosine table"):
        check_stored_positions(torch.zeros(shape))
