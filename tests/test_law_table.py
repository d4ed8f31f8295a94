"""The laws that whole models obey: every compressor under every router, and every preset.

`test_compressors.py` and `test_routers.py` hold the parts alone to theirs.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adaptive_llava import PRESETS
from adaptive_llava.modeling.backbone_assembly import OWN_PARTS
from adaptive_llava.modeling.compressor_registry import COMPRESSORS
from adaptive_llava.modeling.option_schema import build_part
from adaptive_llava.modeling.placeholder_layout import build_layout
from adaptive_llava.modeling.preset_table import PRESET_ALIASES
from adaptive_llava.modeling.router_registry import ROUTERS
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.training.packing import PackingCollator
from tests.conftest import (
    IMAGE_TOKEN,
    PRESETS_HERE,
    TINY_COMPRESSORS,
    TINY_ROUTERS,
    batch_rows,
    tiny_images,
    tiny_model,
)
from tests.fresh_process import run_without_package
from tests.test_placeholder_generation import NEW, RAW, answers, check_logits, gold_rows, inputs_of


pytestmark = pytest.mark.compat

ROWS = torch.tensor([[5, IMAGE_TOKEN, 6, 7, IMAGE_TOKEN, 8, IMAGE_TOKEN, 9, 10]])
PAIRS: dict[str, dict] = {
    f"{compressor} + {router}": {"compressor": TINY_COMPRESSORS[compressor], "router": TINY_ROUTERS[router]}
    for compressor in TINY_COMPRESSORS
    for router in TINY_ROUTERS
}
SYSTEMS: dict[str, dict] = {**PAIRS, **{preset: {"preset": preset} for preset in PRESETS_HERE}}
every_system = pytest.mark.parametrize("name", SYSTEMS)
every_compressor = pytest.mark.parametrize("name", TINY_COMPRESSORS)
every_router = pytest.mark.parametrize("name", TINY_ROUTERS)


def build(name: str):
    model = tiny_model(**SYSTEMS[name])
    return model.requires_grad_(True)  # a learned router waits for its own training


def test_the_table_has_every_registered_part_and_preset():
    kinds = {options["type"] for options in TINY_COMPRESSORS.values()}
    assert kinds == set(COMPRESSORS)
    assert {options["type"] for options in TINY_ROUTERS.values()} == set(ROUTERS)
    assert set(PRESETS_HERE) == set(PRESETS)
    assert set(PRESET_ALIASES.values()) <= set(PRESETS)


@every_system
def test_counts_are_those_the_config_promises_for_every_replayed_rung(name):
    model = build(name)
    counts = model.config.visual_token_counts
    with torch.no_grad():
        for rung, count in enumerate(counts):
            outputs = model(input_ids=ROWS, pixel_values=tiny_images(3), visual_rungs=[rung] * 3)
            assert outputs.num_visual_tokens.tolist() == [count] * 3
            assert torch.isfinite(outputs.logits).all()


@every_system
def test_budgets_are_respected_and_none_below_the_smallest_is_accepted(name):
    model, images = build(name), tiny_images(3)
    counts = model.config.visual_token_counts
    for budget in {counts[0], counts[-1], counts[0] + 1, 1000}:
        expected = max(count for count in counts if count <= budget)
        for train in (False, True):
            spent = model.train(train).encode_images(images, visual_token_budget=budget).lengths
            assert spent == (expected,) * 3
    ceiling = model.encode_images(images, visual_token_budget={"ceiling": counts[0]})
    assert ceiling.lengths == (counts[0],) * 3
    total = counts[-1] + 2 * counts[0]
    shared = model.encode_images(images, visual_token_budget={"total": total})
    assert sum(shared.lengths) <= total and max(shared.lengths) == counts[-1]
    if counts[0] > 1:
        with pytest.raises(ValueError, match=rf"below the smallest count .*\({counts[0]} tokens"):
            model.encode_images(images, visual_token_budget=counts[0] - 1)


@every_system
def test_an_images_tokens_do_not_depend_on_its_batch(name):
    model, images = build(name).eval(), tiny_images(4)
    with torch.no_grad():
        together = model.encode_images(images)
        alone = [model.encode_images(images[view : view + 1]) for view in range(4)]
    assert together.rungs == tuple(one.rungs[0] for one in alone)
    torch.testing.assert_close(together.values, torch.cat([one.values for one in alone]), rtol=0, atol=1e-5)


@every_system
def test_every_trainable_part_gets_a_gradient_over_the_replayed_rungs(name):
    model = build(name).train()
    total: Any = 0
    for rung in range(len(model.config.visual_token_counts)):
        outputs = model(input_ids=ROWS, pixel_values=tiny_images(3), labels=ROWS, visual_rungs=[rung] * 3)
        total = total + outputs.loss
    features = model.model.extract_features(tiny_images(3))
    logits = model.model.router(features).logits
    if logits is not None:  # a learned router's loss reads its logits
        total = total + logits.float().logsumexp(1).sum() - logits[:, 0].sum()
    total.backward()
    for part in OWN_PARTS:
        module = getattr(model.model, part, None)
        for parameter_name, parameter in module.named_parameters() if module is not None else ():
            if parameter_name.endswith("k_proj.bias"):  # softmax does not see it
                continue
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{part}.{parameter_name}"


@every_system
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(name):
    model = build(name).train()
    ids, mask = batch_rows([[5, IMAGE_TOKEN, 6, 7, IMAGE_TOKEN, 8], [9, 10, 11], [4, IMAGE_TOKEN, 12, 13]], "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100  # prompts, which pre-fusion takes in
    padded = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": tiny_images(3)}
    found = []
    for batch in (padded, PackingCollator(lambda _: padded)([])):
        model.zero_grad()
        loss = model(**batch, visual_rungs=[0, len(model.config.visual_token_counts) - 1, 0]).loss
        loss.backward()
        found.append([loss.detach(), *(value.grad for value in model.parameters() if value.grad is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@every_system
def test_a_saved_model_loads_with_the_same_bits(name, tmp_path):
    model = build(name).eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.to_dict()["compressor"] == model.config.to_dict()["compressor"]
    assert again.config.to_dict()["router"] == model.config.to_dict()["router"]
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())
    with torch.no_grad():
        expected, found = (one(input_ids=ROWS, pixel_values=tiny_images(3)) for one in (model, again))
    # weights that lie elsewhere in memory may round the product of a single row otherwise
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-6)
    assert torch.equal(found.visual_rungs, expected.visual_rungs)


@every_system
def test_generation_equals_a_loop_without_a_cache(name):
    model, inputs = build(name).eval(), inputs_of()
    output = model.generate(**inputs, max_new_tokens=NEW, **RAW)
    assert answers(output.sequences, inputs) == gold_rows(model, inputs["pixel_values"])
    check_logits(model, output, inputs)


_LOADER = r"""
import json, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
errors = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    kept = load_file(folder / "expected.tensors")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(input_ids=kept["ids"], pixel_values=kept["pixels"]).logits
    errors[folder.name] = (logits - kept["logits"]).abs().max().item()
print("REPORT " + json.dumps(errors))
"""


def test_every_system_loads_as_remote_code_where_the_package_is_absent(tmp_path):
    folder = tmp_path / "systems"
    for name in SYSTEMS:
        model = build(name).eval()
        model.save_pretrained(folder / name)
        with torch.no_grad():
            logits = model(input_ids=ROWS, pixel_values=tiny_images(3)).logits
        save_file({"ids": ROWS, "pixels": tiny_images(3), "logits": logits}, folder / name / "expected.tensors")
    output = run_without_package(_LOADER, folder, folder=tmp_path)
    errors = json.loads(output.rpartition("REPORT ")[2])
    assert set(errors) == set(SYSTEMS)
    assert max(errors.values()) <= 1e-5, errors


@every_system
def test_large_weights_are_linear_layers_which_adapters_and_4_bit_loading_see(name):
    model = build(name).model
    for part in OWN_PARTS:
        module = getattr(model, part, None)
        for owner_name, owner in module.named_modules() if module is not None else ():
            for parameter_name, parameter in owner.named_parameters(recurse=False):
                matrix = parameter.dim() >= 2 and not parameter_name.startswith("query")
                assert not matrix or isinstance(owner, nn.Linear), f"{part}.{owner_name}.{parameter_name}"


GRIDS = [(24, 24), (16, 16), (24, 16), (7, 5)]
WIDTH, TEXT_WIDTH = 8, 12


def views(grid: tuple[int, int], number: int = 2) -> VisionFeatures:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(number, grid[0] * grid[1], WIDTH, generator=generator)
    return VisionFeatures(
        patches=patches,
        grid=grid,
        cls=patches[:, 0],
        pixels=torch.randn(number, 3, 4 * grid[0], 4 * grid[1], generator=generator),
        views_per_image=(1,) * number,
        blocks={1: patches + 1},
        layer_cls=patches[:, 1],
    )


@every_compressor
@pytest.mark.parametrize("grid", GRIDS)
def test_a_compressor_compiles_in_one_graph_on_every_grid(name, grid):
    torch._dynamo.reset()
    compressor = build_part("compressor", COMPRESSORS, TINY_COMPRESSORS[name], WIDTH, TEXT_WIDTH).eval()
    features = views(grid)
    for rung, count in enumerate(compressor.ladder(grid)):
        compiled = torch.compile(
            lambda given, rung=rung: compressor.compress(given, rung), fullgraph=True, backend="eager"
        )
        with torch.no_grad():
            tokens = compiled(features)
            assert tokens.shape == (2, count, compressor.output_dim)
            torch.testing.assert_close(tokens, compressor.compress(features, rung))


@every_router
@pytest.mark.parametrize("grid", GRIDS)
def test_a_router_compiles_in_one_graph_on_every_grid(name, grid):
    torch._dynamo.reset()
    compressor = build_part("compressor", COMPRESSORS, TINY_COMPRESSORS["average_pool"], WIDTH, TEXT_WIDTH)
    router = build_part("router", ROUTERS, TINY_ROUTERS[name], WIDTH, compressor).eval()
    features = views(grid)
    routing = torch.compile(router, fullgraph=True, backend="eager")(features)
    expected = router(features)
    assert torch.equal(routing.rungs, expected.rungs)
    torch.testing.assert_close(routing.scores, expected.scores)


@every_router
def test_tower_and_router_compile_in_one_graph(name):
    torch._dynamo.reset()
    model = build(f"average_pool + {name}").eval().model

    def route(pixels):
        routing = model.router(model.extract_features(pixels))
        return routing.rungs, routing.scores

    with torch.no_grad():
        expected = route(tiny_images(3))  # first: transformers 5 installs a tower's hooks behind a lock, once
        rungs, scores = torch.compile(route, fullgraph=True, backend="eager")(tiny_images(3))
    assert torch.equal(rungs, expected[0])
    torch.testing.assert_close(scores, expected[1])


def test_the_splice_compiles_in_one_graph_given_host_lengths():
    torch._dynamo.reset()
    text, visual = torch.randn(1, ROWS.shape[1], 8), torch.randn(14, 8)
    layout = build_layout(ROWS, None, None, (1, 4, 9), IMAGE_TOKEN)

    def splice_and_gather(text, visual):
        return layout.gather(layout.splice(text, visual))

    compiled = torch.compile(splice_and_gather, fullgraph=True, backend="eager")
    assert torch.equal(compiled(text, visual), splice_and_gather(text, visual))
