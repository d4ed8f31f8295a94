"""The peers and limits of the benchmark's rows are what they are said to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adaptive_llava.modeling.placeholder_layout import build_layout
from adaptive_llava.training.benchmark_rows.authors_modules import (
    NaivePrefusion,
    NaiveQueryCompression,
    NaiveSpatialFusion,
    prefusion_inputs,
    without_placeholders,
)
from adaptive_llava.training.benchmark_rows.batches import ragged_batches
from adaptive_llava.training.benchmark_rows.prefill import BareLayers
from adaptive_llava.training.benchmark_workload import TEXT_TOKENS, Workload
from adaptive_llava.training.flop_counts import prefill_flops


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload("tiny")


@torch.no_grad()
def test_spatial_fusion_image_by_image_is_ours(work):
    compressor, features = work.model("stf").model.compressor, work.features(3)
    ours = compressor(features, [0] * 3).values
    torch.testing.assert_close(NaiveSpatialFusion(compressor)(features.patches), ours)


@torch.no_grad()
def test_query_compression_image_by_image_is_ours(work):
    compressor, features = work.model("llava-mini").model.compressor, work.features(3)
    ours = compressor(features, [0] * 3).values
    torch.testing.assert_close(NaiveQueryCompression(compressor, features)(features.patches), ours)


@torch.no_grad()
def test_prefusion_prompt_by_prompt_is_ours(work):
    model = work.model("llava-mini").model
    for parameter in model.modality_prefusion.parameters():  # it starts as the identity
        torch.nn.init.normal_(parameter, std=0.1)
    batch, text = prefusion_inputs(work, model, 2)
    peer = NaivePrefusion(model.modality_prefusion.decoder)
    texts, visual = model.fuse_modalities(text, batch)
    alone = without_placeholders(work, batch, text)
    naive_texts, naive_visual = peer(batch.encoded.patches, batch.encoded.values, alone)
    assert (visual - batch.encoded.values).abs().max() > 0.1 and (naive_texts - alone).abs().max() > 0.1
    torch.testing.assert_close(naive_visual, visual, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(naive_texts, without_placeholders(work, batch, texts), atol=1e-4, rtol=1e-4)


def test_the_bare_layers_are_the_prefill_without_its_attention(work):
    layers, tokens = BareLayers(work, 64), 64 + TEXT_TOKENS
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        layers()
    attention = work.text.num_hidden_layers * 4 * tokens * tokens * work.text.hidden_size
    assert counted.get_total_flops() == prefill_flops(work.text, tokens) - attention


@pytest.mark.parametrize("counts", [(64, 4), (9, 4, 1)])
def test_ragged_batches_hold_the_same_prompts_and_the_limit_is_the_share_of_no_padding(counts):
    work = Workload("tiny")
    work.shape = replace(work.shape, ragged_tokens=counts)
    padded, bucketed, limit = ragged_batches(work, 8)
    lengths = [[length for batch in batches for length in batch.encoded.lengths] for batches in (padded, bucketed)]
    assert sorted(lengths[0]) == sorted(lengths[1])
    slots = [
        build_layout(batch.inputs["input_ids"], None, None, batch.encoded.lengths, work.image_token).attention_mask
        for batch in padded
    ]
    filled, all_slots = (sum(count) for count in zip(*((mask.sum(), mask.numel()) for mask in slots), strict=True))
    assert float(filled / all_slots) == pytest.approx(limit)
    assert all(len(set(batch.encoded.lengths)) == 1 for batch in bucketed)
