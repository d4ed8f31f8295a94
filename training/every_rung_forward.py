"""One forward that scores a batch at every token count: images encoded once, one pass of the language model per count.

Shapes: rows (B, L) with V views, K token counts -> log-probabilities (K, B, L - 1), router logits (V, K)
Everything that learns runs inside this one call of the (wrapped) model, as distributed training needs it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from adaptive_llava.modeling.encoded_images import EncodedImages


@dataclass
class EveryRungOutput(ModelOutput):
    """Scores of a batch at each of `K` token counts, fewest tokens first.

    Attributes:
        log_probs: Log-probability of each next label with every view at that rung, `(K, B, L - 1)`; 0 without label.
        label_mask: Where there are labels, `(B, L - 1)`.
        router_logits: `(V, K)`; no rows in a batch without images.
        row_of_view: Row that shows each view, `(V,)`.
    """

    log_probs: Tensor | None = None
    label_mask: Tensor | None = None
    router_logits: Tensor | None = None
    row_of_view: Tensor | None = None


def add_every_rung_forward(model: nn.Module) -> None:
    """Let `model(..., labels=labels, every_rung=True)` return an `EveryRungOutput`; other calls stay what they are.

    Args:
        model: An `AdaptiveLlavaForConditionalGeneration` whose head TRL has fused already, not an adapter around it.
    """
    forward = model.forward

    @functools.wraps(type(model).forward)  # the trainer reads the signature
    def every_rung_forward(self: Any, *args: Any, every_rung: bool = False, **kwargs: Any) -> Any:
        return _score_every_rung(self.model, forward, **kwargs) if every_rung else forward(*args, **kwargs)

    model.forward = types.MethodType(every_rung_forward, model)


def _score_every_rung(
    inner: Any,
    forward: Callable[..., Any],
    *,
    input_ids: Tensor,
    labels: Tensor,
    pixel_values: Tensor | None = None,
    image_sizes: Tensor | None = None,
    **kwargs: Any,
) -> EveryRungOutput:
    num_rungs, idle = inner.compressor.num_rungs, 0.0
    score = functools.partial(forward, input_ids=input_ids, labels=labels, fused_lm_head=True, **kwargs)
    if pixel_values is None or len(pixel_values) == 0:
        # nothing to route; the passes still happen, as in the branch below, so that distributed ranks stay in step
        idle = inner.idle_visual_parts(input_ids.device)
        nothing = torch.zeros(0, inner.config.text_config.hidden_size, device=input_ids.device)
        outputs = [score(encoded_images=EncodedImages(nothing, (), (), nothing[:, 0], ())) for _ in range(num_rungs)]
        logits = outputs[0].log_probs.new_zeros(0, num_rungs)
        rows = torch.zeros(0, dtype=torch.long, device=input_ids.device)
    else:
        features = inner.extract_features(pixel_values, image_sizes)
        logits = inner.router(features).logits
        views = len(logits)
        encode = functools.partial(inner.encode_images, pixel_values, image_sizes, features=features)
        outputs = [score(encoded_images=encode(visual_rungs=[rung] * views)) for rung in range(num_rungs)]
        rows = _row_of_view(input_ids, inner.config.image_token_id, features.views_per_image)
    return EveryRungOutput(
        log_probs=torch.stack([output.log_probs for output in outputs]) + idle,
        label_mask=outputs[0].label_mask,
        router_logits=logits,
        row_of_view=rows,
    )


def _row_of_view(input_ids: Tensor, image_token_id: int, views_per_image: tuple[int, ...]) -> Tensor:
    # one placeholder per image, then one entry per view of it; sizes known on the host need no synchronisation
    images = len(views_per_image)
    per_row = (input_ids == image_token_id).sum(1)
    rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(per_row, output_size=images)
    repeats = torch.tensor(views_per_image).to(rows.device, non_blocking=True)
    return rows.repeat_interleave(repeats, output_size=sum(views_per_image))
