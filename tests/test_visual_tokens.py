"""Who decides the rungs of a call: router, budget or replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptive_llava.modeling.visual_token_geometry import ImageCost
from adaptive_llava.modeling.visual_tokens import Routing, VisionFeatures, resolve_rungs, to_host


pytestmark = pytest.mark.compat

LADDER = (4, 9, 36)


def costs(*views: int) -> list[ImageCost]:
    """Of images with so many views, each at its own rung."""
    return [ImageCost(LADDER, units=number) for number in views]


def routing(*rungs: int, scores: list[float] | None = None) -> Routing:
    return Routing(torch.tensor(rungs), torch.tensor(scores if scores is not None else [float(r) for r in rungs]))


@pytest.mark.parametrize("budget", [None, "auto"])
def test_without_a_budget_the_router_decides(budget):
    assert resolve_rungs(routing(2, 0, 1), costs(1, 1, 1), budget=budget) == [2, 0, 1]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (36, [2, 2, 2]),
        (35, [1, 1, 1]),
        (4, [0, 0, 0]),
        ([4, 36, 10], [0, 2, 1]),
        ((4, 36, 10), [0, 2, 1]),
        (torch.tensor([4, 36, 10]), [0, 2, 1]),
        (torch.tensor(10), [1, 1, 1]),
    ],
)
def test_a_number_or_a_list_replaces_the_router(budget, expected):
    assert resolve_rungs(routing(2, 0, 1), costs(1, 1, 1), budget=budget) == expected


def test_a_ceiling_lowers_the_router_and_never_raises_it():
    assert resolve_rungs(routing(2, 0, 1), costs(1, 1, 1), budget={"ceiling": 9}) == [1, 0, 1]
    assert resolve_rungs(routing(2, 0, 1), costs(1, 1, 1), budget={"ceiling": 36}) == [2, 0, 1]
    assert resolve_rungs(routing(2, 0, 1), costs(1, 1, 1), budget={"ceiling": 4}) == [0, 0, 0]


def test_a_budget_bounds_all_views_of_an_image_together():
    # image 0 has one view, image 1 three: 27 tokens pay for 3 x 9
    assert resolve_rungs(routing(2, 2, 0, 2), costs(1, 3), budget=27) == [1, 1, 1, 1]
    assert resolve_rungs(routing(2, 2, 0, 2), costs(1, 3), budget=[36, 26]) == [2, 0, 0, 0]
    assert resolve_rungs(routing(2, 2, 0, 2), costs(1, 3), budget={"ceiling": 36}) == [2, 1, 0, 1]


def test_views_joined_to_one_map_share_the_largest_choice_of_the_router():
    image = ImageCost(LADDER, views_per_unit=3)
    assert resolve_rungs(routing(0, 2, 1), [image]) == [2, 2, 2]
    assert resolve_rungs(routing(0, 2, 1), [image], budget={"ceiling": 9}) == [1, 1, 1]
    assert resolve_rungs(routing(0, 0, 0), [image], rungs=[0, 1, 0]) == [1, 1, 1]


def test_a_total_is_spent_per_prompt_by_falling_score():
    decided = resolve_rungs(
        routing(0, 0, 0, scores=[0.1, 0.9, 0.5]), costs(1, 1, 1), images_per_prompt=[2, 1], budget={"total": 40}
    )
    assert decided == [0, 2, 2]


def test_a_total_counts_every_view_of_a_prompt():
    decided = resolve_rungs(
        routing(0, 0, 0, scores=[0.1, 0.9, 0.5]), costs(2, 1), images_per_prompt=[1, 1], budget={"total": 13}
    )
    assert decided == [0, 1, 1]


def test_prompts_without_images_spend_nothing_of_a_total():
    decided = resolve_rungs(
        routing(0, 0, scores=[0.1, 0.9]), costs(1, 1), images_per_prompt=[0, 1, 0, 1], budget={"total": 36}
    )
    assert decided == [2, 2]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_rungs_are_replayed_exactly_from_any_sequence(kind):
    assert resolve_rungs(routing(0, 0, 0), costs(1, 1, 1), rungs=kind([1, 2, 0])) == [1, 2, 0]


@pytest.mark.parametrize("budget", [9, "auto", {"ceiling": 9}])
def test_a_budget_and_rungs_together_are_refused(budget):
    with pytest.raises(ValueError, match="`visual_rungs` were both given"):
        resolve_rungs(routing(0), costs(1), budget=budget, rungs=[0])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (3, r"`visual_token_budget=3` is below the smallest count this model can produce \(4 tokens.*Pass at least 4"),
        ([36, 3], r"`visual_token_budget=3` is below"),
        ({"ceiling": 3}, r"`visual_token_budget=3` is below"),
        ({"total": 7}, r"smallest cost of prompt 0: 8 tokens for 2 images with 2 views. Pass at least 8"),
        (0, "is below the smallest count"),
        (-9, "is below the smallest count"),
        ([36], r"has 1 entries for 2 images"),
        ([9.5, 9], r"`visual_token_budget=9.5` must be a whole number"),
        (9.0, r"`visual_token_budget=9.0` is not known"),
        (True, r"`visual_token_budget=True` must be a whole number"),
        ("most", r"`visual_token_budget='most'` is not known. Pass 'auto'"),
        ({}, r"`visual_token_budget=\{\}` is not known"),
        ({"most": 9}, r"\{'most': 9\}` is not known.*'ceiling'.*'total'"),
        ({"ceiling": 9, "total": 9}, r"is not known"),
        ({"ceiling": "9"}, r"must be a whole number"),
        (object, r"is not known"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        resolve_rungs(routing(0, 0), costs(1, 1), budget=budget)


def test_a_selection_of_views_carries_every_field():
    features = VisionFeatures(
        patches=torch.randn(3, 4, 2),
        grid=(2, 2),
        cls=torch.randn(3, 2),
        pixels=torch.randn(3, 3, 8, 8),
        views_per_image=(1, 2),
        blocks={5: torch.randn(3, 4, 2)},
        overview=torch.randn(3, 4, 2),
    )
    chosen = features.select([2, 0])
    assert chosen.grid == (2, 2) and chosen.views_per_image == (1, 1)
    for mine, whole in (
        (chosen.patches, features.patches),
        (chosen.cls, features.cls),
        (chosen.pixels, features.pixels),
        (chosen.blocks[5], features.blocks[5]),
        (chosen.overview, features.overview),
    ):
        assert torch.equal(mine, whole[[2, 0]])


def test_transfer_to_the_host_keeps_shapes_types_and_absent_tensors():
    tensors = [torch.tensor([[1, 2**40]]), None, torch.tensor([0.1, -3.5])]
    host = to_host(*tensors)
    assert host[1] is None
    assert torch.equal(host[0], tensors[0]) and host[0].dtype == torch.long
    assert torch.equal(host[2], tensors[2]) and host[2].dtype == torch.float32
