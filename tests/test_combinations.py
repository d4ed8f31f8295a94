"""Every compressor with every other part under every router works, or its config says why not."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    MobileNetV2Config,
    PixtralVisionConfig,
    SwinConfig,
    ViTMAEConfig,
)

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.backbone_assembly import OWN_PARTS
from adaptive_llava.modeling.vision_tower_features import has_class_token
from tests.conftest import (
    IMAGE_TOKEN,
    TINY_COMPRESSORS,
    TINY_ROUTERS,
    tiny_images,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)
from tests.test_anyres_models import pixels_of


pytestmark = pytest.mark.compat

ROWS = torch.tensor([[5, IMAGE_TOKEN, 6, 7, IMAGE_TOKEN, 8], [IMAGE_TOKEN, 9, 10, 11, 12, 13]])
SEQUENCE = {"tiling": {"type": "anyres", "view_layout": "sequence"}}
MAP = {"tiling": {"type": "anyres", "view_layout": "spatial_unpad"}}
MOSAIC = {"tiling": {"type": "mosaic"}}
BOTH = {"fusion_blocks": "default", "prefusion_layers": 1}
PARTS = {
    "alone": {},
    "fusion": {"fusion_blocks": "default"},
    "pre-fusion": {"prefusion_layers": 1},
    "sequence": SEQUENCE,
    "map": MAP,
    "mosaic": MOSAIC,
    "two layers": {"vision_feature_layer": [-2, -1]},
    "fusion, pre-fusion, sequence": BOTH | SEQUENCE,
    "fusion, pre-fusion, map": BOTH | MAP,
    "fusion, pre-fusion, mosaic": BOTH | MOSAIC,
}
ROUTERS_OF = {"clip": TINY_ROUTERS, "siglip": {"classifier": TINY_ROUTERS["classifier"] | {"features": "mean"}}}
# What cannot work: tokens that are no patches cannot be fused with patches, and those without a grid form no map.
NO_PATCHES = {name: r"reads patches through the projector.*takes no patches" for name in PARTS if "pre-fusion" in name}
REFUSED_PARTS = {
    "token_concat": NO_PATCHES,
    "spatial_fusion": NO_PATCHES | {"map": r"'spatial_fusion' compressor form no grid. Use view_layout='sequence'"},
}


def images_for(config) -> dict:
    """Three images as the tiling wants them."""
    if config.tiling["type"] == "anyres":
        pixels, sizes, _ = pixels_of(config.tiling, [(20, 80), (24, 24), (50, 37)])
        return {"pixel_values": pixels, "image_sizes": sizes}
    if config.tiling["type"] == "mosaic":
        return {"pixel_values": tiny_images(15).unflatten(0, (3, 5))}
    return {"pixel_values": tiny_images(3)}


WORKING = [(name, part) for name in TINY_COMPRESSORS for part in PARTS if part not in REFUSED_PARTS.get(name, {})]


@pytest.mark.parametrize("vision", ROUTERS_OF)
@pytest.mark.parametrize(("name", "part"), WORKING)
def test_a_combination_answers_and_learns_under_every_router(name, part, vision):
    for router in ROUTERS_OF[vision].values():
        model = tiny_model(vision=vision, compressor=TINY_COMPRESSORS[name], router=router, **PARTS[part])
        inputs = {"input_ids": ROWS, **images_for(model.config)}
        with torch.no_grad():
            assert torch.isfinite(model(**inputs).logits).all()
            answers = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert answers.shape == (2, ROWS.shape[1] + 2)
        model.train()(**inputs, labels=ROWS).loss.backward()
        for part_name in OWN_PARTS:
            module = getattr(model.model, part_name)
            for parameter_name, parameter in module.named_parameters() if module is not None else ():
                if parameter.requires_grad:  # a learned router waits for its own training
                    assert parameter.grad is not None, f"{part_name}.{parameter_name}"
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "part"), WORKING)
@torch.no_grad()
def test_a_combination_in_bf16_is_finite_and_near_full_precision(name, part):
    model = tiny_model(compressor=TINY_COMPRESSORS[name], router=TINY_ROUTERS["classifier"], **PARTS[part])
    inputs = {"input_ids": ROWS, **images_for(model.config)}
    exact = model(**inputs)
    logits = model.bfloat16()(**inputs, visual_rungs=exact.visual_rungs).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert (logits.float() - exact.logits).norm() <= 0.1 * exact.logits.norm()


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in REFUSED_PARTS for part in REFUSED_PARTS[name]])
def test_a_combination_that_cannot_work_is_refused_under_every_router(name, part):
    for router in TINY_ROUTERS.values():
        with pytest.raises(ValueError, match=REFUSED_PARTS[name][part]):
            tiny_model(compressor=TINY_COMPRESSORS[name], router=router, **PARTS[part])


def clip(**fields) -> CLIPVisionConfig:
    return CLIPVisionConfig(**(tiny_vision_config().to_dict() | fields))


def text(kind: str, **fields):
    return AutoConfig.for_model(kind, **fields)


CONVOLUTIONAL = {"vision_config": MobileNetV2Config(), "vision_feature_dim": 16, "vision_grid": [5, 7]}
SWIN = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
POOLED = {"compressor": TINY_COMPRESSORS["average_pool"]}
FUSED = {"compressor": TINY_COMPRESSORS["spatial_fusion"]}
CLASSIFIER = POOLED | {"router": {"type": "classifier", "features": "cls"}}
PIXELS = POOLED | {"router": {"type": "pixel_std"}}

# Every pair of options that each work elsewhere, with the reason why not together.
REFUSED = {
    "a map of tokens that form no grid": (FUSED | MAP, r"'spatial_fusion' compressor form no grid"),
    "pre-fusion behind a compressor that projects": (
        FUSED | {"prefusion_layers": 1},
        r"`prefusion_layers=1` reads patches .*'spatial_fusion' takes no patches \(it is part of the compressor\)",
    ),
    "pre-fusion behind joined patches": (
        {"compressor": TINY_COMPRESSORS["token_concat"], "prefusion_layers": 1},
        r"'token_concat' takes no patches \(it reads 128 channels where a patch has 32\)",
    ),
    "pre-fusion of layers that do not stand alone": (
        {"prefusion_layers": 1, "text_config": text("gemma", hidden_size=32, num_hidden_layers=2)},
        r"those of 'gemma' are not known to work on their own",
    ),
    "fusion on a convolutional tower": (
        CONVOLUTIONAL | {"fusion_blocks": "default"},
        r"hidden states share one grid and width, and 'mobilenet_v2' has no such blocks",
    ),
    "fusion on a pyramid": (
        {"vision_config": SWIN, "vision_feature_dim": 16, "vision_grid": [4, 4], "fusion_blocks": "default"},
        r"'swin' has no such blocks",
    ),
    "fusion of a list of layers": (
        {"fusion_blocks": "default", "vision_feature_layer": [-2, -1]},
        r"`vision_feature_layer=\[-2, -1\]` and `fusion_blocks` both join hidden states",
    ),
    "fusion of blocks that are not there": (
        {"fusion_blocks": [4]},
        r"distinct hidden states of a tower with 3 layers",
    ),
    "a layer that is not there": ({"vision_feature_layer": -9}, r"`vision_feature_layer=-9` is not there: this tower"),
    "a list with a layer that is not there": ({"vision_feature_layer": [-2, 4]}, r"hidden states 0 to 3, or -1 to -4"),
    "an empty list of layers": ({"vision_feature_layer": []}, r"`vision_feature_layer=\[\]` must be the index of"),
    "a layer that is no number": ({"vision_feature_layer": 2.0}, r"`vision_feature_layer=2.0` must be the index of"),
    "a tower whose config tells no grid": ({"vision_config": SWIN}, r"'swin' does not tell the width and grid"),
    "images smaller than a patch": ({"vision_config": clip(patch_size=30)}, r"`vision_grid=\[0, 0\]`.*hold a patch"),
    "a grid that is no grid": (
        CONVOLUTIONAL | {"vision_grid": [5]},
        r"`vision_grid=\[5\]` and .* must be whole numbers",
    ),
    "[CLS] of SigLIP": (
        CLASSIFIER | {"vision_config": tiny_vision_config("siglip")},
        r"reads the \[CLS\] state, and 'siglip_vision_model' towers have none. Set its 'features' to 'mean'",
    ),
    "[CLS] of a convolutional tower": (CLASSIFIER | CONVOLUTIONAL, r"'mobilenet_v2' towers have none"),
    "a classifier on a block that is not there": (
        POOLED | {"router": {"type": "classifier", "blocks": [4]}},
        r"reads hidden states \[4\], and this tower of 3 layers has 0 to 3",
    ),
    "a probability between more than two counts": (
        POOLED | {"router": {"type": "classifier", "threshold": 0.3}},
        r"`router.threshold=0.3` has no meaning for 3 token counts",
    ),
    "thresholds for another ladder": (
        POOLED | {"router": {"type": "feature_std", "thresholds": [0.1]}},
        r"`router.thresholds=\[0.1\]` must be a list of 2",
    ),
    "a fixed rung above the ladder": ({"router": {"type": "fixed", "rung": 1}}, r"no rung of a compressor with 1"),
    "a router's window larger than the grid": (
        POOLED | {"router": {"type": "feature_std", "windows": [9, 2]}},
        r"`router.windows=9` leaves nothing of a 6x6 patch grid",
    ),
    "a mosaic finer than the pixels a router reads": (
        PIXELS | {"tiling": {"type": "mosaic", "n": 6}},
        r"'pixel_std'` reads a mosaic's whole image, and its 24x24 pixels are less than one for each of 36x36 patches",
    ),
    "windows larger than the grid": (
        {"compressor": {"type": "token_concat", "window": 7}},
        r"leaves nothing of a 6x6",
    ),
    "factors larger than the grid": ({"compressor": {"type": "average_pool", "factors": [7]}}, r"`factors=7` leaves"),
    "windows that must tile the grid": (
        {"compressor": {"type": "spatial_fusion", "window": 4, "strict_tiling": True}},
        r"does not tile a 6x6 patch grid and `strict_tiling=True`",
    ),
    "groups that do not share the channels": (
        {"compressor": {"type": "spatial_fusion", "fused_tokens": 3}},
        r"`compressor.fused_tokens=3` cannot cut the 32 channels",
    ),
    "queries that stand on no square": (
        {"compressor": {"type": "query_resampler", "counts": [1, 200]}},
        r"must be strictly rising square numbers",
    ),
    "heads that do not share the channels": (
        {"compressor": {"type": "query_resampler"}, "vision_config": clip(hidden_size=36)},
        r"`compressor.num_heads=8` must divide the width of the vision features, 36",
    ),
    "positions in a width that four does not divide": (
        {"compressor": {"type": "query_resampler"}, "vision_config": clip(hidden_size=30, num_attention_heads=2)},
        r"width is divisible by 4.* these are 30 wide",
    ),
    "places compared in heads too narrow for a wave": (
        {"compressor": {"type": "query_resampler", "num_heads": 16}},
        r"leaves heads of 2 channels at width 32.*Use fewer heads",
    ),
    "square tiles for a tower that reads none": (
        {
            "vision_config": text("vit", hidden_size=32, image_size=[24, 16], patch_size=4),
            "tiling": {"type": "anyres"},
        },
        r"'anyres' cuts square tiles, but the tower reads images of 24x16 pixels",
    ),
    "tiles of another size than the tower's": (
        {"tiling": {"type": "anyres", "tile_size": 48}},
        r"input size, 24 pixels",
    ),
    "resolutions that tiles do not fill": (
        {"tiling": {"type": "anyres", "pinpoints": [[24, 30]]}},
        r"each a multiple",
    ),
    "a smaller map where there is none": (
        {"tiling": SEQUENCE["tiling"] | {"max_tiles": 4}},
        r"shrinks the map that view_layout='spatial_unpad' joins the tiles to, and 'sequence' makes none",
    ),
    "an encoder in the language model": ({"text_config": text("t5")}, r"of type 't5' has an encoder"),
    "a language model without a cache": ({"text_config": text("mamba")}, r"of type 'mamba' has no attention"),
    "a language model that is several": ({"text_config": text("qwen2_vl")}, r"'qwen2_vl' describes several models"),
    "embeddings narrower than the language model": (
        {"text_config": text("opt", hidden_size=32, word_embed_proj_dim=16)},
        r"has embeddings of width 16 in front of layers of width 32",
    ),
    "an activation that is not there": ({"projector_hidden_act": "gleu"}, r"`projector_hidden_act='gleu'` is unknown"),
    "a placeholder that is no id": ({"image_token_id": -1}, r"`image_token_id=-1` must be a whole number >= 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_the_config_with_its_reason(name):
    fields, message = REFUSED[name]
    backbones = {"vision_config": tiny_vision_config(), "text_config": tiny_text_config()}
    with pytest.raises(ValueError, match=message):
        AdaptiveLlavaConfig(**({"image_token_id": IMAGE_TOKEN} | backbones | fields))


TINY_TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24,
    "patch_size": 4,
}  # fmt: skip


def from_tower(tower, **fields):
    language_model = AutoModelForCausalLM.from_config(tiny_text_config())
    return AdaptiveLlavaForConditionalGeneration.from_backbones(
        AutoModel.from_config(tower), language_model, image_token_id=IMAGE_TOKEN, **fields
    )


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (SWIN, r"`vision` \(SwinModel\) gives no patch grid .*gave 16 tokens for a 8x8 patch grid"),
        (ViTMAEConfig(**TINY_TOWER), r"`vision` \(ViTMAEModel\) gives no patch grid .*gave 10 tokens for a 6x6"),
        (PixtralVisionConfig(**TINY_TOWER), r"`vision` \(PixtralVisionModel\) .*gave 1 rows of tokens for 2 images"),
    ],
    ids=["a pyramid", "a tower that drops patches", "a tower that joins its images"],
)
def test_a_tower_that_gives_no_patch_grid_is_refused_when_it_is_joined(tower, message):
    with pytest.raises(ValueError, match=message + r".*Use a ViT with one token per patch \(CLIP"):
        from_tower(tower)


def test_a_tower_of_patches_alone_is_read_by_its_mean():
    tower = AutoConfig.for_model("ijepa", **TINY_TOWER)
    assert not has_class_token(tower)
    model = from_tower(tower, preset="dfmr", router={"type": "classifier"})
    assert model.config.router["features"] == "mean"
    assert model.encode_images(tiny_images(2)).lengths == (36, 36)
