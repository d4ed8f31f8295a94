"""Pre-fusion: the authors' own outputs, who sees whom, how it starts and learns, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.encoded_images import EncodedBatch, EncodedImages
from adaptive_llava.modeling.modality_prefusion import LANGUAGE_MODELS, ModalityPrefusion, build_prefusion_rows
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.training.flop_counts import prefusion_flops, vision_tower_flops
from adaptive_llava.training.golden_parity import mini_batch, released_mini
from tests.conftest import (
    IMAGE_TOKEN,
    batch_rows,
    tiny_images,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)


pytestmark = pytest.mark.compat

IMG = IMAGE_TOKEN
ROWS = [[5, IMG, 6, 7], [8, IMG, 9, 10, IMG, 11, 12], [13, 14, 15], [IMG, 16, 17]]
IMAGES_OF_ROW = [[0], [1, 2], [], [3]]


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


# ---- the authors' own outputs


@pytest.mark.parametrize("case", ["inference", "training_labels"])
@torch.no_grad()
def test_padding_by_id_is_what_llava_mini_was_trained_with(shared, case):
    golden = load_file(shared / "golden" / "llava_mini" / f"prefusion_std_{case}.safetensors")
    model = released_mini(golden)
    batch = mini_batch(model, golden)
    text, _ = model.model.fuse_modalities(model.get_input_embeddings()(batch.input_ids), batch)
    assert largest(text - golden["output.text"]) <= 1e-5
    # the rule for id 0 matters here: without it the zeros at the end of row 1 are text
    model.config.prefusion_padding = "attention_mask"
    attended, _ = model.model.fuse_modalities(model.get_input_embeddings()(batch.input_ids), batch)
    assert largest((attended - golden["output.text"])[1, -1]) > 0.1


# ---- who stands where


def batch_of(ids, lengths, patch_lengths, *, compact=True, mask=None, positions=None) -> EncodedBatch:
    images = len(lengths)
    encoded = EncodedImages(
        torch.zeros(sum(lengths), 1), lengths, (0,) * images, torch.zeros(images), (1,) * images,
        torch.zeros(sum(patch_lengths), 1), patch_lengths,
    )  # fmt: skip
    return EncodedBatch(torch.tensor(ids), mask, positions, encoded, compact)


def rows_of(batch, instruction=None, attended=None):
    every = torch.ones_like(batch.input_ids, dtype=torch.bool)
    instruction = every if instruction is None else torch.tensor(instruction).bool()
    attended = every if attended is None else torch.tensor(attended).bool()
    return build_prefusion_rows(batch, IMG, instruction, attended)


def test_a_row_holds_patches_then_visual_tokens_then_instruction():
    # two patches an image (0-5), tokens 1 + 2 + 1 (6-9), then ids of both rows (10-13 and 14-17)
    batch = batch_of([[5, IMG, 6, 7], [8, IMG, 9, IMG]], (1, 2, 1), (2, 2, 2))
    rows = rows_of(batch, instruction=[[1, 1, 1, 0], [1, 1, 1, 1]])
    assert rows.source.tolist() == [
        [0, 1, 6, 10, 12, 0, 0, 0, 0],  # 7 is an answer
        [2, 3, 4, 5, 7, 8, 9, 14, 16],
    ]
    assert rows.attention_mask.tolist() == [[1] * 5 + [0] * 4, [1] * 9]
    slots, places = rows.leaving(6)
    assert slots.tolist() == [2, 3, 4, 13, 14, 15, 16, 17]
    assert places.tolist() == [0, 4, 6, 1, 2, 3, 8, 10]


def test_expanded_rows_hold_what_compact_rows_hold():
    # one placeholder per token: 5 [6] 6 and 8 [7 8] [9]
    batch = batch_of([[5, IMG, 6, 0], [8, IMG, IMG, IMG]], (1, 2, 1), (1, 1, 1), compact=False)
    rows = rows_of(batch, attended=[[1, 1, 1, 0], [1, 1, 1, 1]])
    assert rows.source.tolist() == [[0, 3, 7, 9, 0, 0], [1, 2, 4, 5, 6, 11]]


def test_rows_without_images_and_images_without_attention_are_left_out():
    batch = batch_of([[5, 6, 7], [8, IMG, 9], [IMG, 10, IMG]], (1, 1, 1), (1, 1, 1))
    rows = rows_of(batch, attended=[[1, 1, 1], [1, 1, 1], [0, 1, 1]])
    assert rows.source.tolist() == [[0, 3, 9, 11], [2, 5, 13, 0]]
    assert rows_of(batch_of([[5, 6]], (), ())).source.numel() == 0


def test_packed_segments_are_rows_of_their_own():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    ids = [[5, IMG, 6, 7, 8, IMG, 9]]
    rows = rows_of(batch_of(ids, (1, 1), (1, 1), positions=positions))
    assert rows.source.tolist() == [[0, 2, 4, 6], [1, 3, 10, 0]]  # the segment 7, 8 has no image
    # a mask says that positions starting again are padding, as everywhere in this package
    whole = rows_of(batch_of(ids, (1, 1), (1, 1), positions=positions, mask=torch.ones(1, 7)))
    assert len(whole.source) == 1


@torch.no_grad()
def test_leaving_text_out_equals_masking_it_with_positions_that_count_the_rest():
    # as the authors do it: the whole row goes in, answers and placeholders are masked keys, positions skip them
    model = tiny_model("avg-pool", prefusion_layers=2)
    ids, instruction = torch.tensor([ROWS[1]]), torch.tensor([[1, 0, 1, 0, 0, 1, 1]]).bool()
    encoded = model.encode_images(tiny_images(2))
    embeddings = model.get_input_embeddings()(ids)
    whole = torch.cat([encoded.patches, encoded.values, embeddings[0]]).unsqueeze(0)
    mask = torch.cat([torch.ones(1, 90, dtype=torch.long), instruction.long()], dim=1)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    expected = model.model.modality_prefusion.decoder(
        inputs_embeds=whole, attention_mask=mask, position_ids=positions
    ).last_hidden_state[0]
    batch = EncodedBatch(ids, None, None, encoded, True, instruction)
    text, visual = model.model.fuse_modalities(embeddings, batch)
    assert largest(visual - expected[72:90]) <= 1e-5
    assert largest((text[0] - expected[90:])[instruction[0]]) <= 1e-5
    assert torch.equal(text[~instruction], embeddings[~instruction])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_what_is_fused_in_a_row_does_not_depend_on_its_companions(side):
    model, pixels = tiny_model("pre-fusion"), tiny_images(4)
    ids, mask = batch_rows(ROWS, side)
    encoded = model.encode_images(pixels)
    embeddings = model.get_input_embeddings()(ids)
    text, visual = model.model.fuse_modalities(embeddings, EncodedBatch(ids, mask, None, encoded, True))
    tokens = visual.split(encoded.lengths)
    assert torch.equal(text[2], embeddings[2])  # no image, nothing fused
    for row, images in enumerate(IMAGES_OF_ROW):
        alone = torch.tensor([ROWS[row]])
        batch = EncodedBatch(alone, None, None, encoded.select(images), True)
        own_text, own_visual = model.model.fuse_modalities(model.get_input_embeddings()(alone), batch)
        assert largest(text[row][mask[row].bool()] - own_text[0]) <= 1e-5
        if images:
            assert largest(torch.cat([tokens[image] for image in images]) - own_visual) <= 1e-5
            assert largest(own_text - model.get_input_embeddings()(alone)) > 0.1


@torch.no_grad()
def test_visual_tokens_stay_out_as_the_paper_says_it():
    model, ids = tiny_model("avg-pool", prefusion_layers=2, prefusion_variant="paper"), torch.tensor([ROWS[0]])
    encoded, embeddings = model.encode_images(tiny_images(1)), model.get_input_embeddings()(torch.tensor([ROWS[0]]))
    text, visual = model.model.fuse_modalities(embeddings, EncodedBatch(ids, None, None, encoded, True))
    assert torch.equal(visual, encoded.values)
    row = torch.cat([encoded.patches, embeddings[0, [0, 2, 3]]]).unsqueeze(0)
    expected = model.model.modality_prefusion.decoder(inputs_embeds=row).last_hidden_state[0, 36:]
    assert largest(text[0, [0, 2, 3]] - expected) <= 1e-5
    # training goes on where nothing is instruction, and every layer still joins with weight 0
    with torch.enable_grad():
        model.train()(input_ids=ids, pixel_values=tiny_images(1), labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.modality_prefusion.parameters())


@torch.no_grad()
def test_the_overview_beside_a_mosaic_stands_behind_its_patches():
    model = tiny_model("avg-pool", prefusion_layers=1)
    features = model.model.extract_features(tiny_images(2))
    alone = model.model._compress(features, model.model.router(features), [0, 0])
    assert alone.patch_lengths == (36, 36)
    features = replace(features, overview=features.patches[:, :5] + 1)
    both = model.model._compress(features, model.model.router(features), [0, 0])
    assert both.patch_lengths == (41, 41) and both.lengths == (9, 9)
    overview = model.model.multi_modal_projector(features.overview)
    first, second = both.patches.split(both.patch_lengths)
    assert torch.allclose(first, torch.cat([alone.patches[:36], overview[0]]), atol=1e-6)
    assert torch.allclose(second, torch.cat([alone.patches[36:], overview[1]]), atol=1e-6)
    assert torch.equal(both.select([1]).patches, second) and both.select([]).patch_lengths == ()
    assert torch.equal(features.select([1]).overview, features.overview[1:])


def test_views_of_one_image_stand_together_in_view_order():
    model = tiny_model("avg-pool", prefusion_layers=1)
    with torch.no_grad():
        features = replace(model.model.extract_features(tiny_images(3)), views_per_image=(2, 1))
        encoded = model.model._compress(features, model.model.router(features), [0, 0, 0])
        assert encoded.patch_lengths == (72, 36)
        assert torch.allclose(
            encoded.patches, model.model.multi_modal_projector(features.patches).flatten(0, 1), atol=1e-6
        )


# ---- how it starts and learns


def kind_of_text_config(kind: str, **options):
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, "head_dim": 8, "eos_token_id": 2,
        "bos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "qwen3_moe":
        shape |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return AutoConfig.for_model(kind, **(shape | options))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_new_layers_of_every_kind_change_nothing_and_learn_from_the_second_step_on(kind):
    torch.manual_seed(0)
    config = AdaptiveLlavaConfig(
        vision_config=tiny_vision_config(), text_config=kind_of_text_config(kind), image_token_id=IMG,
        compressor={"type": "average_pool", "factors": [2]}, prefusion_layers=2,
    )  # fmt: skip
    model = AdaptiveLlavaForConditionalGeneration(config).train()
    for parameter in model.model.multi_modal_projector.parameters():
        nn.init.normal_(parameter, std=0.3)
    fusion, pixels = model.model.modality_prefusion, tiny_images(2)
    ids = torch.tensor([[5, IMG, 6, 7], [8, 9, IMG, 10]])
    labels = torch.tensor([[-100, -100, -100, 7], [-100, -100, -100, 10]])
    model.model.modality_prefusion = None
    expected = model(input_ids=ids, pixel_values=pixels, labels=labels).logits
    model.model.modality_prefusion = fusion
    assert largest(model(input_ids=ids, pixel_values=pixels, labels=labels).logits - expected) <= 1e-6

    assert not any(name.startswith(("embed", "norm")) for name, _ in fusion.decoder.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in fusion.named_parameters()}
    optimizer = torch.optim.SGD(fusion.parameters(), lr=1.0)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
        moved.append({name for name, value in fusion.named_parameters() if not torch.equal(value, before[name])})
    outputs = {name for name in before if "o_proj" in name or "down_proj" in name}
    assert moved[0] <= outputs
    # softmax does not see a shift of all keys, and a layer's own query and key may round to nothing
    assert {name for name in before if "k_proj.bias" not in name} <= moved[1]


def test_from_llava_starts_with_the_answers_of_the_source():
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tiny_vision_config(), text_config=tiny_text_config(), image_token_index=IMG,
        tie_word_embeddings=False,
    )  # fmt: skip
    stock = LlavaForConditionalGeneration(config).eval()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.25)
    plain = AdaptiveLlavaForConditionalGeneration.from_llava(stock, "avg-pool")
    model = AdaptiveLlavaForConditionalGeneration.from_llava(stock, "avg-pool", prefusion_layers=4)
    assert model.config.prefusion_layers == 4 and model.config.compressor_trained
    inputs = {"input_ids": torch.tensor([[5, IMG, 6]]), "pixel_values": tiny_images(1)}
    with torch.no_grad():
        assert largest(model(**inputs).logits - plain(**inputs).logits) <= 1e-5


def test_new_layers_take_the_precision_of_the_language_model_but_keep_exact_positions():
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=tiny_vision_config(), text_config=tiny_text_config(), image_token_index=IMG)
    stock = LlavaForConditionalGeneration(config)
    for parameter in stock.parameters():
        parameter.data = parameter.data.bfloat16()
    model = AdaptiveLlavaForConditionalGeneration.from_llava(stock, "avg-pool", prefusion_layers=1)
    fusion, language_model = model.model.modality_prefusion, model.model.language_model
    assert {parameter.dtype for parameter in fusion.parameters()} == {torch.bfloat16}
    assert fusion.decoder.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(fusion.decoder.rotary_emb.inv_freq, language_model.rotary_emb.inv_freq)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, IMG, 6]]), pixel_values=tiny_images(1)).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_gradients_pass_through_patches_and_tokens_but_not_into_embeddings():
    model, ids = tiny_model("avg-pool", prefusion_layers=2).train(), torch.tensor([[5, IMG, 6, 7]])
    encoded = model.encode_images(tiny_images(1))
    encoded = replace(encoded, patches=encoded.patches.detach(), values=encoded.values.detach())
    for tensor in (encoded.patches, encoded.values):
        tensor.requires_grad_(True)
    text = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    instruction = torch.tensor([[True, True, True, False]])
    fused, visual = model.model.fuse_modalities(text, EncodedBatch(ids, None, None, encoded, True, instruction))
    (fused.square().sum() + visual.square().sum()).backward()
    assert (encoded.patches.grad.abs().sum(1) > 0).all() and (encoded.values.grad.abs().sum(1) > 0).all()
    assert (text.grad[0].abs().sum(1) > 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient_where_text_is_fused(reentrant):
    ids, mask = batch_rows(ROWS, "left")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-2] = -100
    found = []
    for checkpointing in (False, True):
        model = tiny_model("pre-fusion").train()
        model.model.vision_tower.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            assert model.model.modality_prefusion.decoder.gradient_checkpointing
        model(input_ids=ids, attention_mask=mask, pixel_values=tiny_images(4), labels=labels).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("modality_prefusion" in name for name in found[0])
    for name in found[0]:
        assert largest(found[0][name] - found[1][name]) <= 1e-5, name


# ---- which text is instruction


def training_inputs():
    ids = torch.tensor([[5, IMG, 6, 7], [IMG, 8, 9, 10]])
    return {"input_ids": ids, "pixel_values": tiny_images(2)}


def test_text_without_label_is_the_instruction(caplog):
    transformers.utils.logging.warning_once.cache_clear()
    model, inputs = tiny_model("pre-fusion").train(), training_inputs()
    labels = inputs["input_ids"].clone()
    labels[:, :3] = -100
    marked = (labels == -100) & (inputs["input_ids"] != IMG)
    with torch.no_grad():
        by_labels = model(**inputs, labels=labels).logits
        by_mask = model(**inputs, instruction_mask=marked).logits
        by_numbers = model(**inputs, instruction_mask=marked.long()).logits
        assert "Pre-fusion takes all text" not in caplog.text
        whole = model(**inputs).logits
    assert "Pre-fusion takes all text for instruction, answers too" in caplog.text
    assert torch.equal(by_labels, by_mask) and torch.equal(by_mask, by_numbers)
    assert largest(by_mask - whole) > 1e-2
    caplog.clear()
    transformers.utils.logging.warning_once.cache_clear()
    with torch.no_grad():
        model.eval()(**inputs)
        tiny_model("dfmr").train()(**inputs, instruction_mask=marked)
    assert "Pre-fusion" not in caplog.text


def test_an_answer_does_not_change_what_stands_before_it():
    # causal: were an answer fused, or seen, the text before it would give it away
    model, inputs = tiny_model("pre-fusion"), training_inputs()
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -1] = 40
    for options in ({}, {"instruction_mask": torch.tensor([[1, 1, 1, 0]] * 2)}):
        with torch.no_grad():
            one, two = model(**inputs, **options).logits, model(**other, **options).logits
        assert largest((one - two)[:, :-1]) <= 1e-6


def test_a_zero_that_is_attended_is_text_unless_the_released_rule_is_asked_for():
    pixels, found = tiny_images(1), {}
    for padding in ("attention_mask", "released"):
        model = tiny_model("avg-pool", prefusion_layers=2, prefusion_padding=padding)
        embeddings = model.get_input_embeddings()
        for ids in ([5, 0, IMG, 6], [5, 30, IMG, 6]):
            row = torch.tensor([ids])
            batch = EncodedBatch(row, None, None, model.encode_images(pixels), True)
            with torch.no_grad():
                found[padding, ids[1]] = model.model.fuse_modalities(embeddings(row), batch)[0] - embeddings(row)
    assert largest(found["released", 0][0, 1]) == 0 and largest(found["attention_mask", 0][0, 1]) > 0.1
    assert largest(found["released", 30] - found["attention_mask", 30]) == 0


def test_masks_of_a_shape_that_cannot_be_read_are_refused():
    model, inputs = tiny_model("pre-fusion"), training_inputs()
    with pytest.raises(ValueError, match=r"`instruction_mask` has shape \(2, 3\) for ids of shape \(2, 4\). Pass one"):
        model(**inputs, instruction_mask=torch.ones(2, 3))
    model = tiny_model("avg-pool", prefusion_layers=1)
    expanded = {"input_ids": torch.tensor([[IMG] * 9 + [5]]), "pixel_values": tiny_images(1)}
    with pytest.raises(ValueError, match=r"`attention_mask` has 4 dimensions; pre-fusion reads from it"):
        model(**expanded, attention_mask=torch.ones(1, 1, 10, 10))


# ---- layers of the language model's kind


def test_layers_follow_the_language_models_attention_and_have_no_window():
    model, inputs = tiny_model("pre-fusion"), training_inputs()
    decoder = model.model.modality_prefusion.decoder
    with torch.no_grad():
        sdpa = model(**inputs).logits
        for attention in ("eager", "sdpa", "eager"):  # 4.57 on its own stops after the first
            model.set_attn_implementation(attention)
            assert decoder.config._attn_implementation == attention
        assert largest(model(**inputs).logits - sdpa) <= 5e-5
    text = kind_of_text_config("qwen2", use_sliding_window=True, sliding_window=2, max_window_layers=1)
    assert "sliding_attention" in text.layer_types
    windowed = ModalityPrefusion(text, 5).decoder.config
    assert windowed.layer_types == ["full_attention"] * 5 and windowed.sliding_window is None
    assert text.num_hidden_layers == 3 and text.sliding_window == 2 and text.vocab_size == 100
    assert ModalityPrefusion(kind_of_text_config("mistral", sliding_window=2), 1).decoder.config.sliding_window is None


def test_embeddings_may_grow_and_be_tied_beside_pre_fusion(tmp_path):
    model, inputs = tiny_model("pre-fusion", tie_word_embeddings=True), training_inputs()
    model.resize_token_embeddings(110)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        again = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(again(**inputs).logits, expected)
    assert again.config.prefusion_layers == 2 and again.config.prefusion_padding == "attention_mask"
    assert again.lm_head.weight is again.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefusion_layers": -1}, r"`prefusion_layers=-1` must be a whole number of layers, up to 1000; 0 is none"),
        ({"prefusion_layers": 2.0}, r"`prefusion_layers=2.0` must be a whole number"),
        ({"prefusion_layers": True}, r"`prefusion_layers=True` must be a whole number"),
        ({"prefusion_variant": "both"}, r"`prefusion_variant='both'` is unknown. Pass one of: released, paper"),
        ({"prefusion_padding": "ids"}, r"`prefusion_padding='ids'` is unknown. Pass one of: attention_mask, released"),
        (
            {"prefusion_layers": 2, "compressor": {"type": "token_concat", "window": 2}},
            r"behind the compressor 'token_concat' takes no patches \(it reads 128 channels where a patch has 32\)",
        ),
        (
            {"prefusion_layers": 2, "text_config": AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4)},
            r"those of 'gpt2' are not known to work on their own. Use one of llama, mistral",
        ),
        (
            {"prefusion_layers": 1, "text_config": AutoConfig.for_model("gemma", hidden_size=32, num_hidden_layers=2)},
            r"those of 'gemma' are not known",
        ),
    ],
)
def test_a_pre_fusion_that_cannot_be_built_is_refused_by_the_config(fields, message):
    backbones = {"vision_config": tiny_vision_config(), "text_config": tiny_text_config()}
    with pytest.raises(ValueError, match=message):
        AdaptiveLlavaConfig(**(backbones | {"image_token_id": IMG} | fields))


def test_a_compressor_that_projects_is_refused(monkeypatch):
    from adaptive_llava.modeling.compressor_identity import IdentityCompressor

    monkeypatch.setattr(IdentityCompressor, "projects", True)
    with pytest.raises(ValueError, match=r"takes no patches \(it is part of the compressor\)"):
        AdaptiveLlavaConfig(
            vision_config=tiny_vision_config(), text_config=tiny_text_config(), prefusion_layers=1, image_token_id=IMG
        )


def test_any_tower_gives_patches_to_pre_fusion():
    model = tiny_model("avg-pool", vision="siglip", prefusion_layers=1)
    assert isinstance(model.config.vision_config, SiglipVisionConfig)
    with torch.no_grad():
        features = model.model.extract_features(tiny_images(1))
        assert isinstance(features, VisionFeatures)
        assert model(**{k: v[:1] for k, v in training_inputs().items()}).logits.isfinite().all()


# ---- what it costs


def test_four_layers_at_7b_cost_more_than_twice_the_vision_tower():
    config = AdaptiveLlavaConfig()  # CLIP-L/336 and LLaMA-7B
    layers = prefusion_flops(config.text_config, 4, patches=576, tokens=1 + 40)
    ratio = layers / vision_tower_flops(config.vision_config)
    print(f"pre-fusion, 4 layers of LLaMA-7B over 576 patches, 1 token and 40 ids: {ratio:.2f} CLIP-L/336 towers")
    assert 2.5 < ratio < 2.8


def test_flops_of_pre_fusion_equal_those_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("avg-pool", prefusion_layers=2)
    model.set_attn_implementation("eager")  # the counter misses some attention kernels of a CPU
    batch = batch_of([[5, IMG, 6]], (9,), (36,))
    rows = rows_of(batch)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.modality_prefusion(torch.randn(36, 32), torch.randn(9, 32), torch.randn(1, 3, 32), rows)
    expected = prefusion_flops(model.config.text_config, 2, patches=36, tokens=9 + 2)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
