"""More tokens for views that a small trained network takes for documents.

Paper: the DynamicResampler report, which published no code: the vision tower's [CLS] state -> one hidden layer ->
sigmoid -> P(document), and a hard choice between two token counts. Here also for any longer ladder, by a softmax over
its rungs.
Shapes: (V, dim) -> logits (V, num_rungs), rungs (V,)
What the report leaves open: the hidden layer is as wide as its input and ends in a ReLU, the threshold is 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .compressor_base import Compressor
from .router_base import Router
from .visual_tokens import Routing, VisionFeatures


FEATURES = ("cls", "feature_layer_cls", "mean")


class ClassifierRouter(Router):
    """Choose by a network with one hidden layer.

    Two rungs: rung 1 if P(document) exceeds the threshold. More: the likeliest rung. The score is the expected rung,
    for two rungs P(document). A view whose features are not finite gets the most tokens.

    Untrained, it gives every view the most tokens. Its weights are frozen: a language model's loss does not reach them
    through the hard choice. `python -m adaptive_llava train-router` trains them; joint training switches them on.

    Args:
        dim: Width of one hidden state of the vision tower.
        compressor: The compressor whose rungs are chosen.
        features: What it reads: `"cls"`, the final [CLS] state after the tower's last norm; `"feature_layer_cls"`,
            that of the selected layer; `"mean"`, the mean of the patches, for towers without [CLS].
        blocks: Further hidden states to read, by index, each as the mean of its patches.
        hidden_dim: Width of the hidden layer. Default: that of its input.
        threshold: P(document) above which a view gets rung 1; two rungs only.

    Raises:
        ValueError: Unknown `features`, `blocks` that are no list of distinct indices, a `hidden_dim` below 1, or a
            `threshold` outside 0 to 1 or for other than two rungs.
    """

    type_name = "classifier"

    def __init__(
        self,
        dim: int,
        compressor: Compressor,
        *,
        features: str = "cls",
        blocks: Sequence[int] = (),
        hidden_dim: int | None = None,
        threshold: float = 0.5,
    ):
        super().__init__(dim, compressor)
        if features not in FEATURES:
            raise ValueError(f"`router.features={features!r}` is unknown. Pass one of: {', '.join(FEATURES)}.")
        self.features = features
        self.blocks = _block_indices(blocks)
        self._block_dim = dim
        self._first_dim = dim if features == "cls" else compressor.input_dim
        self.input_dim = self._first_dim + len(self.blocks) * dim
        if hidden_dim is None:
            hidden_dim = self.input_dim
        if isinstance(hidden_dim, bool) or not isinstance(hidden_dim, int) or hidden_dim < 1:
            raise ValueError(f"`router.hidden_dim={hidden_dim!r}` must be a whole number >= 1, or None.")
        self.hidden_dim = hidden_dim
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise ValueError(f"`router.threshold={threshold!r}` must be a probability, from 0 to 1.")
        if threshold != 0.5 and self.num_rungs > 2:
            raise ValueError(
                f"`router.threshold={threshold!r}` has no meaning for {self.num_rungs} token counts, of which the "
                "likeliest is taken. Leave it at 0.5, or use a compressor with two counts."
            )
        self.threshold = float(threshold)
        if self.num_rungs > 1:
            self.needs_blocks = self.blocks
            self.needs_class_token = features != "mean"
            self.linear_1 = nn.Linear(self.input_dim, self.hidden_dim)
            self.linear_2 = nn.Linear(self.hidden_dim, 1 if self.num_rungs == 2 else self.num_rungs)
            self.activation = nn.ReLU()
            self.initialise()
            self.requires_grad_(False)

    @torch.no_grad()
    def initialise(self) -> None:
        """Start with the most tokens for every view: less sure than a trained router, and never worse than none."""
        if self.num_rungs > 1:
            self.linear_1.reset_parameters()
            nn.init.zeros_(self.linear_2.weight)
            nn.init.zeros_(self.linear_2.bias)
            self.linear_2.bias[-1:].fill_(1.0)

    def inputs(self, features: VisionFeatures) -> Tensor:
        """What the network reads, joined, `(V, input_dim)` in fp32.

        Raises:
            ValueError: The tower gave no [CLS] state, or states of another width than the config says.
        """
        if self.features == "mean":
            first = features.patches.mean(1, dtype=torch.float32)
        else:
            first = features.cls if self.features == "cls" else features.layer_cls
            if first is None:
                raise ValueError(
                    f"`router.features={self.features!r}` reads the [CLS] state, and this vision tower gave none. "
                    "Use `features='mean'`."
                )
        _check_width(first, self._first_dim, f"`router.features={self.features!r}`")
        parts = [first.float()]
        for block in self.blocks:
            parts.append(features.blocks[block].mean(1, dtype=torch.float32))
            _check_width(parts[-1], self._block_dim, f"Block {block} of `router.blocks={list(self.blocks)}`")
        return torch.cat(parts, dim=-1)

    def forward(self, features: VisionFeatures) -> Routing:
        views, device = features.patches.shape[0], features.patches.device
        if self.num_rungs == 1:
            return Routing(torch.zeros(views, dtype=torch.long, device=device), torch.zeros(views, device=device))
        with torch.autocast(device.type, enabled=False):
            return self.decide(self.logits(self.inputs(features)))

    def logits(self, inputs: Tensor) -> Tensor:
        """The network, `(V, input_dim)` -> fp32 `(V, num_rungs)`; for two rungs `(0, z)`, P(document) = sigmoid z."""
        # a bias keeps its precision when weights are quantised
        hidden = self.activation(self.linear_1(inputs.to(self.linear_1.bias.dtype)))
        logits = self.linear_2(hidden).float()
        return torch.cat([torch.zeros_like(logits), logits], dim=-1) if self.num_rungs == 2 else logits

    def decide(self, logits: Tensor) -> Routing:
        """The choice that follows from fp32 logits `(V, num_rungs)`."""
        top = self.num_rungs - 1
        probabilities = logits.softmax(dim=-1)
        scores = (probabilities * torch.arange(self.num_rungs, device=logits.device)).sum(-1)
        rungs = (scores > self.threshold).long() if self.num_rungs == 2 else logits.argmax(-1)
        finite = logits.isfinite().all(-1)
        return Routing(rungs.where(finite, top), scores.where(finite, float(top)), logits)


def _block_indices(blocks: Any) -> tuple[int, ...]:
    listed = isinstance(blocks, (list, tuple)) and not any(
        isinstance(block, bool) or not isinstance(block, int) for block in blocks
    )
    if not listed or len(set(blocks)) < len(blocks):
        raise ValueError(f"`router.blocks={blocks!r}` must be a list of distinct indices of hidden states, or empty.")
    return tuple(blocks)


def _check_width(state: Tensor, expected: int, what: str) -> None:
    if state.shape[-1] != expected:
        raise ValueError(
            f"{what} is {state.shape[-1]} wide in this vision tower, and the router was built for {expected}. Choose "
            "hidden states as wide as the selected layer."
        )
