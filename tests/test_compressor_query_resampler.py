"""Query resampler: by hand, the authors' outputs, an independent version, and how it starts and learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.compressor_query_resampler import QueryResamplerCompressor
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.training.golden_parity import released_state
from tests.conftest import tiny_text_config, tiny_vision_config


pytestmark = pytest.mark.compat

TEXT_DIM = 12


def build(dim: int = 32, seed: int = 0, **options) -> QueryResamplerCompressor:
    torch.manual_seed(seed)
    return QueryResamplerCompressor(dim, TEXT_DIM, **({"counts": [1, 4], "num_heads": 2} | options)).eval()


def randomised(compressor: QueryResamplerCompressor) -> QueryResamplerCompressor:
    """Weights at which content, positions and biases all matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return compressor


def views_of(patches: Tensor, grid: tuple[int, int]) -> VisionFeatures:
    return VisionFeatures(patches, grid, None, torch.zeros(len(patches), 3, 8, 8), (1,) * len(patches))


def features(views: int, grid: tuple[int, int], dim: int = 32) -> VisionFeatures:
    generator = torch.Generator().manual_seed(0)
    return views_of(torch.randn(views, grid[0] * grid[1], dim, generator=generator), grid)


def test_two_patches_are_weighed_as_by_hand():
    compressor = build(4, counts=[1], num_heads=1, key_positions="enlarged", initialisation="normal")
    with torch.no_grad():
        compressor.query_1.copy_(torch.tensor([[1.0, 1, -1, -1]]))
        for layer in (compressor.q_proj, compressor.k_proj, compressor.v_proj, compressor.o_proj):
            nn.init.eye_(layer.weight)
    patch = torch.tensor([1.0, -1, 1, -1])
    # the position is (sin 0, cos 0, sin 0, cos 0) everywhere: q = (1, 2, -1, 0), keys (1, 0, 1, 0) and (-1, 2, -1, 2)
    # scores 0 and 4, halved by sqrt(4): weights 1 / (1 + e^2) and e^2 / (1 + e^2) of opposite values
    views = views_of(torch.stack([patch, -patch]).unsqueeze(0), (1, 2))
    with torch.no_grad():
        token = compressor.compress(views, 0)[0, 0]
        weights = compressor.attention_weights(views, 0).flatten()
    torch.testing.assert_close(token, -math.tanh(1) * patch, rtol=0, atol=1e-4)
    torch.testing.assert_close(weights, torch.tensor([0.0, 2.0]).softmax(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [1, 2])
def test_tokens_equal_those_of_llava_minis_code(shared, side):
    golden = load_file(shared / "golden" / "llava_mini" / f"compressor_C{side}.safetensors")
    compressor = build(counts=[side * side], num_heads=8, key_positions="enlarged", initialisation="normal")
    compressor.load_state_dict(released_state(golden, "llava-mini", "compressor"))
    views = views_of(golden["input.features"], (8, 8))
    with torch.no_grad():
        tokens = compressor.compress(views, 0)
        weights = compressor.attention_weights(views, 0).mean(1)
        halved = compressor.bfloat16().compress(views_of(views.patches.bfloat16(), (8, 8)), 0)
    key_positions = compressor.positions((8, 8), 0, torch.device("cpu"))[1]
    torch.testing.assert_close(tokens, golden["output.tokens"], rtol=0, atol=1e-5)
    torch.testing.assert_close(weights, golden["output.attn_mean_over_heads"], rtol=0, atol=1e-5)
    torch.testing.assert_close(key_positions, golden["output.key_pos_embed"], rtol=0, atol=1e-5)
    torch.testing.assert_close(halved.float(), golden["output.tokens"], rtol=0.05, atol=0.05)


def reference_position(row: float, column: float, dim: int, cell: float | None) -> np.ndarray:
    """2-D sinusoid of a place, averaged over a normal distribution of variance `cell^2 - 1` by quadrature."""
    if cell is None:
        return np.zeros(dim)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    halves = []
    for coordinate in (column, row):
        points = coordinate + math.sqrt(max(cell**2 - 1, 0)) * nodes
        angles = points[:, None] / 10000.0 ** (np.arange(dim // 4) / (dim // 4))
        waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        halves.append((weights[:, None] * waves).sum(0) / weights.sum())
    return np.concatenate(halves)


def reference_tokens(state: dict[str, np.ndarray], patches: np.ndarray, side: int, patch_side: int, heads: int):
    """DynamicResampler from its report: one query table per count, cross-attention to all patches, 2-D sinusoids on
    queries and patches. What it leaves open (norms, the places of queries fewer than patches) is as here described."""

    def normed(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def projected(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    dim, cell = patches.shape[-1], patch_side / side
    queries = normed(state[f"query_{side * side}"], "ln_q")
    for index in range(side * side):
        row, column = ((place + 0.5) * cell - 0.5 for place in divmod(index, side))
        queries[index] += reference_position(row, column, dim, cell if side > 1 else None)
    places = np.stack([reference_position(*divmod(p, patch_side), dim, 1) for p in range(patch_side**2)])
    tokens = []
    for view in patches:
        view = normed(view, "ln_kv")
        q, k, v = projected(queries, "q_proj"), projected(view + places, "k_proj"), projected(view, "v_proj")
        mixed = []
        for head in np.split(np.arange(dim), heads):
            scores = q[:, head] @ k[:, head].T / math.sqrt(len(head))
            weights = np.exp(scores - scores.max(1, keepdims=True))
            mixed.append(weights / weights.sum(1, keepdims=True) @ v[:, head])
        tokens.append(projected(np.concatenate(mixed, axis=1), "o_proj"))
    return np.stack(tokens)


@pytest.mark.parametrize(("counts", "patch_side"), [([1, 256], 16), ([1, 4, 16], 6)])
def test_tokens_equal_an_independent_version_of_dynamic_resampler(counts, patch_side):
    compressor = randomised(build(16, counts=counts))
    state = {name: weight.double().numpy() for name, weight in compressor.state_dict().items()}
    views = features(2, (patch_side, patch_side), 16)
    for rung, count in enumerate(counts):
        expected = reference_tokens(state, views.patches.double().numpy(), math.isqrt(count), patch_side, heads=2)
        with torch.no_grad():
            found = compressor.compress(views, rung).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_smaller_nested_counts_use_the_first_rows_of_the_one_table():
    nested = randomised(build(counts=[1, 4, 16], query_sets="nested"))
    assert [name for name in nested.state_dict() if name.startswith("query")] == ["query_16"]
    views = features(2, (6, 6))
    for rung, count in enumerate(nested.counts):
        alone = build(counts=[count])
        weights = dict(nested.state_dict())
        weights[f"query_{count}"] = weights.pop("query_16")[:count]
        alone.load_state_dict(weights)
        assert torch.equal(alone.compress(views, 0), nested.compress(views, rung))


def test_positions_are_computed_once_per_grid_and_precision_and_training_can_follow_inference(monkeypatch):
    compressor = build(counts=[1, 4], num_heads=2)
    computed, positions = [], compressor.positions

    def noted(grid, rung, device):
        computed.append((grid, rung))
        return positions(grid, rung, device)

    monkeypatch.setattr(compressor, "positions", noted)
    with torch.inference_mode():
        first = [compressor.compress(features(2, grid), rung) for grid in ((6, 6), (4, 6)) for rung in (0, 1)]
    assert computed == [((6, 6), 0), ((6, 6), 1), ((4, 6), 0), ((4, 6), 1)]
    again = [compressor.compress(features(2, grid), rung) for grid in ((6, 6), (4, 6)) for rung in (0, 1)]
    sum(tokens.sum() for tokens in again).backward()
    assert len(computed) == 4 and compressor.k_proj.weight.grad.abs().max() > 0
    assert all(torch.equal(before, tokens) for before, tokens in zip(first, again, strict=True))
    compressor.bfloat16().compress(views_of(features(2, (6, 6)).patches.bfloat16(), (6, 6)), 1)
    assert computed[4:] == [((6, 6), 1)]


def test_only_learned_tensors_are_saved():
    layers = [f"{part}_proj" for part in "qkvo"] + ["ln_q", "ln_kv"]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {"query_1", "query_4"}
    assert set(build().state_dict()) == expected


def test_queries_that_no_view_used_get_a_zero_gradient_in_training():
    compressor = build().train()
    compressor(features(2, (6, 6)), [0, 0]).values.square().sum().backward()
    assert compressor.query_4.grad is not None and not compressor.query_4.grad.any()
    assert compressor.query_1.grad.any()
    nested = build(query_sets="nested").train()
    assert list(nested.idle_parameters([0])) == []
    nested(features(2, (6, 6)), [0, 0]).values.square().sum().backward()
    assert nested.get_parameter("query_4").grad[0].any() and not nested.get_parameter("query_4").grad[1:].any()


@pytest.mark.parametrize("options", [{}, {"counts": [1, 9], "query_sets": "nested"}])
@pytest.mark.parametrize(("grid", "dim", "heads"), [((24, 24), 1024, 8), ((6, 6), 32, 2), ((3, 8), 64, 4)])
def test_one_query_starts_as_the_mean_of_the_normalised_patches(options, grid, dim, heads):
    views = features(2, grid, dim)
    with torch.no_grad():
        token = build(dim, num_heads=heads, **options).compress(views, 0)
    torch.testing.assert_close(token, F.layer_norm(views.patches, (dim,)).mean(1, keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "dim", "heads"), [(24, 1024, 8), (16, 128, 4), (6, 32, 2)])
@pytest.mark.parametrize("key_positions", ["grid", "enlarged"])
def test_as_many_queries_as_patches_start_near_their_own_patch(side, dim, heads, key_positions):
    views = features(1, (side, side), dim)
    compressor = build(dim, counts=[side * side], num_heads=heads, key_positions=key_positions)
    with torch.no_grad():
        tokens = compressor.compress(views, 0)
    similarity = F.cosine_similarity(tokens, F.layer_norm(views.patches, (dim,)), dim=-1)
    assert similarity.mean() > 0.97 and similarity.min() > 0.8


@pytest.mark.parametrize("grid", [(24, 24), (16, 24), (12, 8)])
@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize("key_positions", ["grid", "enlarged"])
def test_a_token_starts_in_its_cell_on_any_grid(grid, side, key_positions):
    compressor = build(128, counts=[side * side], num_heads=2, key_positions=key_positions)
    with torch.no_grad():
        weights = compressor.attention_weights(features(1, grid, 128), 0)[0].mean(0)
    # (count, height * width) -> where in its cell each token looks: 0 is the centre, 0.5 the edge
    for axis, (length, across) in enumerate(zip(grid, (False, True), strict=True)):
        per_place = weights.unflatten(1, grid).sum(1 if across else 2)
        cell = length / side
        centres = (torch.arange(side) + 0.5) * cell - 0.5
        centres = centres.repeat(side) if across else centres.repeat_interleave(side)
        distance = (torch.arange(length) - centres.unsqueeze(1)) / cell
        spread = (per_place * distance.square()).sum(1).mean().sqrt()
        assert 0.2 < spread < 0.5, (axis, spread)
        assert (per_place * (distance.abs() <= 0.5 + 1e-6)).sum(1).mean() > 0.7, axis


def final_loss(initialisation: str, steps: int = 100) -> float:
    """Train a resampler and one linear layer to say which of ten kinds each of 16 patches is."""
    compressor = build(counts=[16], initialisation=initialisation)
    readout = nn.Linear(32, 10)
    kinds = torch.randn(10, 32)
    optimizer = torch.optim.AdamW([*compressor.parameters(), *readout.parameters()], lr=1e-3)
    for _ in range(steps):
        labels = torch.randint(10, (32, 16))
        patches = kinds[labels] + 0.3 * torch.randn(32, 16, 32)
        logits = readout(compressor.compress(views_of(patches, (4, 4)), 0))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_passing_through_learns_to_read_patches_far_faster_than_a_random_start():
    passing, random = final_loss("pass_through"), final_loss("normal")
    assert passing < random / 3, (passing, random)


def test_the_normal_start_is_that_of_pytorchs_attention():
    compressor = build(64, counts=[256], num_heads=8, initialisation="normal")
    attention = nn.MultiheadAttention(64, 8)
    assert compressor.query_256.std().item() == pytest.approx(0.02, rel=0.05)
    for part, expected in zip("qkv", attention.in_proj_weight.chunk(3), strict=True):
        layer = getattr(compressor, f"{part}_proj")
        assert layer.weight.std().item() == pytest.approx(expected.std().item(), rel=0.1)
        assert not layer.bias.any()
    assert compressor.o_proj.weight.std().item() == pytest.approx(attention.out_proj.weight.std().item(), rel=0.1)


@pytest.mark.parametrize("query_sets", ["own", "nested"])
def test_the_start_survives_the_initialisation_of_a_whole_model(query_sets):
    options = {"type": "query_resampler", "counts": [1, 9], "num_heads": 2, "query_sets": query_sets}
    config = AdaptiveLlavaConfig(
        vision_config=tiny_vision_config(), text_config=tiny_text_config(), compressor=options, image_token_id=99
    )
    compressor = AdaptiveLlavaForConditionalGeneration(config).model.compressor
    assert torch.equal(compressor.o_proj.weight, torch.eye(32))
    views = features(2, (6, 6))
    with torch.no_grad():
        token = compressor.compress(views, 0)
    torch.testing.assert_close(token, F.layer_norm(views.patches, (32,)).mean(1, keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("initialisation", ["pass_through", "normal"])
def test_it_builds_without_memory_for_its_weights(initialisation):
    with torch.device("meta"):
        compressor = QueryResamplerCompressor(1024, TEXT_DIM, initialisation=initialisation)
    assert all(parameter.is_meta for parameter in compressor.parameters())


def test_more_queries_than_patches_are_possible():
    compressor = build(counts=[1, 64])
    assert compressor.ladder((3, 5)) == (1, 64) and compressor.grid_after((3, 5), 1) == (8, 8)
    tokens = compressor.compress(features(1, (3, 5)), 1)
    assert tokens.shape == (1, 64, 32) and torch.isfinite(tokens).all()


@pytest.mark.parametrize(
    ("dim", "options", "message"),
    [
        (32, {"counts": [1, 200]}, r"`compressor.counts=\[1, 200\]` must be strictly rising square numbers"),
        (32, {"counts": [4, 1]}, r"must be strictly rising square numbers, since the queries stand on a C x C grid"),
        (32, {"counts": 256}, r"`compressor.counts=256` must be a non-empty list"),
        (32, {"query_sets": "shared"}, r"`compressor.query_sets='shared'` is unknown. Pass one of: own, nested"),
        (32, {"key_positions": "none"}, r"`compressor.key_positions='none'` is unknown. Pass one of: grid, enlarged"),
        (32, {"initialisation": "zeros"}, r"`compressor.initialisation='zeros'`.*pass_through, normal"),
        (32, {"num_heads": 0}, r"`compressor.num_heads=\[0\]` must be"),
        (20, {"num_heads": 8}, r"`compressor.num_heads=8` must divide .* 20. Pass one of: 1, 2, 4, 5, 10, 20"),
        (24, {"num_heads": 8}, r"leaves heads of 3 channels at width 24.*Use fewer heads"),
        (30, {"num_heads": 2}, r"whose width is divisible by 4, .* these are 30 wide"),
    ],
)
def test_options_that_make_no_resampler_are_refused(dim, options, message):
    with pytest.raises(ValueError, match=message):
        build(dim, **options)
