"""Any budget, replay, routing and cut of images gives a count for every view, or a refusal that says why."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from adaptive_llava.modeling.compressor_registry import COMPRESSORS
from adaptive_llava.modeling.option_schema import build_part
from adaptive_llava.modeling.router_registry import ROUTERS
from adaptive_llava.modeling.view_arrangement import ViewArrangement
from adaptive_llava.modeling.view_geometry import check_tiling, cut_image, image_costs
from adaptive_llava.modeling.visual_token_geometry import ImageCost, visual_token_grids, visual_token_ladder
from adaptive_llava.modeling.visual_tokens import Routing, VisionFeatures, VisualTokens, resolve_rungs
from adaptive_llava.processing.count_prediction import most_tokens, rungs_known_beforehand
from tests.conftest import IMAGE_TOKEN, TINY_COMPRESSORS, TINY_ROUTERS, tiny_images, tiny_model
from tests.hostile_cases import cases, junk, refused_well, scalars


ladders = st.lists(st.integers(1, 600), min_size=1, max_size=5).map(sorted).map(tuple)
counts = st.integers(1, 3000)
fitting = st.one_of(
    st.sampled_from([None, "auto"]),
    counts,
    st.fixed_dictionaries({"ceiling": counts}),
    st.fixed_dictionaries({"total": counts}),
    counts.map(torch.tensor),
)
numbers = st.one_of(st.integers(-5, 3000), st.sampled_from([2**31, 2**63, 10**30]), scalars)
budgets = st.one_of(
    fitting,
    numbers,
    st.lists(numbers, max_size=5),
    st.dictionaries(st.sampled_from(["total", "ceiling", "Total", ""]), numbers, max_size=2),
    st.lists(st.integers(-3, 600), max_size=5).map(torch.tensor),
    st.floats().map(torch.tensor),
    junk,
)
replays = st.one_of(st.none(), st.lists(st.integers(-2, 5), max_size=8), st.lists(numbers, max_size=4), junk)
OWN = "one rung per view"  # stands for a replay that fits the images


@st.composite
def image_lists(draw):
    """Costs of some images, a router's choice for their views, how many each prompt may claim to have, a decision."""
    ladder = draw(ladders)
    chance = draw(st.randoms(use_true_random=True))  # one draw for all: hypothesis takes long for many
    images = [
        ImageCost(ladder, chance.randint(1, 4), chance.randint(1, 3), chance.randint(0, 4))
        for _ in range(chance.randint(0, 5))
    ]
    views = sum(image.views for image in images)
    rungs = [chance.randrange(len(ladder)) for _ in range(views)]
    scores = [chance.choice([chance.random(), 0.5, -1.0, 3e38, math.inf, math.nan]) for _ in range(views)]
    split = [chance.randint(-1, 5) for _ in range(chance.randint(0, 5))]
    per_prompt = chance.choice([None, [len(images)], split])
    budget, replay = draw(
        st.one_of(
            st.tuples(fitting, st.none()),
            st.tuples(budgets, st.none()),
            st.tuples(st.none(), st.just(OWN) | replays),
            st.tuples(budgets, replays),
        )
    )
    if isinstance(budget, int) and chance.random() < 0.3:
        budget = [chance.choice([budget, chance.randint(1, 3000)]) for _ in images]
    if replay == OWN:
        replay = [chance.randrange(len(ladder)) for _ in range(views)]
    return images, rungs, scores, per_prompt, budget, replay


@cases(1400, image_lists())
def test_a_decision_gives_every_view_a_rung_and_keeps_the_budget(case):
    images, routed, scores, per_prompt, budget, replay = case
    routing = Routing(torch.tensor(routed, dtype=torch.long), torch.tensor(scores, dtype=torch.float32))
    with refused_well(said=r"`(visual_token_budget|visual_rungs|images_per_prompt)"):
        rungs = resolve_rungs(routing, images, images_per_prompt=per_prompt, budget=budget, rungs=replay)
        assert len(rungs) == len(routed) and all(type(rung) is int for rung in rungs)
        remaining = iter(rungs)
        spent = [image.tokens([next(remaining) for _ in range(image.views)]) for image in images]
        if isinstance(budget, int):
            assert all(tokens <= budget for tokens in spent)
        elif isinstance(budget, list):
            assert all(tokens <= bound for tokens, bound in zip(spent, budget, strict=True))
        elif isinstance(budget, dict) and set(budget) == {"ceiling"}:
            assert all(tokens <= budget["ceiling"] for tokens in spent)
        elif isinstance(budget, dict) and per_prompt is None:
            assert sum(spent) <= budget["total"]


@cases(1400, image_lists())
def test_the_processor_decides_as_the_model_does_or_refuses_too(case):
    images, routed, scores, per_prompt, budget, replay = case
    routing = Routing(torch.tensor(routed, dtype=torch.long), torch.tensor(scores, dtype=torch.float32))
    decided = refusal = None
    try:
        decided = resolve_rungs(routing, images, images_per_prompt=per_prompt, budget=budget, rungs=replay)
    except ValueError as error:
        refusal = error
    with refused_well(said=r"`(visual_token_budget|visual_rungs|images_per_prompt)"):
        known = rungs_known_beforehand((routed, scores), images, budget, replay, per_prompt)
        assert refusal is None, f"the processor takes what the model refuses: {refusal}"
        assert known == decided
        unrouted = rungs_known_beforehand(None, images, budget, replay, per_prompt)
        assert unrouted in (None, decided)
        if unrouted is None and replay is None:
            remaining = iter(decided)
            for image in images:
                spent = image.tokens([next(remaining) for _ in range(image.views)])
                assert spent <= most_tokens(image, budget)
        return
    assert refusal is not None, "the processor refuses what the model takes"


TILINGS = [
    {"type": "anyres", "view_layout": "sequence"},
    {"type": "anyres", "view_layout": "spatial_unpad"},
    {"type": "anyres", "view_layout": "spatial_unpad", "max_tiles": 2},
    {"type": "anyres", "view_layout": "spatial_unpad", "pinpoints": [[24, 24 * n] for n in range(1, 9)]},
]
sides = st.one_of(st.integers(1, 300), st.integers(1, 100_000), st.sampled_from([1, 20_000, 2**31]))


@cases(500, st.sampled_from(TILINGS), st.lists(st.tuples(sides, sides), min_size=1, max_size=3), st.data())
def test_images_of_any_size_cost_what_their_arrangement_gives(options, sizes, data):
    tiling = check_tiling(options, tower_size=24, num_rungs=3)
    compressor, grid = {"type": "average_pool", "factors": [1, 2, 3]}, (6, 6)
    cuts = [cut_image(tiling, size) for size in sizes]
    costs = image_costs(tiling, compressor, grid, cuts)
    rungs = [data.draw(st.integers(0, 2)) for cost in costs for _ in range(cost.units) for _ in range(1)]
    rungs = [rung for cost, rung in zip([c for c in costs for _ in range(c.units)], rungs, strict=True)
             for _ in range(cost.views_per_unit)]  # fmt: skip
    grids, ladder = visual_token_grids(compressor, grid), visual_token_ladder(compressor, grid)
    lengths = tuple(ladder[rung] for rung in rungs)
    arrange = ViewArrangement(2, view_layout=tiling["view_layout"], max_tiles=tiling["max_tiles"])
    tokens = VisualTokens(torch.arange(2.0 * sum(lengths)).view(-1, 2), lengths)
    arranged = arrange(tokens, cuts, [grids[rung] for rung in rungs])
    remaining = iter(rungs)
    assert arranged.lengths == tuple(cost.tokens([next(remaining) for _ in range(cost.views)]) for cost in costs)
    assert arranged.values.isfinite().all()


VALUES = [0.0, -0.0, 1.0, -3.5, 6e4, -6e4, 3e38, -3e38, 1e-38, math.inf, -math.inf, math.nan]


@cases(
    500,
    st.sampled_from(sorted(TINY_ROUTERS)),
    st.sampled_from(["average_pool", "query_resampler"]),
    st.lists(st.sampled_from(VALUES), min_size=6, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**20),
)
def test_a_router_judges_any_features_and_each_view_by_itself(kind, compressed_by, values, dtype, seed):
    compressor = build_part("compressor", COMPRESSORS, TINY_COMPRESSORS[compressed_by], 32, 32)
    router = build_part("router", ROUTERS, TINY_ROUTERS[kind], 32, compressor).eval()
    generator = torch.Generator().manual_seed(seed)
    spoilt = torch.randn(3, 36, 32, generator=generator)
    pixels = torch.randn(3, 3, 24, 24, generator=generator)
    for position, value in enumerate(values[:4]):  # the last view stays as it is
        spoilt[position % 2, int(spoilt.numel() * 0.37 * position) % 36] = value
        pixels[position % 2, :, int(7.3 * position)] = value
    features = _features(spoilt.to(dtype), pixels.to(dtype))
    routing = router(features)
    assert routing.rungs.shape == routing.scores.shape == (3,)
    assert all(rung in range(compressor.num_rungs) for rung in routing.rungs.tolist())
    assert routing.scores.dtype == torch.float32 and routing.scores.isfinite().all(), routing.scores
    alone = router(features.select([2]))
    assert torch.equal(alone.rungs, routing.rungs[2:])
    torch.testing.assert_close(alone.scores, routing.scores[2:])


def _features(patches: torch.Tensor, pixels: torch.Tensor) -> VisionFeatures:
    return VisionFeatures(
        patches=patches,
        grid=(6, 6),
        cls=patches[:, 0],
        pixels=pixels,
        views_per_image=(1,) * len(patches),
        blocks={1: patches},
        layer_cls=patches[:, 0],
    )


ids_of_rows = st.lists(
    st.lists(st.sampled_from([0, 1, 2, 5, IMAGE_TOKEN, IMAGE_TOKEN, 98]), min_size=1, max_size=7),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(name) for name in ("dfmr", "pre-fusion", "llava")}


@cases(60, st.sampled_from(["dfmr", "pre-fusion", "llava"]), ids_of_rows, st.data())
@torch.no_grad()
def test_rows_of_any_ids_and_masks_give_finite_states_in_their_own_places(models, name, rows, data):
    model, width = models[name], max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    shape = st.sampled_from([(len(rows), width)] * 5 + [(1, width), (len(rows), 1), (len(rows), width + 2)])
    mask = data.draw(st.none() | shape.flatmap(lambda size: _grids(st.integers(0, 1), size)), label="mask")
    positions = data.draw(st.none() | _grids(st.integers(0, 9), (len(rows), width)), label="positions")
    labels = data.draw(st.none() | _grids(st.sampled_from([-100, 5, IMAGE_TOKEN]), (len(rows), width)), label="labels")
    there = int((ids == IMAGE_TOKEN).sum())
    images = data.draw(st.just(there) | st.just(there) | st.integers(0, 4), label="images")
    pixels = tiny_images(max(images, 1))[:images] if data.draw(st.integers(0, 9)) else torch.zeros(images, 3, 5, 5)
    decision = st.one_of(
        st.fixed_dictionaries({}, optional={"visual_token_budget": fitting}),
        st.fixed_dictionaries({}, optional={"visual_token_budget": budgets, "visual_rungs": replays}),
    )
    options = data.draw(decision, label="decision")
    options |= data.draw(st.sampled_from([{}, {}, {"logits_to_keep": 1}, {"logits_to_keep": 3}]), label="kept")
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "pixel_values": pixels}
    with refused_well(said="`(visual|pixel|input_ids|attention|position|encoded|images|labels)|Row"):
        outputs = model(**inputs, **options, labels=labels)
        kept = options.get("logits_to_keep") or width
        assert outputs.logits.shape == (len(rows), min(kept, width), 100)
        shown = torch.ones_like(ids) if mask is None else mask
        assert outputs.logits[shown[:, -min(kept, width) :].bool()].isfinite().all()
        if images:
            assert len(outputs.num_visual_tokens) == images


def _grids(values, size):
    rows, width = size
    row = st.lists(values, min_size=width, max_size=width)
    return st.lists(row, min_size=rows, max_size=rows).map(torch.tensor)
