"""Images cut into views: the authors' tiles, transformers' own image processors, counts before and after the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM, LlavaNextProcessor
from transformers.tokenization_utils_base import AddedToken

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.modeling.view_geometry import check_tiling, cut_image
from adaptive_llava.processing.view_tiling import anyres_tiles, mosaic_tiles, on_square, view_pixels
from adaptive_llava.training.calibrate import calibrate_thresholds
from adaptive_llava.training.convert import convert
from adaptive_llava.training.image_source import open_images
from adaptive_llava.training.mobilenet_tower import load_mobilenet_tower, mobilenet_pixels
from tests.conftest import IMAGE_TOKEN, tiny_model, tiny_text_config
from tests.fresh_process import run_without_package
from tests.test_anyres_models import PINPOINTS, stock
from tests.test_loading_paths import word_tokenizer as unsplit_word_tokenizer


pytestmark = pytest.mark.compat

SIZES = [(50, 37), (20, 80), (24, 24), (90, 31)]  # height, width
BICUBIC = Image.Resampling.BICUBIC


def picture(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [picture(size, seed) for seed, size in enumerate(SIZES)]


def stock_image_processor(name, **options):
    kind = getattr(transformers, name + "Pil", None) or getattr(transformers, name)
    return kind(**options)


def next_processor():
    return stock_image_processor(
        "LlavaNextImageProcessor",
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=PINPOINTS,
    )


def onevision_processor():
    half = [0.5, 0.5, 0.5]
    return stock_image_processor(
        "LlavaOnevisionImageProcessor", size={"height": 24, "width": 24}, image_mean=half, image_std=half
    )


def word_tokenizer():
    """Words apart by spaces, placeholders also without."""
    tokenizer = unsplit_word_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


def model_and_processor(tiling, image_processor=None, **fields):
    model = tiny_model(fields.pop("preset", "llava"), tiling=tiling, **fields)
    return model, AdaptiveLlavaProcessor.from_config(model.config, word_tokenizer(), image_processor)


# ---- tiles


def test_tiles_equal_the_authors_own(shared):
    folder = shared / "golden" / "anyres"
    info = json.loads((folder / "preprocess_tiles_uint8.json").read_text())
    tensors = load_file(folder / "preprocess_tiles_uint8.safetensors")
    pinpoints = [[height, width] for width, height in info["pinpoints"]]
    tiling = check_tiling({"type": "anyres", "pinpoints": pinpoints}, tower_size=info["tile"], num_rungs=1)
    for case, facts in info["cases"].items():
        image = Image.fromarray(tensors[f"input.image_{case}"])
        tiles = anyres_tiles(image, tiling, BICUBIC)
        assert len(tiles) == facts["n"] == cut_image(tiling, (image.height, image.width)).views
        found = np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])
        assert np.array_equal(found, tensors[f"output.tiles_{case}"]), case
        square = np.asarray(on_square(image, (0.48145466, 0.4578275, 0.40821073))).transpose(2, 0, 1)
        expected = tensors[f"output.square_{case}"]
        expected = expected if expected.shape[0] == 3 else expected.transpose(2, 0, 1)
        assert np.array_equal(square, expected), case


def test_a_mosaic_is_cut_in_equal_parts_with_the_whole_image_last():
    image = picture((7, 9))
    parts = mosaic_tiles(image, 2)
    values = np.asarray(image)
    assert [part.size for part in parts] == [(4, 3)] * 4 + [(9, 7)]
    for part, (top, left) in zip(parts, [(0, 0), (0, 4), (3, 0), (3, 4)], strict=False):
        assert np.array_equal(np.asarray(part), values[top : top + 3, left : left + 4])
    assert np.array_equal(np.asarray(parts[-1]), values)
    assert len(mosaic_tiles(picture((1, 5)), 3)) == 10  # a line has no third of its height


@pytest.mark.parametrize("make", [next_processor, onevision_processor])
def test_our_tiles_equal_those_of_transformers_image_processors(make):
    tiling = check_tiling({"type": "anyres"}, tower_size=24, num_rungs=1)
    theirs = make()
    plain = stock_image_processor(
        "CLIPImageProcessor",
        size={"height": 24, "width": 24},
        do_center_crop=False,
        image_mean=list(theirs.image_mean),
        image_std=list(theirs.image_std),
    )
    cuts = [cut_image(tiling, size) for size in SIZES]
    mine = view_pixels(plain, PICTURES, cuts, tiling, {})
    stock = view_pixels(theirs, PICTURES, cuts, tiling, {})
    direct = theirs(PICTURES, image_grid_pinpoints=tiling["pinpoints"], return_tensors="np")["pixel_values"]
    assert np.array_equal(np.stack(stock), direct)
    assert np.abs(np.stack(mine) - direct).max() <= 1e-6


def test_images_shown_whole_equal_those_of_onevision():
    options = {"type": "anyres", "several_images": "whole"}
    tiling = check_tiling(options, tower_size=24, num_rungs=1)
    theirs = onevision_processor()
    direct = theirs([PICTURES[:1], PICTURES[1:]], image_grid_pinpoints=tiling["pinpoints"], return_tensors="np")[
        "pixel_values"
    ]
    cuts = [cut_image(tiling, size, whole=index > 0) for index, size in enumerate(SIZES)]
    assert [cut.views for cut in cuts[1:]] == [1, 1, 1]
    half = [0.5, 0.5, 0.5]
    plain = stock_image_processor(
        "CLIPImageProcessor", size={"height": 24, "width": 24}, do_center_crop=False, image_mean=half, image_std=half
    )
    for image_processor in (theirs, plain):
        mine = view_pixels(image_processor, PICTURES, cuts, tiling, {})
        assert np.abs(np.stack(mine) - direct).max() <= 1e-6


@pytest.mark.parametrize("make", [next_processor, onevision_processor])
@pytest.mark.parametrize("tensors", [None, "pt"])
def test_an_image_processor_for_tiles_gives_one_view_where_the_model_cuts_none(make, tensors):
    _, processor = model_and_processor(None, make())
    found = processor(images=PICTURES, text="<image> " * 4, return_tensors=tensors)["pixel_values"]
    base = make()(PICTURES, return_tensors="np")["pixel_values"][:, 0]
    assert np.array_equal(np.stack([np.asarray(view) for view in found]), base)


@pytest.mark.parametrize("height", [1, 3])
@pytest.mark.parametrize("tiling", [None, {"type": "mosaic", "n": 2}, {"type": "anyres"}])
def test_an_image_of_three_rows_is_not_taken_for_three_channels(height, tiling):
    _, processor = model_and_processor(tiling)
    plain = Image.new("RGB", (50, height), (255, 0, 0))
    pixels = processor(images=plain, text="<image>", return_tensors="np")["pixel_values"].reshape(-1, 3, 24, 24)
    red, green, blue = pixels[-1 if tiling is None or tiling["type"] == "mosaic" else 0]
    assert (red > 1.9).all() and (green < -1.7).all() and (blue < -1.4).all()


# ---- the processor and the model agree


TILINGS = {
    "joined": {"type": "anyres", "view_layout": "spatial_unpad"},
    "shrunk": {"type": "anyres", "view_layout": "spatial_unpad", "max_tiles": 1},
    "sequence": {"type": "anyres", "view_layout": "sequence"},
    "several whole": {"type": "anyres", "view_layout": "spatial_unpad", "several_images": "whole"},
    "mosaic": {"type": "mosaic", "n": 2},
}


@pytest.mark.parametrize("name", sorted(TILINGS))
@pytest.mark.parametrize("make", [None, next_processor, onevision_processor])
def test_counts_of_the_processor_are_those_of_the_model(name, make):
    pool = {"type": "average_pool", "factors": [1, 2, 3]}
    model, processor = model_and_processor(
        TILINGS[name], None if make is None else make(), compressor=pool, router={"type": "fixed", "rung": 1}
    )
    images, text = [PICTURES[:1], [], PICTURES[1:]], ["w5 <image> w6", "w7", "<image> <image> w8 <image>"]
    inputs = processor(images=images, text=text, layout="expanded", padding=True, return_tensors="pt")
    assert inputs["pixel_values"].dim() == 5 and inputs["image_sizes"].tolist() == [list(size) for size in SIZES]
    with torch.no_grad():
        out = model(**inputs)
        counts = out.num_visual_tokens.tolist()
        assert counts == processor.count_tokens(images)
        assert inputs["mm_token_type_ids"].sum(1).tolist() == [counts[0], 0, sum(counts[1:])]
        compact = processor(images=images, text=text, padding=True, return_tensors="pt")
        assert torch.equal(model(**compact).num_visual_tokens, out.num_visual_tokens)
        # a budget per image becomes one rung per view
        budget = processor(images=images, text=text, layout="expanded", visual_token_budget=200, padding=True,
                           return_tensors="pt")  # fmt: skip
        assert len(budget["visual_rungs"]) == len(out.visual_rungs)
        assert model(**budget).num_visual_tokens.tolist() == processor.count_tokens(images, visual_token_budget=200)
    # the hooks of serving engines
    wide = AdaptiveLlavaProcessor.from_config(
        model.config, word_tokenizer(), processor.image_processor, layout="expanded"
    )
    assert [wide.replace_image_token(inputs, index).count("<image>") for index in range(4)] == counts
    sizes_alone = wide._get_num_multimodal_tokens(image_sizes=SIZES)
    assert sizes_alone["num_image_tokens"] == wide.count_tokens(image_sizes=SIZES)
    assert sizes_alone["num_image_tokens"] == (counts if name != "several whole" else wide.count_tokens(PICTURES))
    assert wide.count_tokens(image_sizes=SIZES, images_per_prompt=[1, 3]) == counts


def test_counts_of_an_undecided_router_are_bounds_that_budgets_lower():
    model, processor = model_and_processor(TILINGS["sequence"], preset="dfmr")
    top = processor.count_tokens(PICTURES)
    for budget in (None, {"ceiling": 100}, {"ceiling": 30}):
        inputs = processor(images=PICTURES, text="<image> " * 4, visual_token_budget=budget, return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs).num_visual_tokens.tolist()
        bounds = processor.count_tokens(PICTURES, visual_token_budget=budget)
        assert all(count <= bound for count, bound in zip(found, bounds, strict=True))
        assert budget is None or max(bounds) <= budget["ceiling"]
    assert top == [5 * 36 + 2, 4 * 36 + 1, 3 * 36 + 1, 4 * 36 + 3]


def test_counts_are_read_from_the_header_with_the_image_upright(tmp_path):
    _, processor = model_and_processor(TILINGS["joined"])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    picture((37, 50)).save(tmp_path / "turned.jpg", exif=exif)
    content = (tmp_path / "turned.jpg").read_bytes()
    expected = processor.count_tokens(image_sizes=[(50, 37)])
    assert expected != processor.count_tokens(image_sizes=[(37, 50)])
    assert processor.count_tokens(str(tmp_path / "turned.jpg")) == processor.count_tokens(content) == expected
    assert processor.count_tokens([[content[:700]]]) == expected  # the pixels are not there
    assert processor.count_tokens(np.asarray(PICTURES[0])) == expected
    strip = np.asarray(picture((3, 50)))  # three rows, which could be three channels
    assert processor.count_tokens(strip, input_data_format="channels_last") == processor.count_tokens(
        image_sizes=[(3, 50)]
    )
    with pytest.raises(
        ValueError, match="`images=2` does not tell the tiles.*Pass the images themselves, or `image_s"
    ):
        processor.count_tokens(2)


def test_a_tiled_call_without_tensors_lists_one_array_per_image():
    _, processor = model_and_processor(TILINGS["joined"])
    inputs = processor(images=PICTURES, text="<image> " * 4)
    assert [pixels.shape for pixels in inputs["pixel_values"]] == [(5, 3, 24, 24)] * 4
    assert not inputs["pixel_values"][2][3:].any() and inputs["image_sizes"] == SIZES


def test_an_extremely_long_image_is_tiled_without_an_extremely_large_resize():
    long = Image.new("RGB", (30_000, 2), "red")
    for tiling in TILINGS.values():
        model, processor = model_and_processor(tiling)
        inputs = processor(images=long, text="<image>", return_tensors="pt")
        with torch.no_grad():
            assert model(**inputs).num_visual_tokens.tolist() == processor.count_tokens(long)


CODE = r"""
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=Image.open(sys.argv[2]), text="w5 <image> w6", return_tensors="pt")
with torch.no_grad():
    out = model(**inputs)
print(type(processor.image_processor).__name__, inputs["pixel_values"].shape[1], out.num_visual_tokens.tolist())
print(out.logits.double().sum().item())
"""


@pytest.mark.parametrize("make", [None, onevision_processor])
def test_a_tiled_checkpoint_works_where_the_package_is_not_installed(make, tmp_path):
    model, processor = model_and_processor(TILINGS["sequence"], None if make is None else make())
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    PICTURES[0].save(tmp_path / "picture.png")
    found = run_without_package(CODE, tmp_path / "saved", tmp_path / "picture.png", folder=tmp_path).split()
    with torch.no_grad():
        out = model(**processor(images=PICTURES[0], text="w5 <image> w6", return_tensors="pt"))
    kind = "CLIPImageProcessor" if make is None else type(processor.image_processor).__name__
    assert found[0].removesuffix("Pil") == kind.removesuffix("Pil")
    assert found[1:3] == ["5", str(out.num_visual_tokens.tolist())]
    assert abs(float(found[3]) - out.logits.double().sum().item()) <= 1e-3


# ---- checkpoints of transformers


def save_source(kind, folder):
    """A checkpoint folder with the image processor of its kind; OneVision's video processor needs torchvision."""
    model = stock(kind)
    model.save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    if kind == "llava_next":
        processor = LlavaNextProcessor(
            next_processor(), tokenizer, patch_size=4, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip
        processor.save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
        image_processor = onevision_processor()
        image_processor.image_grid_pinpoints = PINPOINTS
        image_processor.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_a_converted_checkpoint_reads_pictures_as_its_source_does(kind, tmp_path):
    source = save_source(kind, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", "llava", dtype="float32")
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    processor = AdaptiveLlavaProcessor.from_pretrained(tmp_path / "ours")
    text = ["w5 <image> w6", "w7 w8 <image> w9 w10"]
    inputs = processor(images=PICTURES[:2], text=text, layout="expanded", padding=True, return_tensors="pt")
    if kind == "llava_next":
        theirs = LlavaNextProcessor.from_pretrained(tmp_path / "source")
        expected = theirs(images=PICTURES[:2], text=text, padding=True, padding_side="left", return_tensors="pt")
        for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes"):
            assert torch.equal(inputs[name], expected[name]), name
        sizes = theirs._get_num_multimodal_tokens(image_sizes=SIZES)
        assert processor.count_tokens(image_sizes=SIZES) == sizes["num_image_tokens"]
    with torch.no_grad():
        found = model(**inputs).logits
        inputs.pop("mm_token_type_ids")
        assert (found - source(**inputs).logits)[inputs["attention_mask"].bool()].abs().max() <= 2e-5


# ---- a real page


def test_empty_tiles_of_a_page_cost_the_smallest_count(shared):
    """A pretrained tower, thresholds calibrated on whole pages, and pages in the middle of three tiles."""
    tower = load_mobilenet_tower(shared / "weights" / "mobilenet_v2_1.0_224_float.npz", image_size=192)
    text = LlamaForCausalLM(tiny_text_config("llama"))
    model = AdaptiveLlavaForConditionalGeneration.from_backbones(
        tower, text, "dfmr", image_token_id=IMAGE_TOKEN, vision_feature_layer=11,
        tiling={"type": "anyres", "pinpoints": [[192, 576]]},
    )  # fmt: skip
    processor = AdaptiveLlavaProcessor.from_config(model.config, word_tokenizer())
    pages = [image for _, image in open_images(shared / "data" / "documents", limit=12)]
    calibrate_thresholds(model, [mobilenet_pixels(pages, image_size=192)], shares=[0.3, 0.3, 0.4]).apply(model)
    upright = [page for page in pages if page.height > page.width]
    inputs = processor(images=upright, text="<image> " * len(upright), return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    assert len(upright) >= 8 and model.config.visual_token_counts == (16, 36, 144)
    whole, left, middle, right = out.visual_rungs.view(-1, 4).T
    assert not left.any() and not right.any()
    assert (middle > 0).sum() >= 6 and (whole > 0).sum() >= 6
    counts = torch.tensor(model.config.visual_token_counts)
    assert torch.equal(out.num_visual_tokens, counts[whole] + 16 + counts[middle] + 16 + 1)


def test_tiles_are_routed_alike_in_any_place_of_an_image():
    model, processor = model_and_processor(TILINGS["sequence"], preset="dfmr")
    noise, flat = np.asarray(picture((24, 24))), np.zeros((24, 24, 3), dtype=np.uint8)
    images = [Image.fromarray(np.concatenate(pair, axis=1)) for pair in ((noise, flat), (flat, noise))]
    inputs = processor(images=images, text="<image> <image>", return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    (_, *first), (_, *second) = out.visual_rungs.view(2, 3).tolist()
    assert first == second[::-1] and first[0] > first[1] == 0
