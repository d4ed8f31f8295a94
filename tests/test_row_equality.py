"""What a row gets does not depend on its batch: random batches against each of their rows alone.

Alone a row is the plainest call there is: its ids in float32 under SDPA, without mask, positions or padding. A batch
draws its rows, images, sizes, budget, layout, padding, mask, attention and precision. `ADAPTIVE_LLAVA_EXAMPLES=50`
draws fifty times as many batches, others in every run.

Counts near a threshold: a router reads a statistic of a view, and rounds it otherwise in another batch, precision or
image reader. A count may differ between two of them only where the statistic lies within `NEAR` of a threshold. The
exception is `pixel_std`, whose statistic of the same pixels has the same bits everywhere.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers.utils import is_torchvision_available

from adaptive_llava.modeling.router_window_spread import WindowSpreadRouter
from adaptive_llava.modeling.view_geometry import ImageViews, cut_image, image_costs
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.processing.tower_image_processor import square_image_processor
from tests.conftest import (
    IMAGE_TOKEN,
    MODELS_HERE,
    TINY_COMPRESSORS,
    TINY_ROUTERS,
    batch_rows,
    tiny_images,
    tiny_model,
    tiny_vision_config,
)


pytestmark = pytest.mark.compat

IMG = IMAGE_TOKEN
NEW = 3
EXAMPLES = int(os.environ.get("ADAPTIVE_LLAVA_EXAMPLES", "1"))
# Share of a threshold (of a probability: the difference) within which a count may depend on how it was computed.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.03}
NEAR_READERS = 2e-3  # PIL and torchvision resize with other roundings
# Largest difference of logits; in bfloat16 as a share of the largest logit, two roundings of eight bits a layer.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
MODELS: dict[str, dict] = {
    **{preset: {"preset": preset} for preset in MODELS_HERE},
    "pixel routing": {"preset": "dfmr", "router": TINY_ROUTERS["pixel_std"]},
    "sequence": {"preset": "dfmr", "tiling": {"type": "anyres", "view_layout": "sequence"}},
    "map": {"preset": "dfmr", "tiling": {"type": "anyres", "view_layout": "spatial_unpad"}},
    "mosaic": {"preset": "dfmr", "tiling": {"type": "mosaic"}},
    "all parts": {
        "compressor": TINY_COMPRESSORS["query_resampler"],
        "router": TINY_ROUTERS["classifier"],
        "fusion_blocks": "default",
        "prefusion_layers": 1,
        "tiling": {"type": "anyres", "view_layout": "sequence"},
    },
}
SIZES = [(50, 37), (20, 80), (24, 24), (90, 31)]  # height, width in pixels
TEXT = st.lists(st.integers(3, 90), min_size=0, max_size=3)


def examples(number: int):
    """A few examples, the same in every run; with `ADAPTIVE_LLAVA_EXAMPLES` many, and others each time."""
    return settings(
        max_examples=number * EXAMPLES,
        derandomize=EXAMPLES == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32):
    return tiny_model(**MODELS[name]).to(dtype)


@dataclass
class Batch:
    """Rows with their images and everything that may vary about a call.

    Attributes:
        rows: Ids with one placeholder per image.
        images: `pixel_values` of all images, and `image_sizes` with AnyRes.
        cuts: How each image is cut into views.
        decision: `visual_token_budget`, `visual_rungs`, or nothing.
    """

    rows: list[list[int]]
    images: dict[str, Tensor]
    cuts: list[ImageViews]
    decision: dict[str, Any]
    layout: str
    side: str
    mask: torch.dtype
    attention: str
    dtype: torch.dtype
    encoded_beforehand: bool
    first: list[int] = field(init=False)

    def __post_init__(self):
        self.first = np.cumsum([0, *(row.count(IMG) for row in self.rows)]).tolist()

    def row_alone(self, row: int) -> dict[str, Any]:
        """Arguments of one row."""
        own = slice(self.first[row], self.first[row + 1])
        ids = {"input_ids": torch.tensor([self.rows[row]])}
        if own.start == own.stop:
            return ids
        views = [0, *np.cumsum([cut.views for cut in self.cuts]).tolist()]
        decision = dict(self.decision)
        if isinstance(decision.get("visual_token_budget"), list):
            decision["visual_token_budget"] = decision["visual_token_budget"][own]
        if "visual_rungs" in decision:
            decision["visual_rungs"] = decision["visual_rungs"][views[own.start] : views[own.stop]]
        return ids | {name: value[own] for name, value in self.images.items()} | decision

    def together(self, model) -> tuple[dict[str, Any], list[list[int]]]:
        """Arguments of the batch, and for each id of each row its column there."""
        inputs: dict[str, Any] = {} if not self.cuts else self.images | self.decision
        rows, columns = self.rows, [list(range(len(row))) for row in self.rows]
        if self.cuts and (self.encoded_beforehand or self.layout == "expanded"):
            per_prompt = [row.count(IMG) for row in self.rows]
            encoded = model.encode_images(**inputs, images_per_prompt=per_prompt)
            inputs = {"encoded_images": encoded}
            if self.layout == "expanded":
                counts = iter(encoded.lengths)
                widths = [[next(counts) if token == IMG else 1 for token in row] for row in rows]
                rows = [np.repeat(row, width).tolist() for row, width in zip(rows, widths, strict=True)]
                columns = [(np.cumsum(width) - 1).tolist() for width in widths]
                if not self.encoded_beforehand:
                    inputs = self.images | {"visual_rungs": list(encoded.rungs)}
        if self.layout == "packed":
            starts = np.cumsum([0, *map(len, rows)]).tolist()
            inputs["input_ids"] = torch.tensor([list(chain.from_iterable(rows))])
            inputs["position_ids"] = torch.tensor([[place for row in rows for place in range(len(row))]])
            return inputs, [[start + column for column in own] for start, own in zip(starts, columns, strict=False)]
        ids, mask = batch_rows(rows, self.side)
        if self.side == "left":
            columns = [
                [ids.shape[1] - len(row) + column for column in own] for row, own in zip(rows, columns, strict=True)
            ]
        return inputs | {"input_ids": ids, "attention_mask": mask.to(self.mask)}, columns


@st.composite
def batches(draw, name: str, *, generating: bool = False) -> Batch:
    model = model_of(name)
    config = model.config
    pieces = draw(st.lists(st.lists(TEXT, min_size=1, max_size=4), min_size=1, max_size=5))
    # text, then an image before each further piece of text
    rows = [[*row[0], *chain.from_iterable([IMG, *piece] for piece in row[1:])] or [7] for row in pieces]
    if generating:
        rows = [[*row, 8] for row in rows]
    count = sum(row.count(IMG) for row in rows)
    sizes = draw(st.lists(st.sampled_from(SIZES), min_size=count, max_size=count))
    anyres = config.tiling["type"] == "anyres"
    cuts = [cut_image(config.tiling, size) if anyres else ImageViews() for size in sizes]
    views = sum(cut.views for cut in cuts)
    images = images_of(config.tiling, sizes, cuts, draw(st.integers(0, 2**16)))
    decision = draw(decisions(config, rows, cuts, views)) if count else {}
    side = "left" if generating else draw(st.sampled_from(["left", "right"]))
    layouts = ["compact", "expanded"] if generating else ["compact", "expanded", "packed"]
    dtypes = [torch.float32] if generating else [torch.float32, torch.float32, torch.bfloat16]
    return Batch(
        rows, images, cuts, decision, draw(st.sampled_from(layouts)), side,
        mask=draw(st.sampled_from([torch.long, torch.bool, torch.float32])),
        attention=draw(st.sampled_from(["sdpa", "eager", "flex_attention"])),
        dtype=draw(st.sampled_from(dtypes)),
        encoded_beforehand=draw(st.booleans()),
    )  # fmt: skip


def images_of(tiling, sizes, cuts, seed: int) -> dict[str, Tensor]:
    if tiling["type"] == "mosaic":
        return {"pixel_values": tiny_images(5 * len(sizes), seed).unflatten(0, (-1, 5))} if sizes else {}
    pixels = tiny_images(sum(cut.views for cut in cuts), seed)
    if tiling["type"] != "anyres" or not sizes:
        return {"pixel_values": pixels}
    views = pixels.split([cut.views for cut in cuts])
    return {
        "pixel_values": torch.nn.utils.rnn.pad_sequence(list(views), batch_first=True),
        "image_sizes": torch.tensor(sizes),
    }


def decisions(config, rows, cuts, views: int):
    """Every form of a budget that these images can keep, and replays."""
    costs = image_costs(config.tiling, config.compressor, config.view_grid, cuts)
    smallest, spare = [cost.counts[0] for cost in costs], st.integers(0, 60)
    ends = np.cumsum([row.count(IMG) for row in rows]).tolist()
    least = max(sum(smallest[end - row.count(IMG) : end]) for row, end in zip(rows, ends, strict=True))
    each = [st.integers(floor, floor + 60) for floor in smallest]
    return st.one_of(
        st.sampled_from([{}, {"visual_token_budget": "auto"}]),
        spare.map(lambda more: {"visual_token_budget": max(smallest) + more}),
        st.tuples(*each).map(lambda budgets: {"visual_token_budget": list(budgets)}),
        spare.map(lambda more: {"visual_token_budget": {"ceiling": max(smallest) + more}}),
        spare.map(lambda more: {"visual_token_budget": {"total": least + more}}),
        st.lists(st.integers(0, len(config.visual_token_counts) - 1), min_size=views, max_size=views).map(
            lambda rungs: {"visual_rungs": rungs}
        ),
    )


class Attention:
    """A model under an attention implementation, and under SDPA again afterwards. Flex kernels are not compiled."""

    def __init__(self, model, kind: str):
        self.model, self.kind = model, kind
        self.stance = torch.compiler.set_stance("force_eager") if kind == "flex_attention" else nullcontext()

    def __enter__(self):
        self.model.set_attn_implementation(self.kind)
        self.stance.__enter__()

    def __exit__(self, *error):
        self.stance.__exit__(*error)
        self.model.set_attn_implementation("sdpa")


def margins(model, features: VisionFeatures) -> Tensor:
    """How far each view's statistic is from the nearest threshold, `(V,)`, as a share of it."""
    router = model.model.router
    if isinstance(router, WindowSpreadRouter) and router.thresholds:
        thresholds = torch.tensor(router.thresholds)
        return ((router.window_spread(features) - thresholds).abs() / thresholds).amin(1)
    logits = router(features).logits
    if logits is None:
        return torch.full((len(features.patches),), float("inf"))
    best = logits.float().softmax(-1).topk(2).values  # for two rungs P(document) and its rest, cut at 0.5
    return (best[:, 0] - best[:, 1]) / 2


def check_rungs(model, batch: Batch, found: Tensor, expected: Tensor) -> bool:
    """Equal, but for views near a threshold; whether all are."""
    if torch.equal(found, expected):
        return True
    near = margins(model, model.model.extract_features(**batch.images)) <= NEAR[batch.dtype]
    # one image near a threshold may change what is left of a total to others
    assert near[found != expected].all() or (near.any() and "total" in str(batch.decision))
    return False


@pytest.mark.parametrize("name", MODELS)
@examples(4)
@given(data=st.data())
@torch.no_grad()
def test_every_row_of_a_batch_gets_what_it_gets_alone(name, data):
    batch = data.draw(batches(name))
    model = model_of(name, batch.dtype)
    with Attention(model, batch.attention):
        inputs, columns = batch.together(model)
        together = model(**inputs)
    alone = [model_of(name, batch.dtype)(**batch.row_alone(row)) for row in range(len(batch.rows))]
    if batch.cuts:
        told = [one for one in alone if one.num_visual_tokens is not None]
        if not check_rungs(model, batch, together.visual_rungs, torch.cat([one.visual_rungs for one in told])):
            return
        assert torch.equal(together.num_visual_tokens, torch.cat([one.num_visual_tokens for one in told]))
        scores = torch.cat([one.visual_router_scores for one in told])
        close = NEAR[batch.dtype] * scores.abs().max().clamp(min=1)
        assert (together.visual_router_scores - scores).abs().max() <= close
    for row, one in enumerate(alone):
        logits = together.logits[0 if batch.layout == "packed" else row, columns[row]]
        scale = 1.0 if batch.dtype == torch.float32 else one.logits.abs().max()
        assert (logits - one.logits[0]).abs().max() <= CLOSE[batch.dtype] * scale, f"row {row}"


@pytest.mark.parametrize("name", MODELS)
@examples(2)
@given(data=st.data())
@torch.no_grad()
def test_every_row_of_a_batch_is_answered_as_alone(name, data):
    batch, model = data.draw(batches(name, generating=True)), model_of(name)
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    ways = [{}, {"use_cache": False}, {"prefill_chunk_size": 5}]
    if batch.attention != "flex_attention":  # see tests/test_generation_modes.py
        ways.append({"cache_implementation": "static"})
    with Attention(model, batch.attention):
        inputs, _ = batch.together(model)
        together = model.generate(**inputs, **options, **data.draw(st.sampled_from(ways)))
    for row in range(len(batch.rows)):
        alone = model.generate(**batch.row_alone(row), **options)
        for step in range(NEW):
            expected, found = alone.logits[step][0], together.logits[step][row]
            assert (found - expected).abs().max() <= CLOSE[torch.float32], f"row {row}, step {step}"
            best = expected.topk(2).values
            if best[0] - best[1] <= 2 * CLOSE[torch.float32]:
                break  # either is the most likely, and what follows may differ
            new = [sequences[-NEW:][step] for sequences in (alone.sequences[0], together.sequences[row])]
            assert new[0] == new[1], f"row {row}, step {step}"


ROUTED = {
    "feature_std": {"preset": "dfmr"},
    "pixel_std": {"preset": "dfmr", "router": TINY_ROUTERS["pixel_std"]},
    "classifier of two counts": {"preset": "dynamic-resampler"},
    "classifier of three counts": {"preset": "dfmr", "router": TINY_ROUTERS["classifier"]},
}


@pytest.mark.parametrize("way", ["bf16 weights", "bf16 weights and pixels", "autocast"])
@pytest.mark.parametrize("name", ROUTED)
@examples(4)
@given(seed=st.integers(0, 2**16))
@torch.no_grad()
def test_counts_of_float32_and_bfloat16_are_equal_but_near_a_threshold(name, way, seed):
    model, pixels = tiny_model(**ROUTED[name]), tiny_images(12, seed)
    exact = torch.tensor(model.encode_images(pixels).rungs)
    far = margins(model, model.model.extract_features(pixels)) > NEAR[torch.bfloat16]
    if name == "pixel_std":  # pixels are rounded to bfloat16 before anything is summed
        far = torch.ones_like(far)
    if way != "autocast":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found = model.encode_images(pixels.bfloat16() if "pixels" in way else pixels)
    assert far.sum() >= 6
    assert torch.equal(torch.tensor(found.rungs)[far], exact[far])


@pytest.mark.skipif(
    not is_torchvision_available() or not hasattr(transformers, "CLIPImageProcessorPil"),
    reason="PIL reads all images: there is no torchvision, or this transformers uses it only when asked to",
)
@examples(5)
@given(seed=st.integers(0, 2**16), width=st.integers(20, 600), height=st.integers(20, 600))
def test_counts_of_pil_and_torchvision_are_equal_but_near_a_threshold(seed, width, height):
    noise = np.random.default_rng(seed).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images = [Image.fromarray(noise[0]), Image.fromarray(np.full_like(noise[1], noise[1, 0, 0]))]
    images = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
    model = tiny_model("dfmr", router=TINY_ROUTERS["pixel_std"])
    torchvision = square_image_processor(tiny_vision_config())
    pil = transformers.CLIPImageProcessorPil(size=torchvision.size, do_center_crop=False)
    assert type(torchvision) is transformers.CLIPImageProcessor
    pixels = [reader(images, return_tensors="pt")["pixel_values"] for reader in (pil, torchvision)]
    far = margins(model, model.model.extract_features(pixels[0])) > NEAR_READERS
    rungs = [torch.tensor(model.encode_images(read).rungs)[far] for read in pixels]
    assert torch.equal(*rungs)
