"""The forward pass: aligned with `input_ids`, equal to LLaVA, independent of batch, layout and padding."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaModel
from adaptive_llava.modeling.backbone_assembly import OWN_PARTS
from tests.conftest import (
    IMAGE_TOKEN,
    MODELS_HERE,
    TINY_ROUTERS,
    batch_rows,
    tiny_images,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)


pytestmark = pytest.mark.compat

IMG = IMAGE_TOKEN
# one image; two images in two turns; text alone; an image in front; an image at the end
ROWS = [[5, IMG, 6, 7], [8, IMG, 9, 10, IMG, 11, 12], [13, 14, 15], [IMG, 16, 17], [18, 19, IMG]]
IMAGES_OF_ROW = [[0], [1, 2], [], [3], [4]]
every_preset = pytest.mark.parametrize("preset", MODELS_HERE)
both_sides = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(autouse=True)
def gradients_only_where_tested(request):
    with torch.set_grad_enabled("gradient" in request.node.name or "training" in request.node.name):
        yield


def stock_llava(text: str = "qwen2", **options) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tiny_vision_config(),
        text_config=tiny_text_config(text),
        image_token_index=IMG,
        image_seq_length=36,
        tie_word_embeddings=False,
        **options,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = None
    return model


def expand(rows: list[list[int]], lengths) -> list[list[int]]:
    counts = iter(lengths)
    return [[slot for token in row for slot in [token] * (next(counts) if token == IMG else 1)] for row in rows]


def last_slots(row: list[int], lengths) -> list[int]:
    """For each id of a compact row its last slot in the expanded row."""
    counts, slots, end = iter(lengths), [], 0
    for token in row:
        end += next(counts) if token == IMG else 1
        slots.append(end - 1)
    return slots


def row_alone(model, row: int, pixels, **kwargs):
    images = IMAGES_OF_ROW[row]
    inputs = {"pixel_values": pixels[images]} if images else {}
    return model(input_ids=torch.tensor([ROWS[row]]), **inputs, **kwargs).logits[0]


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


@pytest.mark.parametrize("text", ["qwen2", "llama"])
@both_sides
def test_identity_equals_llava_with_the_same_weights(text, side):
    stock, pixels = stock_llava(text), tiny_images(5)
    model = AdaptiveLlavaForConditionalGeneration.from_llava(stock)
    ids, mask = batch_rows(ROWS, side)
    wide_ids, wide_mask = batch_rows(expand(ROWS, [36] * 5), side)
    expected = stock(input_ids=wide_ids, attention_mask=wide_mask, pixel_values=pixels).logits
    compact = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    wide = model(input_ids=wide_ids, attention_mask=wide_mask, pixel_values=pixels).logits
    assert largest((wide - expected)[wide_mask.bool()]) <= 2e-5
    for row, images in enumerate(IMAGES_OF_ROW):
        slots = last_slots(ROWS[row], [36] * len(images))
        assert largest(expected[row][wide_mask[row].bool()][slots] - compact[row][mask[row].bool()]) <= 2e-5


def test_the_state_at_a_placeholder_is_that_of_the_last_visual_token():
    model, pixels = tiny_model("avg-pool"), tiny_images(1)
    encoded = model.encode_images(pixels)
    embed = model.get_input_embeddings()
    rows = torch.cat([embed(torch.tensor([5])), encoded.values, embed(torch.tensor([6, 7]))]).unsqueeze(0)
    states = model.model.language_model(inputs_embeds=rows, output_hidden_states=True)
    aligned = model.model(input_ids=torch.tensor([[5, IMG, 6, 7]]), pixel_values=pixels, output_hidden_states=True)
    assert largest(aligned.last_hidden_state - states.last_hidden_state[:, [0, 9, 10, 11]]) <= 1e-5
    assert len(aligned.hidden_states) == len(states.hidden_states) == 3
    for mine, theirs in zip(aligned.hidden_states, states.hidden_states, strict=True):
        assert mine.shape == (1, 4, 32)
        assert largest(mine - theirs[:, [0, 9, 10, 11]]) <= 1e-5


@every_preset
def test_rows_need_no_mask_where_nothing_is_padded(preset):
    model, pixels = tiny_model(preset), tiny_images(3)
    rows = [[5, IMG, 6, 7, 8], [9, IMG, 10, IMG, 11]]
    without = model(input_ids=torch.tensor(rows), pixel_values=pixels)
    ones = model(input_ids=torch.tensor(rows), attention_mask=torch.ones(2, 5), pixel_values=pixels)
    assert largest(without.logits - ones.logits) <= 1e-5
    first = model(input_ids=torch.tensor(rows[:1]), pixel_values=pixels[:1])
    assert largest(without.logits[:1] - first.logits) <= 1e-4


def packed(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One row that holds all rows, with positions that start again."""
    return torch.tensor([[token for row in rows for token in row]]), torch.tensor(
        [[p for row in rows for p in range(len(row))]]
    )


def test_packed_rows_of_several_lengths_in_one_batch_equal_separate_rows():
    model, pixels = tiny_model("dfmr"), tiny_images(5)
    # row 0 packs rows 0 and 2, row 1 packs row 1 alone: 7 ids each
    ids = torch.tensor([ROWS[0] + ROWS[2], ROWS[1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], list(range(7))])
    logits = model(input_ids=ids, position_ids=positions, pixel_values=pixels[:3]).logits
    assert largest(logits[0, :4] - row_alone(model, 0, pixels)) <= 1e-4
    assert largest(logits[0, 4:] - row_alone(model, 2, pixels)) <= 1e-4
    assert largest(logits[1] - row_alone(model, 1, pixels)) <= 1e-4


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}])
def test_packed_expanded_rows_equal_separate_rows(arguments):
    model, pixels = tiny_model("avg-pool"), tiny_images(5)
    ids, positions = packed(expand(ROWS, [9] * 5))
    logits = model(input_ids=ids, position_ids=positions, pixel_values=pixels, **arguments).logits[0]
    pieces = logits.split([len(row) for row in expand(ROWS, [9] * 5)])
    for row, piece in enumerate(pieces):
        slots = last_slots(ROWS[row], [9] * len(IMAGES_OF_ROW[row]))
        assert largest(piece[slots] - row_alone(model, row, pixels)) <= 1e-4


@both_sides
def test_positions_given_beside_a_mask_change_nothing_where_they_count_up(side):
    model, pixels = tiny_model("dfmr"), tiny_images(5)
    ids, mask = batch_rows(ROWS, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    given = model(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels).logits
    assert largest((given - expected)[mask.bool()]) <= 1e-5


@every_preset
def test_masked_ids_inside_a_row_are_as_good_as_absent(preset):
    model, pixels = tiny_model(preset), tiny_images(2)
    whole = torch.tensor([[5, IMG, 6, 40, 41, 7, IMG, 8]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    expected = model(input_ids=whole[mask.bool()].unsqueeze(0), pixel_values=pixels)
    compact = model(input_ids=whole, attention_mask=mask, pixel_values=pixels)
    assert largest(compact.logits[mask.bool()] - expected.logits[0]) <= 1e-5
    lengths = expected.num_visual_tokens.tolist()
    wide = torch.tensor(expand(whole.tolist(), lengths))
    wide_mask = torch.where((wide == 40) | (wide == 41), 0, 1)
    logits = model(
        input_ids=wide, attention_mask=wide_mask, pixel_values=pixels, visual_rungs=expected.visual_rungs
    ).logits
    slots = last_slots(whole[0].tolist(), lengths)
    assert largest(logits[:, slots][mask.bool()] - expected.logits[0]) <= 1e-5


@every_preset
def test_loss_is_the_cross_entropy_of_aligned_logits_without_placeholders(preset):
    model, pixels = tiny_model(preset), tiny_images(5)
    ids, mask = batch_rows(ROWS, "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :3] = -100
    output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)
    losses = []
    for row in range(len(ROWS)):
        log_probs = output.logits[row].double().log_softmax(-1)
        for column in range(1, ids.shape[1]):
            target = labels[row, column].item()
            if target not in (-100, IMG):
                losses.append(-log_probs[column - 1, target])
    assert abs(output.loss.item() - (sum(losses) / len(losses)).item()) <= 1e-5
    summed = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels, num_items_in_batch=7)
    assert abs(summed.loss.item() - (sum(losses) / 7).item()) <= 1e-5
    assert labels[0, 1] == IMG  # the caller's labels are left alone


def test_loss_equals_the_loss_of_llava_with_placeholders_masked():
    stock, pixels = stock_llava(), tiny_images(5)
    model = AdaptiveLlavaForConditionalGeneration.from_llava(stock)
    ids, mask = batch_rows(ROWS, "right")
    wide_ids, wide_mask = batch_rows(expand(ROWS, [36] * 5), "right")
    wide_labels = wide_ids.masked_fill((wide_mask == 0) | (wide_ids == IMG), -100)
    expected = stock(input_ids=wide_ids, attention_mask=wide_mask, pixel_values=pixels, labels=wide_labels).loss
    labels = ids.masked_fill(mask == 0, -100)
    found = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss
    assert abs(found.item() - expected.item()) <= 1e-5


@every_preset
def test_embeddings_in_place_of_ids_give_the_same_logits(preset):
    model, pixels = tiny_model(preset), tiny_images(5)
    ids, mask = batch_rows(ROWS, "left")
    embeds = model.get_input_embeddings()(ids)
    expected = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    found = model(inputs_embeds=embeds, attention_mask=mask, pixel_values=pixels).logits
    assert largest((found - expected)[mask.bool()]) <= 1e-6
    text = torch.tensor([[5, 6, 7]])
    alone = model(inputs_embeds=model.get_input_embeddings()(text)).logits
    assert largest(alone - model(input_ids=text).logits) <= 1e-6


@pytest.mark.parametrize("both", [True, False])
def test_ids_and_embeddings_exclude_each_other(both):
    model = tiny_model()
    inputs = {"input_ids": torch.tensor([[5]]), "inputs_embeds": torch.zeros(1, 1, 32)} if both else {}
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(**inputs)


def test_outputs_carry_counts_rungs_and_scores():
    model, pixels = tiny_model("dfmr"), tiny_images(5)
    ids, mask = batch_rows(ROWS, "left")
    output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    routing = model.model.router(model.model.extract_features(pixels))
    assert torch.equal(output.visual_rungs, routing.rungs)
    assert torch.equal(output.visual_router_scores, routing.scores)
    assert output.num_visual_tokens.tolist() == [(4, 9, 36)[rung] for rung in routing.rungs.tolist()]
    assert output.image_hidden_states.shape == (output.num_visual_tokens.sum(), 32)
    text_only = model(input_ids=torch.tensor([[5, 6]]))
    assert text_only.num_visual_tokens is None and text_only.visual_rungs is None


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ({"visual_token_budget": 9}, [9] * 5),
        ({"visual_token_budget": 35}, [9] * 5),
        ({"visual_token_budget": [4, 9, 36, 35, 8]}, [4, 9, 36, 9, 4]),
        ({"visual_token_budget": torch.tensor([4, 9, 36, 35, 8])}, [4, 9, 36, 9, 4]),
        ({"visual_rungs": [0, 1, 2, 1, 0]}, [4, 9, 36, 9, 4]),
        ({"visual_rungs": torch.tensor([0, 1, 2, 1, 0])}, [4, 9, 36, 9, 4]),
        ({"visual_token_budget": {"total": 45}}, None),
    ],
)
def test_a_budget_or_replay_is_kept_to_the_token(arguments, counts):
    model, pixels = tiny_model("dfmr"), tiny_images(5)
    ids, mask = batch_rows(ROWS, "left")
    output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, **arguments)
    found = output.num_visual_tokens.tolist()
    if counts is not None:
        assert found == counts
    else:  # per prompt: alone an image takes all 36, two share 45 with one at 36
        assert [found[0], sorted(found[1:3]), found[3], found[4]] == [36, [9, 36], 36, 36]
    encoded = model.encode_images(
        pixels, **arguments, **({"images_per_prompt": [1, 2, 0, 1, 1]} if counts is None else {})
    )
    assert list(encoded.lengths) == found


def test_a_total_is_kept_by_each_prompt_of_packed_rows():
    model, pixels = tiny_model("dfmr"), tiny_images(5)
    ids, positions = packed(ROWS)
    budget = {"visual_token_budget": {"total": 18}}
    output = model(input_ids=ids, position_ids=positions, pixel_values=pixels, **budget)
    assert output.num_visual_tokens.tolist() == [9, 9, 9, 9, 9]
    with pytest.raises(ValueError, match=r"smallest cost of prompt 1: 8 tokens for 2 images"):
        model(input_ids=ids, position_ids=positions, pixel_values=pixels, visual_token_budget={"total": 7})


def test_a_ceiling_bounds_the_routers_own_choice():
    model, pixels = tiny_model("dfmr"), tiny_images(5)
    free = model.encode_images(pixels).lengths
    assert max(free) == 36 and min(free) < 36
    assert model.encode_images(pixels, visual_token_budget={"ceiling": 9}).lengths == tuple(min(n, 9) for n in free)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"visual_token_budget": 3}, r"below the smallest count this model can produce \(4 tokens"),
        ({"visual_token_budget": [9, 9]}, r"has 2 entries for 5 images"),
        ({"visual_rungs": [0, 1]}, r"`visual_rungs` has 2 entries for 5 images"),
        ({"visual_rungs": [0, 1, 2, 3, 0]}, r"contains 3, but this model has rungs 0 to 2"),
        ({"visual_rungs": [0] * 5, "visual_token_budget": 9}, r"were both given"),
        ({"visual_token_budget": "most"}, r"'most'` is not known"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(arguments, message):
    model, pixels = tiny_model("dfmr"), tiny_images(5)
    ids, mask = batch_rows(ROWS, "left")
    for call in (
        lambda: model(input_ids=ids, attention_mask=mask, pixel_values=pixels, **arguments),
        lambda: model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=1, **arguments),
        lambda: model.encode_images(pixels, **arguments),
        lambda: model.get_image_features(pixels, **arguments),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("arguments", [{"visual_rungs": [0]}, {"visual_token_budget": [9]}])
def test_a_decision_about_images_that_are_not_there_is_refused(arguments):
    model, ids = tiny_model("dfmr"), torch.tensor([[5, 6, 7]])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"was given for \d images?, but"):
            call(input_ids=ids, **arguments)


@pytest.mark.parametrize("budget", [9, {"ceiling": 9}, {"total": 9}, "auto", None, []])
def test_a_budget_per_image_means_nothing_to_text_alone(budget):
    model, ids = tiny_model("dfmr"), torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids, visual_token_budget=budget).logits, model(input_ids=ids).logits)


def test_a_batch_with_zero_images_is_a_batch_of_text():
    model, ids = tiny_model("dfmr"), torch.tensor([[5, 6, 7]])
    none = torch.zeros(0, 3, 24, 24)
    assert torch.equal(model(input_ids=ids, pixel_values=none).logits, model(input_ids=ids).logits)
    encoded = model.encode_images(tiny_images(1)).select([])
    assert largest(model(input_ids=ids, encoded_images=encoded).logits - model(input_ids=ids).logits) <= 1e-6
    for inputs in ({"pixel_values": none}, {"encoded_images": encoded}):
        ids_out = model.generate(input_ids=ids, max_new_tokens=3, **inputs)
        assert torch.equal(ids_out, model.generate(input_ids=ids, max_new_tokens=3))


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        ([[5, IMG, 6], [7, 8, 9]], 2, r"has 1 image placeholders \(by row: \[1, 0\]\), but there are 2 images"),
        ([[5, IMG, 6], [IMG, IMG, 9]], 2, r"has 3 image placeholders \(by row: \[1, 2\]\), but there are 2 images"),
        ([[5, 6, 7]], 1, r"has 0 image placeholders \(by row: \[0\]\), but there are 1 images with 9"),
        ([[IMG] * 9 + [5], [IMG] * 8 + [6, 7]], 2, r"has 17 image placeholders \(by row: \[9, 8\]\)"),
        ([[IMG] * 10, [IMG] * 8 + [6, 7]], 2, r"Row 0 of `input_ids` ends inside an image: it has 10 placeholders"),
        ([[5] * 10, [IMG] * 5 + [5] * 5, [IMG] * 4 + [6] * 6], 1, r"Row 1 of `input_ids` ends inside an image"),
    ],
)
def test_placeholders_and_images_that_disagree_are_refused_by_row(rows, images, message):
    model = tiny_model("avg-pool")
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.tensor(rows), pixel_values=tiny_images(images))


@pytest.mark.parametrize("shape", [(1, 2, 3, 24, 24), (3, 24, 24), (1, 1, 24, 24)])
def test_pixels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"`pixel_values` has shape .* \(num_images, 3, height, width\)"):
        tiny_model()(input_ids=torch.tensor([[IMG]]), pixel_values=torch.zeros(shape))


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"covers 5 slots for 2 ids after 0 cached slots. Pass 2"):
        tiny_model()(input_ids=torch.tensor([[IMG, 5]]), attention_mask=torch.ones(1, 5), pixel_values=tiny_images(1))
    with pytest.raises(ValueError, match=r"`attention_mask` has 4 dimensions"):
        tiny_model()(
            input_ids=torch.tensor([[IMG, 5]]), attention_mask=torch.ones(1, 1, 2, 2), pixel_values=tiny_images(1)
        )


@every_preset
def test_encoded_images_serve_many_prompts_and_turns(preset):
    model, pixels = tiny_model(preset), tiny_images(3)
    encoded = model.encode_images(pixels)
    for rows, images in (([[5, IMG, 6], [IMG, IMG, 7]], [0, 1, 2]), ([[IMG, 7, IMG]], [2, 2]), ([[8, IMG]], [1])):
        expected = model(input_ids=torch.tensor(rows), pixel_values=pixels[images])
        found = model(input_ids=torch.tensor(rows), encoded_images=encoded.select(images))
        assert largest(found.logits - expected.logits) <= 1e-5
        for name in ("num_visual_tokens", "visual_rungs"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        assert largest(found.visual_router_scores - expected.visual_router_scores) <= 1e-6
    assert len(encoded) == 3 and len(encoded.select([])) == 0
    for wrong in ([3], [-1]):
        with pytest.raises(ValueError, match=r"must be indices from 0 to 2"):
            encoded.select(wrong)


@pytest.mark.parametrize(
    "extra", [{"pixel_values": tiny_images(1)}, {"visual_token_budget": 9}, {"visual_rungs": [0]}]
)
def test_encoded_images_exclude_pixels_and_budgets(extra):
    model = tiny_model("dfmr")
    encoded = model.encode_images(tiny_images(1))
    with pytest.raises(ValueError, match="`encoded_images` already holds its images"):
        model(input_ids=torch.tensor([[IMG, 5]]), encoded_images=encoded, **extra)


@every_preset
def test_image_features_keep_the_contract_of_transformers(preset):
    model, pixels = tiny_model(preset), tiny_images(3)
    features = model.get_image_features(pixel_values=pixels)
    per_image = features if isinstance(features, list) else features.pooler_output
    assert isinstance(features, type(stock_llava().get_image_features(pixel_values=pixels))) or isinstance(
        features, list
    )
    encoded = model.encode_images(pixels)
    assert [tuple(tokens.shape) for tokens in per_image] == [(count, 32) for count in encoded.lengths]
    assert torch.equal(torch.cat(per_image), encoded.values)


def test_image_features_equal_those_of_llava():
    stock, pixels = stock_llava(), tiny_images(3)
    theirs = stock.get_image_features(pixel_values=pixels)
    theirs = theirs.pooler_output if hasattr(theirs, "pooler_output") else theirs
    mine = AdaptiveLlavaForConditionalGeneration.from_llava(stock).get_image_features(pixel_values=pixels)
    mine = mine.pooler_output if hasattr(mine, "pooler_output") else mine
    for one, other in zip(mine, theirs, strict=True):
        assert largest(one - other) <= 1e-5


def test_image_features_bring_the_tower_s_states_where_they_are_asked_for():
    model, pixels = tiny_model("dfmr"), tiny_images(3)
    model.set_attn_implementation("eager")
    bare = model.get_image_features(pixels)
    if isinstance(bare, list):
        pytest.skip("transformers 4 returns the list of visual tokens alone")
    assert bare.last_hidden_state.shape == (3, 37, 32)
    assert bare.hidden_states is None and bare.attentions is None
    whole = model.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in whole.hidden_states] == [(3, 37, 32)] * 4
    assert [tuple(weights.shape) for weights in whole.attentions] == [(3, 4, 37, 37)] * 3
    as_tuple = model.get_image_features(pixels, return_dict=False)
    assert torch.equal(as_tuple[0], bare.last_hidden_state)
    assert all(map(torch.equal, as_tuple[1], bare.pooler_output))


def test_the_loss_is_taken_against_shifted_labels_where_they_are_given():
    model = tiny_model("dfmr")
    ids, mask = batch_rows(ROWS, "right")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": tiny_images(5)}
    labels = ids.masked_fill(mask == 0, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(**inputs, labels=labels).loss
    other = torch.full_like(labels, 7)
    assert largest(model(**inputs, labels=other, shift_labels=shifted).loss - expected) <= 1e-6
    assert largest(model(**inputs, labels=other).loss - expected) > 1e-3


def test_hidden_states_of_some_layers_leave_the_others_out():
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 gives all layers or none")
    model, inputs = tiny_model("dfmr"), {"input_ids": torch.tensor([[5, IMG, 6]]), "pixel_values": tiny_images(1)}
    whole = model(**inputs, output_hidden_states=True).hidden_states
    some = model(**inputs, output_hidden_states=[0, 2]).hidden_states
    assert some[1] is None
    assert all(torch.equal(some[layer], whole[layer]) for layer in (0, 2))


def test_a_tower_s_weight_that_a_checkpoint_lacks_is_drawn_as_its_class_does():
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 draws it in the wrapper of the tower, which our models do without")
    model = AdaptiveLlavaForConditionalGeneration(tiny_model("llava").config)
    missing = "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    saved = {name: tensor for name, tensor in model.state_dict().items() if name != missing}
    again = AdaptiveLlavaForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=saved)
    drawn = again.get_parameter(missing)
    assert drawn.std().item() == pytest.approx((32 * 2 * 3) ** -0.5, rel=0.2)  # CLIP's; others have 0.02
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("preset", "unread"), [("dfmr", ("layers.2.", "post_layernorm")), ("mbtf", ("post_layernorm",))]
)
def test_every_weight_of_a_trained_tower_gets_a_gradient(preset, unread):
    model = tiny_model(preset, vision_feature_layer=-2).train()
    ids = torch.tensor([[5, IMG, 6]])
    model(input_ids=ids, pixel_values=tiny_images(1), labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.model.vision_tower.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    above = {name for name, gradient in gradients.items() if not gradient.any()}
    assert {name for name in gradients if any(part in name for part in unread)} <= above


def test_only_the_positions_asked_for_are_scored():
    model, pixels = tiny_model("dfmr"), tiny_images(5)
    ids, mask = batch_rows(ROWS, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    whole = model(**inputs).logits
    assert largest(model(**inputs, logits_to_keep=2).logits - whole[:, -2:]) <= 1e-6
    assert largest(model(**inputs, logits_to_keep=torch.tensor([1, 5])).logits - whole[:, [1, 5]]) <= 1e-6


def test_a_tuple_is_returned_where_it_is_asked_for():
    model, pixels = tiny_model("dfmr"), tiny_images(1)
    inputs = {"input_ids": torch.tensor([[5, IMG, 6]]), "pixel_values": pixels}
    output = model(**inputs)
    parts = model(**inputs, return_dict=False)
    assert isinstance(parts, tuple) and torch.equal(parts[0], output.logits)
    with_loss = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    assert with_loss[0].ndim == 0 and torch.equal(with_loss[1], output.logits)
    states = model.model(**inputs, return_dict=False)
    assert isinstance(states, tuple) and states[0].shape == (1, 3, 32)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def test_sdpa_and_eager_attention_agree():
    model, pixels = tiny_model("dfmr"), tiny_images(5)
    for side in ("left", "right"):
        ids, mask = batch_rows(ROWS, side)
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        model.set_attn_implementation("sdpa")
        sdpa = model(**inputs).logits
        model.set_attn_implementation("eager")
        eager = model(**inputs, output_attentions=True)
        assert largest((sdpa - eager.logits)[mask.bool()]) <= 5e-5
        assert eager.attentions[0].shape[-1] > ids.shape[1]


@every_preset
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_finite_and_near_full_precision(preset, dtype):
    model, pixels = tiny_model(preset), tiny_images(5)
    ids, mask = batch_rows(ROWS, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    exact = model(**inputs)
    with torch.autocast("cpu", dtype=dtype):
        cast = model(**inputs, visual_rungs=exact.visual_rungs)
    scale = largest(exact.logits[mask.bool()])
    assert (
        largest((cast.logits.float() - exact.logits)[mask.bool()])
        <= (0.1 if dtype == torch.bfloat16 else 0.02) * scale
    )


@every_preset
def test_a_bf16_model_is_finite_and_near_full_precision(preset):
    model, pixels = tiny_model(preset), tiny_images(5)
    ids, mask = batch_rows(ROWS, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    exact = model(**inputs)
    output = model.bfloat16()(**inputs, visual_rungs=exact.visual_rungs)
    assert output.logits.dtype == torch.bfloat16
    assert output.visual_router_scores.dtype == torch.float32
    scale = largest(exact.logits[mask.bool()])
    assert largest((output.logits.float() - exact.logits)[mask.bool()]) <= 0.1 * scale


@pytest.mark.parametrize("preset", ["dfmr", "stf", "stf-mbtf"])
def test_parts_of_different_precision_work_together(preset):
    # transformers 5 loads each backbone in the precision of its own checkpoint
    model, pixels = tiny_model(preset), tiny_images(1)
    inputs = {"input_ids": torch.tensor([[5, IMG, 6]]), "pixel_values": pixels}
    exact = model(**inputs)
    for name, part in (*model.model.named_children(), ("lm_head", model.lm_head)):
        if name != "vision_tower":
            part.bfloat16()
    mixed = model(**inputs, visual_rungs=exact.visual_rungs)
    assert largest(mixed.logits.float() - exact.logits) <= 0.1 * largest(exact.logits)


class PackedLinear(torch.nn.Linear):
    """Holds its weight as bytes, as 4-bit layers do, and works in its input's precision."""

    def __init__(self, layer):
        super().__init__(1, 1, bias=layer.bias is not None, device="meta")
        self.shape, self.bias = layer.weight.shape, layer.bias
        packed = layer.weight.detach().view(torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, states):
        weight = self.weight.view(torch.float32).view(self.shape).to(states.dtype)
        bias = None if self.bias is None else self.bias.to(states.dtype)
        return torch.nn.functional.linear(states, weight, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("preset", ["stf-mbtf", "llava-mini", "dynamic-resampler"])
def test_parts_whose_weights_are_packed_read_no_bytes(preset, bias):
    # the recommended quantisation leaves these parts out; a user's own may not
    model = tiny_model(preset, multimodal_projector_bias=bias)
    inputs = {"input_ids": torch.tensor([[5, IMG, 6]]), "pixel_values": tiny_images(1)}
    exact = model(**inputs)
    for part in OWN_PARTS:
        module = getattr(model.model, part)
        linear = [] if module is None else [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
        for name in linear:
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], PackedLinear(module.get_submodule(name)))
    packed = model(**inputs)
    assert packed.visual_rungs.tolist() == exact.visual_rungs.tolist()
    assert torch.equal(packed.visual_router_scores, exact.visual_router_scores)
    assert largest(packed.logits - exact.logits) <= 1e-5


@every_preset
def test_gradient_checkpointing_changes_no_gradient(preset):
    ids, mask = batch_rows(ROWS, "left")
    pixels, found = tiny_images(5), []
    for checkpointing in (False, True):
        model = tiny_model(preset).train()
        torch.manual_seed(0)  # the random router draws
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        labels = ids.masked_fill(mask == 0, -100)
        model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert largest(found[0][name] - found[1][name]) <= 1e-5, name


@every_preset
def test_every_used_trainable_parameter_gets_a_gradient(preset):
    model = tiny_model(preset).train()
    ids, mask = batch_rows(ROWS, "left")
    labels = ids.masked_fill(mask == 0, -100)
    model(input_ids=ids, attention_mask=mask, pixel_values=tiny_images(5), labels=labels).loss.backward()
    # above the selected layer, the tower's weights have no say
    unused = ("vision_tower.encoder.layers.2.", "post_layernorm")
    trained = [
        (n, p) for n, p in model.named_parameters() if p.requires_grad and not any(part in n for part in unused)
    ]
    assert [n for n, p in trained if p.grad is None] == []


@every_preset
def test_text_alone_in_training_touches_every_visual_parameter_with_weight_zero(preset):
    model = tiny_model(preset).train()
    ids = torch.tensor([[5, 6, 7]])
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    own = ("multi_block_fusion", "compressor", "multi_modal_projector", "modality_prefusion")
    visual = [(n, p) for n, p in model.named_parameters() if any(part in n for part in own)]
    assert visual
    for name, parameter in visual:
        assert parameter.grad is not None and largest(parameter.grad) == 0, name
    expected = model.eval()(input_ids=ids, labels=ids).loss
    assert abs(output.loss.item() - expected.item()) <= 1e-6


def test_text_alone_in_fp16_training_is_not_spoilt_by_large_visual_values():
    # a sum over 36 x 32 values of 100 is no fp16 number; times zero it must still be zero
    model = tiny_model().half().train()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias.fill_(100)
        expected = model.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits
    logits = model.train()(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("tied", [True, False])
@every_preset
def test_saved_models_load_with_the_same_bits(preset, tied, tmp_path):
    model, pixels = tiny_model(preset, tie_word_embeddings=tied), tiny_images(2)
    inputs = {"input_ids": torch.tensor([[5, IMG, 6, IMG, 7]]), "pixel_values": pixels}
    expected = model(**inputs)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    again = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path)
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    # weights that lie elsewhere in memory may round the product of a single row otherwise
    assert largest(again(**inputs).logits - expected.logits) <= 2e-6
    head, embeddings = again.lm_head.weight, again.get_input_embeddings().weight
    assert (head.data_ptr() == embeddings.data_ptr()) is tied
    base = AdaptiveLlavaModel.from_pretrained(tmp_path)
    assert largest(base(**inputs).last_hidden_state @ head.T - expected.logits) <= 1e-5


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("model.multi_modal_projector.linear_1.weight", r"lacks 1 weights.*multi_modal_projector.linear_1.weight"),
        ("multi_modal_projector", r"lacks 4 weights this model needs.*multi_modal_projector.linear_2.bias"),
    ],
)
def test_a_checkpoint_without_its_projector_is_refused(missing, named, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if missing not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=named):
        AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_checkpoint_whose_projector_has_another_shape_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)do not fit its config.*from_llava"):
        AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path, compressor={"type": "token_concat"})


def test_loading_information_is_returned_where_asked_for(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model, info = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, AdaptiveLlavaForConditionalGeneration)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def continued(model, pixels, side, second: list[list[int]], second_pixels=None, *, with_mask=True):
    """Forward the first part of five rows, then `second` on the cache; gives the second logits."""
    ids, mask = batch_rows(ROWS, side)
    first = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=True)
    counts = iter(first.num_visual_tokens.tolist())
    totals = [sum(next(counts) if token == IMG else 1 for token in row) for row in ROWS]
    cached = first.past_key_values.get_seq_length()
    assert cached == max(totals)
    past = torch.tensor([[0] * (cached - total) + [1] * total for total in totals])
    inputs = {} if second_pixels is None else {"pixel_values": second_pixels}
    return model(
        input_ids=torch.tensor(second),
        attention_mask=torch.cat([past, torch.ones(5, len(second[0]), dtype=torch.long)], dim=1),
        past_key_values=first.past_key_values,
        **inputs,
    ).logits


@every_preset
def test_text_appended_to_the_cache_of_ragged_rows_equals_whole_rows(preset):
    model, pixels = tiny_model(preset), tiny_images(5)
    second = [[20 + row, 30 + row, 40 + row] for row in range(5)]
    logits = continued(model, pixels, "left", second)
    for row, images in enumerate(IMAGES_OF_ROW):
        inputs = {"pixel_values": pixels[images]} if images else {}
        instruction = torch.tensor([[True] * len(ROWS[row]) + [False] * 3])  # pre-fusion leaves appended text raw
        ids = torch.tensor([ROWS[row] + second[row]])
        whole = model(input_ids=ids, instruction_mask=instruction, **inputs).logits[0, -3:]
        assert largest(logits[row] - whole) <= 1e-4


@pytest.mark.parametrize("preset", [name for name in MODELS_HERE if not tiny_model(name).config.prefusion_layers])
def test_images_appended_to_the_cache_of_ragged_rows_equal_whole_rows(preset):
    model, pixels, new = tiny_model(preset), tiny_images(5), tiny_images(4, seed=7)
    second = [[20, IMG, 21], [IMG, 22, 23], [24, 25, 26], [27, 28, IMG], [IMG, 29, 30]]
    logits = continued(model, pixels, "left", second, new)
    new_of_row = [[0], [1], [], [2], [3]]
    for row, images in enumerate(IMAGES_OF_ROW):
        both = torch.cat([pixels[images], new[new_of_row[row]]])
        inputs = {"pixel_values": both} if len(both) else {}
        whole = model(input_ids=torch.tensor([ROWS[row] + second[row]]), **inputs).logits[0, -3:]
        assert largest(logits[row] - whole) <= 1e-4


def test_a_single_row_is_continued_without_a_mask():
    model, pixels = tiny_model("dfmr"), tiny_images(2)
    first = model(input_ids=torch.tensor([[5, IMG, 6]]), pixel_values=pixels[:1], use_cache=True)
    second = model(
        input_ids=torch.tensor([[7, IMG, 8]]), pixel_values=pixels[1:], past_key_values=first.past_key_values
    )
    third = model(input_ids=torch.tensor([[9]]), past_key_values=second.past_key_values)
    whole = model(input_ids=torch.tensor([[5, IMG, 6, 7, IMG, 8, 9]]), pixel_values=pixels).logits[0]
    assert largest(torch.cat([first.logits, second.logits, third.logits], dim=1)[0] - whole) <= 1e-4


def test_embeddings_grow_with_the_tokenizer_and_keep_the_logits():
    model, pixels = tiny_model(), tiny_images(1)
    inputs = {"input_ids": torch.tensor([[5, IMG, 6]]), "pixel_values": pixels}
    before = model(**inputs).logits
    model.resize_token_embeddings(110)
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 110
    assert model.config.text_config.vocab_size == 110
    after = model(**inputs, labels=inputs["input_ids"])
    assert largest(after.logits[..., :100] - before) <= 1e-5
    assert after.loss.isfinite()


@pytest.mark.parametrize("router", TINY_ROUTERS)
def test_training_on_text_alone_behind_a_frozen_tower_works_under_every_router(router):
    model = tiny_model("dfmr", router={"type": router}).train()
    model.model.vision_tower.requires_grad_(False)
    ids = torch.tensor([[5, 6, 7]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(largest(parameter.grad) == 0 for parameter in model.model.multi_modal_projector.parameters())
