"""Seconds of a model's parts on one prompt, each beside the time its FLOPs would take.

What a FLOP takes is measured in the same minutes: each part is timed in turn with one large matrix product of the
model's dtype, the fastest work this machine does. `measured_over_predicted` is 1 for a part that runs as fast as that
product, and grows with what FLOPs do not say: reading memory, launching kernels, norms and activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.view_geometry import ImageViews, cut_image, image_costs
from adaptive_llava.training.flop_counts import FlopCounts, count_flops
from adaptive_llava.training.paired_timing import ratio_of_medians, timed_pairs


REFERENCE_SIDES = {"cpu": 768, "cuda": 8192}
# What is timed, and the parts of `FlopCounts` that it runs.
PARTS = {
    "vision_tower": ("vision_tower",),
    "compressor": ("multi_block_fusion", "router", "compressor"),
    "projector": ("projector",),
    "modality_prefusion": ("modality_prefusion",),
    "language_model": ("decoder", "head"),
}


@dataclass(frozen=True)
class Prompt:
    """One prompt as a profile counts and times it.

    Attributes:
        text_tokens: Text ids.
        images: Images in the prompt.
        image_size: Height and width of each image, in pixels; AnyRes alone has one.
    """

    text_tokens: int
    images: int = 1
    image_size: tuple[int, int] | None = None

    def counts(self, config: AdaptiveLlavaConfig) -> tuple[int, ...]:
        """Visual tokens of an image at each rung."""
        return image_costs(config.tiling, config.compressor, config.view_grid, [self._cut(config)])[0].counts

    def flops(self, config: AdaptiveLlavaConfig, visual_tokens: int) -> FlopCounts:
        """FLOPs at a count."""
        return count_flops(config, visual_tokens, self.text_tokens, images=self.images, image_size=self.image_size)

    def inputs(self, model: AdaptiveLlavaForConditionalGeneration) -> dict[str, Tensor]:
        """Random inputs of the model's `forward`, on its device."""
        config, device = model.config, model.device
        side = getattr(config.vision_config, "image_size", 224)
        views = {"none": (), "mosaic": (config.tiling.get("n", 0) ** 2 + 1,), "anyres": (self._cut(config).views,)}
        shape = (self.images, *views[config.tiling["type"]], 3, side, side)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, model.dtype)
        half = self.text_tokens // 2
        ids = [5] * half + [config.image_token_id] * self.images + [7] * (self.text_tokens - half)
        inputs = {"input_ids": torch.tensor([ids], device=device), "pixel_values": pixels}
        if self.image_size is not None:
            inputs["image_sizes"] = torch.tensor([self.image_size] * self.images)
        return inputs

    def rungs(self, config: AdaptiveLlavaConfig, rung: int) -> list[int]:
        """One rung for every view."""
        return [rung] * (self.images * self._cut(config).views)

    def _cut(self, config: AdaptiveLlavaConfig) -> ImageViews:
        if self.image_size is None:
            return ImageViews()
        whole = self.images > 1 and config.tiling.get("several_images") == "whole"
        return cut_image(config.tiling, self.image_size, whole=whole)


def time_parts(
    model: AdaptiveLlavaForConditionalGeneration,
    prompt: Prompt,
    rung: int,
    *,
    pairs: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Median seconds of each part and of the whole, with `measured_over_predicted` and its 95 % interval.

    Args:
        model: The model, in evaluation mode.
        prompt: What to run.
        rung: Rung of all views.
        pairs: Timed runs of each part, after two that are not.
        device: `"cpu"` or `"cuda"`.
        clock: As in `timed_pairs`.

    Returns:
        By part of `PARTS`, and `"end_to_end"`: `seconds`, and unless it has no FLOPs `measured_over_predicted`, `low`
        and `high`. A part that the model does not have is left out.
    """
    counts = prompt.flops(model.config, prompt.counts(model.config)[rung])
    flops = {name: sum(counts.parts[part] for part in parts) for name, parts in PARTS.items()}
    flops["end_to_end"] = counts.end_to_end
    reference = ReferenceProduct(model.dtype, device)
    timed = {}
    for name, run in _calls(model, prompt, rung).items():
        ratio = ratio_of_medians(timed_pairs(run, reference, pairs=pairs, device=device, clock=clock))
        timed[name] = {"seconds": ratio.median}
        if flops[name]:
            scale = reference.flops / flops[name]
            ends = {"measured_over_predicted": ratio.ratio, "low": ratio.low, "high": ratio.high}
            timed[name] |= {end: value * scale for end, value in ends.items()}
    return timed


class ReferenceProduct:
    """One large matrix product, to tell what a FLOP takes here.

    Args:
        dtype: Of its matrices.
        device: Where they lie.
    """

    def __init__(self, dtype: torch.dtype, device: str):
        side = REFERENCE_SIDES[device]
        self.flops = 2 * side**3
        self.matrix = torch.randn(side, side, dtype=dtype, device=device)

    def __call__(self) -> Tensor:
        return self.matrix @ self.matrix


@torch.no_grad()
def _calls(model: AdaptiveLlavaForConditionalGeneration, prompt: Prompt, rung: int) -> dict[str, Callable[[], object]]:
    """What to call for each part, with what the parts before it give."""
    inner: Any = model.model
    inputs, rungs = prompt.inputs(model), prompt.rungs(model.config, rung)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    batch = inner.encode_batch(ids, None, None, pixels, inputs.get("image_sizes"), visual_rungs=rungs)
    features = inner.extract_features(pixels, inputs.get("image_sizes"))
    fusion, projector = inner.multi_block_fusion, inner.multi_modal_projector
    states = {} if fusion is None else dict.fromkeys(fusion.blocks, features.patches)
    views = pixels.flatten(0, pixels.dim() - 4)  # (N, views, 3, H, W) -> (N * views, 3, H, W)

    def compress() -> None:
        if fusion is not None:
            fusion(states)
        inner.router(features)
        inner.compressor(features, rungs)

    calls: dict[str, Callable[[], object]] = {
        "vision_tower": lambda: inner.vision_tower(views, output_hidden_states=True),
        "compressor": compress,
    }
    if projector is not None:
        tokens = _projected(inner.compressor(features, rungs).values, features, inner.modality_prefusion)
        calls["projector"] = lambda: projector(tokens)
    embeds = model.get_input_embeddings()(ids)
    if inner.modality_prefusion is not None:
        calls["modality_prefusion"] = lambda: inner.fuse_modalities(embeds, batch)
    length = sum(batch.encoded.lengths) + prompt.text_tokens
    states_in = embeds.new_zeros(1, length, embeds.shape[-1]).normal_()

    def prefill() -> None:
        hidden = inner.language_model(inputs_embeds=states_in, use_cache=True).last_hidden_state
        model.get_output_embeddings()(hidden[:, -1:])

    calls["language_model"] = prefill
    calls["end_to_end"] = lambda: model(**inputs, visual_rungs=rungs, logits_to_keep=1, use_cache=True)
    return calls


def _projected(tokens: Tensor, features: Any, prefusion: Any) -> Tensor:
    # pre-fusion reads all patches through the projector too
    seen: Sequence[Tensor | None] = (features.patches, features.overview) if prefusion is not None else ()
    return torch.cat([tokens, *(patches.flatten(0, 1) for patches in seen if patches is not None)])
