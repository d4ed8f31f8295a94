"""Whole models on tiles: equal to transformers' LLaVA-NeXT and OneVision, independent of batch, layout and budget."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.view_geometry import cut_image, image_costs
from tests.conftest import (
    IMAGE_TOKEN,
    TINY_COMPRESSORS,
    batch_rows,
    tiny_images,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)
from tests.test_placeholder_generation import gold


pytestmark = pytest.mark.compat

IMG = IMAGE_TOKEN
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
SIZES = [(50, 37), (20, 80), (24, 24), (90, 31)]  # height, width
ROWS = [[5, IMG, 6, 7], [8, IMG, 9, 10], [13, 14, 15], [IMG, 16, 17], [18, 19, IMG]]
SEVERAL = [[5, IMG, 6, 7], [8, IMG, 9, IMG, 10, IMG, 11], [13, 14, 15]]
both_sides = pytest.mark.parametrize("side", ["left", "right"])
every_layout = pytest.mark.parametrize("layout", ["sequence", "spatial_unpad"])


@pytest.fixture(autouse=True)
def gradients_only_where_tested(request):
    with torch.set_grad_enabled("train" in request.node.name):
        yield


def stock(kind: str, text: str = "qwen2", **options):
    """A tiny random LLaVA-NeXT or OneVision of transformers."""
    torch.manual_seed(0)
    shared = {
        "text_config": tiny_text_config(text),
        "image_token_index": IMG,
        "image_grid_pinpoints": PINPOINTS,
        "tie_word_embeddings": False,
    }
    if kind == "llava_next":
        config = LlavaNextConfig(vision_config=tiny_vision_config(), **shared, **options)
        model = LlavaNextForConditionalGeneration(config)
    else:
        config = LlavaOnevisionConfig(
            vision_config=tiny_vision_config("siglip"), video_token_index=98, **shared, **options
        )
        model = LlavaOnevisionForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def pixels_of(tiling, sizes, *, whole=(), seed=1):
    """Padded pixels `(N, views, 3, 24, 24)` and how the images are cut."""
    images = [cut_image(tiling, size, whole=index in whole) for index, size in enumerate(sizes)]
    views = tiny_images(sum(image.views for image in images), seed).split([image.views for image in images])
    return torch.nn.utils.rnn.pad_sequence(list(views), batch_first=True), torch.tensor(sizes), images


def expand(rows, counts):
    counts = iter(counts)
    return [[slot for token in row for slot in [token] * (next(counts) if token == IMG else 1)] for row in rows]


def last_slots(row, counts):
    slots, end = [], 0
    for token in row:
        end += next(counts) if token == IMG else 1
        slots.append(end - 1)
    return slots


def compare(theirs, ours, rows, side, inputs, counts, **extra):
    """Logits of both layouts and greedy generation; `extra` is for transformers' model alone."""
    ids, mask = batch_rows(rows, side)
    wide_ids, wide_mask = batch_rows(expand(rows, counts), side)
    expected = theirs(input_ids=wide_ids, attention_mask=wide_mask, **inputs, **extra).logits
    wide = ours(input_ids=wide_ids, attention_mask=wide_mask, **inputs)
    compact = ours(input_ids=ids, attention_mask=mask, **inputs)
    assert compact.num_visual_tokens.tolist() == list(counts)
    assert (wide.logits - expected)[wide_mask.bool()].abs().max() <= 2e-5
    left = iter(counts)
    for row, slots in enumerate(last_slots(row, left) for row in rows):
        aligned = expected[row][wide_mask[row].bool()][slots]
        assert (compact.logits[row][mask[row].bool()] - aligned).abs().max() <= 2e-5
    if side == "left":
        new = {"max_new_tokens": 6, "do_sample": False}
        reference = theirs.generate(input_ids=wide_ids, attention_mask=wide_mask, **inputs, **extra, **new)
        mine = ours.generate(input_ids=ids, attention_mask=mask, **inputs, **new)
        assert torch.equal(mine[:, ids.shape[1] :], reference[:, wide_ids.shape[1] :])


def counts_of(model, images):
    config = model.config
    return [cost.counts[-1] for cost in image_costs(config.tiling, config.compressor, config.view_grid, images)]


# ---- transformers' own classes


@pytest.mark.parametrize(
    ("kind", "text", "options"),
    [
        ("llava_next", "llama", {}),
        ("llava_next", "qwen2", {"vision_feature_layer": [-2, -1]}),
        ("llava_onevision", "qwen2", {"vision_aspect_ratio": "anyres_max_9"}),
        ("llava_onevision", "qwen2", {"vision_aspect_ratio": "anyres_max_1"}),
    ],
    ids=["next", "next with two layers", "onevision", "onevision that shrinks maps"],
)
@both_sides
def test_identity_equals_transformers_with_the_same_weights(kind, text, options, side):
    theirs = stock(kind, text, **options)
    ours = AdaptiveLlavaForConditionalGeneration.from_llava(theirs)
    pixels, sizes, images = pixels_of(ours.config.tiling, SIZES)
    counts = counts_of(ours, images)
    assert len(set(counts)) > 2  # else the images would not tell much
    if options.get("vision_aspect_ratio") == "anyres_max_1":
        free = ours.config.tiling | {"max_tiles": None}
        assert counts != [cost.counts[0] for cost in image_costs(free, {"type": "identity"}, (6, 6), images)]
    compare(theirs, ours, ROWS, side, {"pixel_values": pixels, "image_sizes": sizes}, counts)


@both_sides
def test_several_images_of_a_prompt_are_tiled_by_llava_next(side):
    theirs = stock("llava_next", "llama")
    ours = AdaptiveLlavaForConditionalGeneration.from_llava(theirs)
    pixels, sizes, images = pixels_of(ours.config.tiling, SIZES)
    compare(theirs, ours, SEVERAL, side, {"pixel_values": pixels, "image_sizes": sizes}, counts_of(ours, images))


@both_sides
def test_several_images_of_a_prompt_are_shown_whole_by_onevision(side):
    theirs = stock("llava_onevision")
    ours = AdaptiveLlavaForConditionalGeneration.from_llava(theirs)
    pixels, sizes, images = pixels_of(ours.config.tiling, SIZES, whole=(1, 2, 3))
    counts = counts_of(ours, images)
    assert counts[1:] == [37, 37, 37]
    inputs = {"pixel_values": pixels, "image_sizes": sizes}
    compare(theirs, ours, SEVERAL, side, inputs, counts, batch_num_images=torch.tensor([1, 3]))


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_a_folder_of_transformers_is_read_with_its_tiling(kind, tmp_path):
    theirs = stock(kind)
    theirs.save_pretrained(tmp_path)
    ours = AdaptiveLlavaForConditionalGeneration.from_llava(str(tmp_path))
    several, max_tiles = ("whole", 9) if kind == "llava_onevision" else ("tile", None)
    assert ours.config.tiling == {
        "type": "anyres", "pinpoints": PINPOINTS, "view_layout": "spatial_unpad", "tile_size": 24,
        "several_images": several, "max_tiles": max_tiles,
    }  # fmt: skip
    assert torch.equal(ours.model.view_arrangement.image_newline, theirs.model.image_newline)
    routed = AdaptiveLlavaForConditionalGeneration.from_llava(str(tmp_path), preset="dfmr")
    assert routed.config.tiling["view_layout"] == "sequence" and routed.config.tiling["max_tiles"] is None
    plain = AdaptiveLlavaForConditionalGeneration.from_llava(str(tmp_path), tiling={"type": "none"})
    assert plain.model.view_arrangement is None
    assert plain.encode_images(tiny_images(2)).lengths == (36, 36)


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(
        ValueError, match="is a 'adaptive_llava'; `from_llava` takes LLaVA-1.5, LLaVA-NeXT and LLaVA-On"
    ):
        AdaptiveLlavaForConditionalGeneration.from_llava(tiny_model())


# ---- laws, for every compressor and layout


def tiled_model(layout="sequence", compressor=None, router=None, **options):
    fields = {"compressor": compressor} if compressor else {}
    fields |= {"router": router} if router else {}
    return tiny_model("dfmr", tiling={"type": "anyres", "view_layout": layout, **options}, **fields)


def tiles_for(model, sizes=SIZES):
    """Views from flat to noisy, so that a router has something to tell apart."""
    pixels, sizes, images = pixels_of(model.config.tiling, sizes)
    return {"pixel_values": pixels, "image_sizes": sizes}, images


@every_layout
@pytest.mark.parametrize("name", sorted(TINY_COMPRESSORS))
def test_tokens_of_an_image_do_not_depend_on_its_batch(layout, name):
    router = {"type": "feature_std", "thresholds": [0.05, 0.15]} if name == "average_pool" else {"type": "fixed"}
    if (layout, name) == ("spatial_unpad", "spatial_fusion"):  # two tokens of each window
        with pytest.raises(ValueError, match="those of the 'spatial_fusion' compressor form no grid"):
            tiled_model(layout, TINY_COMPRESSORS[name], router)
        return
    model = tiled_model(layout, TINY_COMPRESSORS[name], router)
    inputs, images = tiles_for(model)
    together = model.encode_images(**inputs)
    if name == "average_pool":
        assert len(set(together.rungs)) > 1
    assert together.views_per_image == tuple(image.views for image in images)
    start = 0
    for index, image in enumerate(images):
        alone = model.encode_images(**{key: value[index : index + 1] for key, value in inputs.items()})
        assert alone.rungs == together.rungs[start : start + image.views]
        assert alone.lengths[0] == together.lengths[index]
        assert (alone.values - together.select([index]).values).abs().max() <= 1e-5
        start += image.views


@every_layout
def test_counts_are_those_of_the_geometry_at_every_rung(layout):
    model = tiled_model(layout)
    inputs, images = tiles_for(model)
    costs = image_costs(model.config.tiling, model.config.compressor, model.config.view_grid, images)
    views = sum(image.views for image in images)
    for rung in range(3):
        encoded = model.encode_images(**inputs, visual_rungs=[rung] * views)
        assert encoded.lengths == tuple(cost.counts[rung] for cost in costs)


def test_views_of_a_sequence_keep_their_own_rungs_and_those_of_a_map_share_the_largest():
    rungs = [0, 2, 1, 0, 1]
    for layout, expected in (("sequence", rungs), ("spatial_unpad", [2] * 5)):
        model = tiled_model(layout)
        inputs, images = tiles_for(model, [(48, 48)])
        encoded = model.encode_images(**inputs, visual_rungs=rungs)
        assert list(encoded.rungs) == expected
        (cost,) = image_costs(model.config.tiling, model.config.compressor, model.config.view_grid, images)
        assert encoded.lengths == (cost.tokens(expected),)


@every_layout
def test_budgets_are_kept_newlines_included(layout):
    model = tiled_model(layout)
    inputs, images = tiles_for(model)
    costs = image_costs(model.config.tiling, model.config.compressor, model.config.view_grid, images)
    smallest = [cost.counts[0] for cost in costs]
    for budget in (max(smallest), 60, 100, 1000):
        encoded = model.encode_images(**inputs, visual_token_budget=budget)
        best = [max(count for count in cost.counts if count <= budget) for cost in costs]
        assert list(encoded.lengths) == best
        ceiling = model.encode_images(**inputs, visual_token_budget={"ceiling": budget})
        assert max(ceiling.lengths) <= budget
    for total in (sum(smallest), 200, 400):
        encoded = model.encode_images(**inputs, visual_token_budget={"total": total}, images_per_prompt=[4])
        assert sum(encoded.lengths) <= total
    # of the two prompts only the second has room left
    encoded = model.encode_images(**inputs, visual_token_budget={"total": sum(smallest[:2])}, images_per_prompt=[2, 2])
    assert list(encoded.lengths[:2]) == smallest[:2] and set(encoded.rungs[: sum(encoded.views_per_image[:2])]) == {0}
    with pytest.raises(ValueError, match=rf"below the smallest count .*\({max(smallest)} tokens for an image"):
        model.encode_images(**inputs, visual_token_budget=max(smallest) - 1)


@every_layout
def test_generation_replays_the_choice_of_every_view(layout):
    model = tiled_model(layout)
    inputs, _ = tiles_for(model)
    ids, mask = batch_rows(SEVERAL, "left")
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    free = model.generate(input_ids=ids, attention_mask=mask, **inputs, **options)
    assert (
        len(free.visual_rungs) == len(free.visual_router_scores) == sum(model.encode_images(**inputs).views_per_image)
    )
    again = model.generate(
        input_ids=ids, attention_mask=mask, **inputs, visual_rungs=free.visual_rungs.tolist(), **options
    )
    assert torch.equal(free.sequences, again.sequences)
    encoded = model.encode_images(**inputs)
    reused = model.generate(input_ids=ids, attention_mask=mask, encoded_images=encoded, **options)
    assert torch.equal(free.sequences, reused.sequences)


@every_layout
def test_every_trainable_part_gets_a_gradient_in_training(layout):
    model = tiled_model(layout).train()
    inputs, _ = tiles_for(model)
    ids, mask = batch_rows(SEVERAL, "right")
    model(input_ids=ids, attention_mask=mask, labels=ids, **inputs).loss.backward()
    for name in ("view_arrangement", "multi_modal_projector"):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in getattr(model.model, name).parameters())


@every_layout
def test_text_alone_gives_the_newline_a_gradient_of_zero_in_training(layout):
    model = tiled_model(layout).train()
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert not model.model.view_arrangement.image_newline.grad.any()


def test_a_saved_model_keeps_tiling_and_newline(tmp_path):
    model = tiled_model("sequence")
    inputs, _ = tiles_for(model)
    model.save_pretrained(tmp_path)
    again = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.tiling == model.config.tiling
    assert torch.equal(again.encode_images(**inputs).values, model.encode_images(**inputs).values)


@every_layout
def test_new_parts_beside_llava_say_that_their_newline_is_new(layout):
    config = LlavaConfig(vision_config=tiny_vision_config(), text_config=tiny_text_config(), image_token_index=IMG)
    model = AdaptiveLlavaForConditionalGeneration.from_llava(
        LlavaForConditionalGeneration(config), tiling={"type": "anyres", "view_layout": layout}
    )
    assert model.config.compressor_trained is False
    assert 0.5 < model.model.view_arrangement.image_newline.norm() < 2


@every_layout
@pytest.mark.parametrize("way", ["bf16 weights", "autocast"])
def test_half_precision_stays_finite_and_close(layout, way):
    model = tiled_model(layout, max_tiles=1) if layout == "spatial_unpad" else tiled_model(layout)
    inputs, _ = tiles_for(model)
    ids, mask = batch_rows(SEVERAL, "left")
    exact = model(input_ids=ids, attention_mask=mask, **inputs)
    replay = {"visual_rungs": exact.visual_rungs}
    if way == "bf16 weights":
        model.to(torch.bfloat16)
        logits = model(input_ids=ids, attention_mask=mask, **inputs, **replay).logits
    else:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask, **inputs, **replay).logits
    kept = mask.bool()
    assert logits.isfinite().all()
    assert (logits.float() - exact.logits)[kept].norm() <= 0.1 * exact.logits[kept].norm()


# ---- mosaic


@pytest.mark.parametrize("preset", ["llava", "dfmr", "token-concat", "mbtf"])
def test_a_mosaic_compresses_all_tiles_as_one_view(preset):
    model = tiny_model(preset, tiling={"type": "mosaic", "n": 2})
    pixels = tiny_images(10).unflatten(0, (2, 5))
    encoded = model.encode_images(pixels)
    ladder = {"llava": (144,), "dfmr": (16, 36, 144), "token-concat": (36,), "mbtf": (144,)}[preset]
    assert model.config.visual_token_counts == ladder
    assert encoded.lengths == tuple(ladder[rung] for rung in encoded.rungs) and encoded.views_per_image == (1, 1)
    alone = model.encode_images(pixels[1:])
    assert (alone.values - encoded.select([1]).values).abs().max() <= 1e-5
    features = model.model.extract_features(pixels)
    assert torch.equal(features.overview, model.model.extract_features(pixels).overview)
    plain = tiny_model(preset)
    single = plain.model.extract_features(pixels[:, -1])
    assert (features.overview - single.patches).abs().max() <= 1e-5
    assert (features.cls - single.cls).abs().max() <= 1e-5


def test_a_mosaic_model_answers_and_trains_on_text_alone():
    model = tiny_model("dfmr", tiling={"type": "mosaic", "n": 2})
    pixels = tiny_images(10).unflatten(0, (2, 5))
    ids = torch.tensor([[5, IMG, 6], [7, 8, IMG]])
    out = model(input_ids=ids, pixel_values=pixels, visual_token_budget=36)
    assert out.num_visual_tokens.tolist() == [36, 36] and out.logits.shape == (2, 3, 100)
    model.train()
    model(input_ids=ids[:, :1]).logits.sum().backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())


@pytest.mark.parametrize("tiling", [{"type": "anyres"}, {"type": "mosaic", "n": 2}], ids=lambda tiling: tiling["type"])
@torch.no_grad()
def test_prefusion_reads_the_patches_of_all_views(tiling):
    model = tiny_model("dfmr", tiling=tiling, prefusion_layers=2)
    if tiling["type"] == "anyres":
        inputs, images = tiles_for(model)
        patches = tuple(36 * image.views for image in images)
    else:
        number = 3
        inputs = {"pixel_values": tiny_images(5 * number).unflatten(0, (number, 5))}
        patches = (5 * 36,) * number  # four tiles as one map, and the whole image
    encoded = model.encode_images(**inputs)
    assert encoded.patch_lengths == patches
    rows = [[5, IMG, 6, 7], *([8, IMG, 9 + index] for index in range(len(patches) - 1))]
    ids, mask = batch_rows(rows, "left")
    together = model(input_ids=ids, attention_mask=mask, **inputs).logits
    plain = tiny_model("dfmr", tiling=tiling)(input_ids=ids, attention_mask=mask, **inputs).logits
    assert (together - plain).abs().max() > 1e-2
    for row, prompt in enumerate(rows):
        own = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = model(input_ids=torch.tensor([prompt]), **own).logits
        assert (together[row, -len(prompt) :] - alone[0]).abs().max() <= 1e-4
        answer = model.generate(
            torch.tensor([prompt]), **own, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        assert (answer.logits[0][0] - alone[0, -1]).abs().max() <= 1e-4


BOTH_TILINGS = pytest.mark.parametrize(
    "tiling", [{"type": "anyres"}, {"type": "mosaic", "n": 2}], ids=lambda tiling: tiling["type"]
)


@BOTH_TILINGS
def test_generation_under_prefusion_equals_a_loop_without_a_cache(tiling):
    model = tiny_model("dfmr", tiling=tiling, prefusion_layers=2)
    pixels, sizes = tiny_images(20).unflatten(0, (4, 5)), torch.tensor(SIZES)
    if tiling["type"] == "anyres":
        pixels, sizes, _ = pixels_of(model.config.tiling, SIZES)
    ids, mask = batch_rows(SEVERAL, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_sizes": sizes}
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    shown = [[0], [1, 2, 3], []]
    for row, images, found in zip(SEVERAL, shown, output[:, ids.shape[1] :].tolist(), strict=True):
        assert found == gold(model, row, pixels[images], 5, image_sizes=sizes[images])


@BOTH_TILINGS
def test_prefusion_of_tiled_images_is_part_of_the_graph_in_training_on_text_alone(tiling):
    model = tiny_model("dfmr", tiling=tiling, prefusion_layers=2).train()
    ids = torch.tensor([[5, 6, 7]])
    alone = model(input_ids=ids, labels=ids)
    alone.loss.backward()
    parts = [model.model.modality_prefusion, model.model.multi_modal_projector]
    assert all(p.grad is not None and not p.grad.any() for part in parts for p in part.parameters())
    assert torch.equal(alone.logits, model.eval()(input_ids=ids).logits)
