"""Our parts against the authors' own code, on inputs, weights and outputs recorded from it.

A recorded case is a `.safetensors` file with `input.*`, `weight.*` (the authors' parameter names) and `output.*`, in
fp32; its weights come in through the same tables as a whole checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.compressor_average_pool import AveragePoolCompressor
from adaptive_llava.modeling.compressor_query_resampler import QueryResamplerCompressor
from adaptive_llava.modeling.compressor_spatial_fusion import SpatialFusionCompressor
from adaptive_llava.modeling.compressor_token_concat import TokenConcatCompressor
from adaptive_llava.modeling.encoded_images import EncodedBatch, EncodedImages
from adaptive_llava.modeling.multi_block_fusion import MultiBlockFusion, default_fusion_blocks
from adaptive_llava.modeling.projector import AdaptiveLlavaProjector
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.training.checkpoint_layouts import LAYOUTS, new_places


Golden = Mapping[str, Tensor]
Part = TypeVar("Part", bound=nn.Module)


def parity_errors(folder: Path, preset: str) -> dict[str, float]:
    """Largest absolute difference of a preset from its authors' outputs, by recorded case.

    Args:
        folder: The recordings, one folder per method.
        preset: A published system; one whose authors published no code has no case.
    """
    with torch.no_grad():
        return {
            path: measure(load_file(folder / f"{path}.safetensors"))
            for owner, path, measure in CASES
            if owner == preset
        }


def released_state(golden: Golden, preset: str | None, part: str) -> dict[str, Tensor]:
    """Recorded weights under the names of one of our parts, as `convert` would name them.

    Args:
        golden: A recorded case.
        preset: The system whose checkpoints have such weights; `None`: LLaVA-1.5.
        part: `"compressor"`, `"multi_block_fusion"`, `"multi_modal_projector"` or `"modality_prefusion"`.
    """
    layout = next(layout for layout in LAYOUTS if layout.original and layout.preset == preset)
    weights = {f"model.{name.removeprefix('weight.')}": value for name, value in golden.items() if "weight." in name}
    places = new_places(layout.rows, {name: tuple(value.shape) for name, value in weights.items()})
    prefix = f"model.{part}."
    return {
        place.removeprefix(prefix): weights[origin.name].chunk(origin.pieces)[origin.piece]
        for place, origin in places.items()
        if place.startswith(prefix)
    }


def released_mini(golden: Golden) -> AdaptiveLlavaForConditionalGeneration:
    """LLaVA-Mini with a recorded case's compressor, projector, embeddings and pre-fusion, on 4x4 patches.

    The placeholder, which the authors' ids do not have, is one more embedding row with the values of id 0.
    """
    embeddings = golden["weight.embed_tokens.weight"]
    rows, width = embeddings.shape
    config = AdaptiveLlavaConfig.from_preset(
        "llava-mini",
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=rows + 1,
        ),
        image_token_id=rows,
        vision_feature_layer=-1,
        compressor={"type": "query_resampler", "counts": [4], "key_positions": "enlarged"},
        prefusion_layers=2,
        prefusion_padding="released",
    )
    model = AdaptiveLlavaForConditionalGeneration(config).eval()
    for part in ("compressor", "multi_modal_projector", "modality_prefusion"):
        model.model.get_submodule(part).load_state_dict(released_state(golden, "llava-mini", part))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.cat([embeddings, embeddings[:1]]))
    return model


def mini_batch(model: AdaptiveLlavaForConditionalGeneration, golden: Golden) -> EncodedBatch:
    """A recorded case of pre-fusion as the model's own batch; the authors' placeholder is id -200."""
    patches = golden["input.clip_features"]
    compressor, projector = model.model.compressor, model.model.multi_modal_projector
    views, per_view = patches.shape[:2]
    tokens = compressor(on_grid(patches), [0] * views)
    encoded = EncodedImages(
        values=projector(tokens.values),
        lengths=tokens.lengths,
        rungs=(0,) * views,
        scores=torch.zeros(views),
        views_per_image=(1,) * views,
        patches=projector(patches).flatten(0, 1),
        patch_lengths=(per_view,) * views,
    )
    ids = golden["input.input_ids"]
    labels = golden.get("input.labels")
    ids = ids.masked_fill(ids == -200, model.config.image_token_id)
    return EncodedBatch(ids, None, None, encoded, True, None if labels is None else labels == -100)


def on_grid(patches: Tensor) -> VisionFeatures:
    """Recorded patches `(V, side * side, dim)` as features."""
    views, count = patches.shape[:2]
    side = int(count**0.5)
    return VisionFeatures(patches, (side, side), None, patches.new_zeros(views, 3, 1, 1), (1,) * views)


def _loaded(part: Part, state: Mapping[str, Tensor]) -> Part:
    part.load_state_dict(state)
    return part.eval()


def _largest(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


def _average_pool(golden: Golden) -> float:
    features = on_grid(golden["input.projected_features"])
    factors = {24: 1, 8: 9, 4: 36, 3: 64, 2: 144, 1: 576}
    pools = {count: AveragePoolCompressor(1, 1, factors=[factor]) for factor, count in factors.items()}
    return max(_largest(pool.compress(features, 0), golden[f"output.tokens_{count}"]) for count, pool in pools.items())


def _token_concat(golden: Golden) -> float:
    joined = TokenConcatCompressor(1, 1, window=2).compress(on_grid(golden["input.features"]), 0)
    return _largest(joined, golden["output.windows"])


def _projector(golden: Golden) -> float:
    features, tokens = golden["input.features"], golden["output.tokens"]
    projector = AdaptiveLlavaProjector(features.shape[-1], tokens.shape[-1])
    return _largest(_loaded(projector, released_state(golden, None, "multi_modal_projector"))(features), tokens)


def _spatial_fusion(golden: Golden, patches: Tensor, fused_tokens: int = 1) -> float:
    expected = golden["output.tokens"]
    compressor = SpatialFusionCompressor(patches.shape[-1], expected.shape[-1], fused_tokens=fused_tokens)
    compressor = _loaded(compressor, released_state(golden, "stf", "compressor"))
    return _largest(compressor.compress(on_grid(patches), 0), expected)


def _block_fusion(golden: Golden) -> Tensor:
    states = golden["input.hidden_states"][:, :, 1:]  # without [CLS]
    fusion = MultiBlockFusion(states.shape[-1], blocks=default_fusion_blocks(len(states) - 1))
    return _loaded(fusion, released_state(golden, "mbtf", "multi_block_fusion"))(dict(enumerate(states)))


def _resampler(golden: Golden) -> float:
    expected = golden["output.tokens"]
    compressor = QueryResamplerCompressor(
        expected.shape[-1], expected.shape[-1], counts=[expected.shape[1]], key_positions="enlarged"
    )
    compressor = _loaded(compressor, released_state(golden, "llava-mini", "compressor"))
    return _largest(compressor.compress(on_grid(golden["input.features"]), 0), expected)


def _prefusion(golden: Golden) -> float:
    model = released_mini(golden)
    batch = mini_batch(model, golden)
    text, visual = model.model.fuse_modalities(model.get_input_embeddings()(batch.input_ids), batch)
    return max(_largest(text, golden["output.text"]), _largest(visual, golden["output.compressed"].flatten(0, 1)))


# Preset, recorded case, and how it is measured.
CASES: tuple[tuple[str, str, Callable[[Golden], float]], ...] = (
    ("llava", "llava15/projector_mlp2x_gelu", _projector),
    ("avg-pool", "m3/avgpool_scales", _average_pool),
    ("token-concat", "stf/stf_k2_m1", _token_concat),
    ("stf", "stf/stf_k2_m1", lambda golden: _spatial_fusion(golden, golden["input.features"])),
    ("mbtf", "mbtf/mbtf_24blocks", lambda golden: _largest(_block_fusion(golden), golden["output.fused"])),
    ("stf-mbtf", "stf_mbtf/stf_mbtf_k2_m1", lambda golden: _spatial_fusion(golden, _block_fusion(golden))),
    ("stf-mbtf", "stf_mbtf/stf_mbtf_k2_m2", lambda golden: _spatial_fusion(golden, _block_fusion(golden), 2)),
    ("llava-mini", "llava_mini/compressor_C1", _resampler),
    ("llava-mini", "llava_mini/compressor_C2", _resampler),
    ("llava-mini", "llava_mini/prefusion_std_inference", _prefusion),
    ("llava-mini", "llava_mini/prefusion_std_training_labels", _prefusion),
)
