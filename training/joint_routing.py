"""Train a learned router together with its model, without labels that say which images need many tokens.

    python -m adaptive_llava.training.joint_routing --config training/recipes/joint_routing.yaml \\
        --model_name_or_path my_model --dataset_name org/data --output_dir out/my-model

Paper: named as future work by the DynamicResampler report; the loss is this package's own. In each step every image is
seen at every token count. With CE_k the cross-entropy of a row (mean over its labels, in nats) where all its views
have rung k, c_k the count of that rung, p_v the router's probabilities for a view v of the row, and H their entropy:

    cost_k = stop_gradient(CE_k) + token_price * c_k / c_max
    loss of a row = mean_k CE_k + mean_v (sum_k p_v[k] * cost_k - temperature * H(p_v))

The first part trains the model at every count, whatever the router thinks; the second trains the router to pay for
more tokens only where they lower the loss by more than they cost. Its best answer is softmax(-cost / temperature): a
router that is not quite sure can still change its mind. With temperature 0 it grows sure before the model has learned
its smaller counts, and stays with larger ones than it needs (`joint_routing_study` shows it). Views of one row are
judged by the loss that they have in common, each by itself; a row without images has the first part alone, and every
row with a label weighs the same.

Options are those of `adaptive_llava.training.sft`, and those of `JointRoutingConfig`. The model needs a router that
learns, for example `router={"type": "classifier"}`, and must be able to answer at its largest count already: from
scratch, where no count helps yet, the router learns that tokens are not worth their price. Evaluation shows the
router's own choice. A step costs one pass of the vision tower and one pass of the language model per token count, and
their activations together: use gradient checkpointing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.conversation_data import Rows
from adaptive_llava.training.dense_batches import groups_by_length
from adaptive_llava.training.every_rung_forward import EveryRungOutput, add_every_rung_forward
from adaptive_llava.training.part_learning_rates import PartRatesTrainer
from adaptive_llava.training.sft import build_trainer, fine_tune, parse_arguments


@dataclass
class JointRoutingConfig(SFTConfig):
    """TRL's `SFTConfig` with what tokens cost.

    Args:
        token_price: What the largest token count costs in nats of a row's mean cross-entropy per label token; a
            smaller count costs its share. 0: quality alone decides.
        temperature: Weight of the router's entropy, in nats: differences in cost well below it are not decided.
        allow_cold_start: Train also a model whose compressor or projector was never trained.
    """

    token_price: float = field(
        default=0.3, metadata={"help": "Cost of the largest token count, in nats per label token."}
    )
    temperature: float = field(default=0.1, metadata={"help": "Weight of the router's entropy, in nats."})
    allow_cold_start: bool = field(default=False, metadata={"help": "Train also a model that was never trained."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, default in (("token_price", 0.3), ("temperature", 0.1)):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"`{name}={getattr(self, name)}` must be a number >= 0, in nats of cross-entropy; {default} "
                    "is the default."
                )
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise ValueError(
                f"`loss_type={self.loss_type!r}` with `label_smoothing_factor={self.label_smoothing_factor}`: joint "
                "routing has a loss of its own, made of plain cross-entropies. Leave both at their defaults."
            )


def joint_routing_loss(
    cross_entropy: Tensor,
    router_logits: Tensor,
    row_of_view: Tensor,
    labelled: Tensor,
    prices: Tensor,
    temperature: float = 0.0,
) -> Tensor:
    """The loss of the module's docstring, mean over the rows that have labels.

    Args:
        cross_entropy: Of each row with its views at each rung, `(K, B)` in nats.
        router_logits: `(V, K)`.
        row_of_view: Row that shows each view, `(V,)`.
        labelled: Which rows have labels, `(B,)`.
        prices: Cost of each rung, `(K,)` in nats.
        temperature: Weight of the entropy, in nats.
    """
    weights = labelled.float() / labelled.sum().clamp(min=1)
    model_loss = (cross_entropy.mean(0) * weights).sum()
    costs = cross_entropy.detach().T + prices  # (B, K)
    log_probabilities = router_logits.float().log_softmax(-1)  # (V, K)
    per_rung = costs[row_of_view] + temperature * log_probabilities
    expected = (log_probabilities.exp() * per_rung).sum(-1)
    views_of_row = torch.zeros_like(weights).index_add_(0, row_of_view, torch.ones_like(expected))
    return model_loss + (expected * (weights / views_of_row.clamp(min=1))[row_of_view]).sum()


class JointRoutingTrainer(PartRatesTrainer):
    """`SFTTrainer` with the loss of this module; takes the arguments of `SFTTrainer`.

    Logs, per token count `n`: `ce_<n>_tokens` (cross-entropy in nats, mean over rows) and `share_<n>_tokens` (views to
    which the router would give it); `mean_visual_tokens` and `router_entropy` (nats) per view. In evaluation the
    router chooses, and `eval_mean_visual_tokens` is what it spent.

    Args:
        model: A warm model whose router learns. With `peft_config`, its `modules_to_save` must include `model.router`;
            `build_joint_trainer` sees to that.
        args: A `JointRoutingConfig`.

    Raises:
        ValueError: A model that cannot be trained like this, or a router that is frozen.
    """

    def __init__(self, model: Any, args: JointRoutingConfig, *arguments: Any, **options: Any):
        check_model(model, args)
        super().__init__(model, args, *arguments, **options)
        # losses are means over rows: of the micro-batches of a step, the trainer takes the mean
        self.model_accepts_loss_kwargs: bool = False
        trained: Any = self.model
        base: Any = trained.get_base_model() if isinstance(trained, PeftModel) else trained
        router = getattr(base.model.router, "modules_to_save", base.model.router)  # under PEFT the copy is trained
        if not any(parameter.requires_grad for parameter in router.parameters()):
            raise ValueError(
                "The router's parameters are frozen. Call `model.model.router.requires_grad_(True)` first, and with "
                "`peft_config` put 'model.router' into its `modules_to_save`; or use `build_joint_trainer`."
            )
        # of what is saved from now on
        base.config.router_training = {
            "method": "joint_routing",
            "token_price": args.token_price,
            "temperature": args.temperature,
        }
        self._counts: tuple[int, ...] = base.config.visual_token_counts
        device = self.accelerator.device
        self._sums = {"train": torch.zeros(2 * len(self._counts) + 2), "eval": torch.zeros(2)}
        self._sums = {mode: sums.to(device) for mode, sums in self._sums.items()}
        add_every_rung_forward(base)
        self._compressor = base.model.compressor

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.model.training:
            hook = self._compressor.register_forward_hook(self._note_spent_tokens)
            try:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            finally:
                hook.remove()
        outputs: EveryRungOutput = model(**inputs, every_rung=True)
        labels = outputs.label_mask.sum(-1)
        cross_entropy = -outputs.log_probs.float().sum(-1) / labels.clamp(min=1)
        counts = torch.tensor(self._counts, dtype=torch.float32).to(labels.device, non_blocking=True)
        prices = self.args.token_price * counts / counts[-1]
        self._note_training(cross_entropy.detach(), outputs.router_logits.detach().float(), labels > 0)
        return joint_routing_loss(
            cross_entropy, outputs.router_logits, outputs.row_of_view, labels > 0, prices, self.args.temperature
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        sums: Any = self.accelerator.reduce(self._sums[mode], "sum")
        self._sums[mode] = torch.zeros_like(self._sums[mode])
        summary = _training_metrics if mode == "train" else _evaluation_metrics
        logs.update(summary(self._counts, sums.tolist()))
        super().log(logs, start_time)

    def _note_training(self, cross_entropy: Tensor, logits: Tensor, labelled: Tensor) -> None:
        # sums over rows and over views, kept on the device until they are logged
        chosen = torch.nn.functional.one_hot(logits.argmax(-1), len(self._counts)).sum(0)
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
        parts = [(cross_entropy * labelled).sum(1), labelled.sum()[None], chosen, entropy[None]]
        self._sums["train"] += torch.cat([part.float() for part in parts])

    def _note_spent_tokens(self, compressor: Any, arguments: tuple, tokens: Any) -> None:
        spent = torch.tensor([sum(tokens.lengths), len(tokens.lengths)], dtype=torch.float32)
        self._sums["eval"] += spent.to(self._sums["eval"].device)


def _training_metrics(counts: Sequence[int], sums: Sequence[float]) -> dict[str, float]:
    losses, rows, chosen, entropy = sums[: len(counts)], sums[len(counts)], sums[len(counts) + 1 : -1], sums[-1]
    views = sum(chosen)
    logs: dict[str, float] = {}
    if rows:
        logs |= {f"ce_{count}_tokens": loss / rows for count, loss in zip(counts, losses, strict=True)}
    if views:
        logs |= {f"share_{count}_tokens": number / views for count, number in zip(counts, chosen, strict=True)}
        spent = sum(count * number for count, number in zip(counts, chosen, strict=True))
        logs |= {"mean_visual_tokens": spent / views, "router_entropy": entropy / views}
    return logs


def _evaluation_metrics(counts: Sequence[int], sums: Sequence[float]) -> dict[str, float]:
    spent, views = sums
    return {"eval_mean_visual_tokens": spent / views} if views else {}


def check_model(model: Any, training: JointRoutingConfig) -> None:
    """Refuse a model that cannot be trained jointly with its router.

    Raises:
        ValueError: There is only one token count, the router does not learn, or the model was never trained.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    inner, config = base.model, base.config
    if inner.compressor.num_rungs < 2:
        raise ValueError(
            f"`compressor={config.compressor}` has a single token count, so a router has nothing to choose. Use one "
            "with several, like `{'type': 'average_pool', 'factors': [1, 2, 3]}`."
        )
    if next(inner.router.parameters(), None) is None:
        raise ValueError(
            f"`router.type={config.router['type']!r}` has nothing to learn, so there is nothing to train jointly. "
            "Build the model with a router that learns, like `router={'type': 'classifier'}`, or use "
            "`adaptive_llava.training.sft`."
        )
    if not (config.compressor_trained or training.allow_cold_start):
        # a budget is for an image, whose tiles differ in number; an untrained router gives each the largest count
        tiled = config.tiling["type"] == "anyres"
        option = "" if tiled else f"--visual_token_budget {config.visual_token_counts[-1]} "
        raise ValueError(
            "The model has `compressor_trained=False`: joint routing needs a warm start. From scratch the router "
            "collapses to the fewest tokens. Fine-tune at the largest count first (`python -m "
            f"adaptive_llava.training.sft {option}...`), or pass `allow_cold_start=True`."
        )


def build_joint_trainer(
    model: AdaptiveLlavaForConditionalGeneration,
    processor: AdaptiveLlavaProcessor,
    training: JointRoutingConfig,
    train_dataset: Rows,
    eval_dataset: Rows | None = None,
    **options: Any,
) -> JointRoutingTrainer:
    """`sft.build_trainer` with a `JointRoutingTrainer`, and the router among what is trained.

    Raises:
        ValueError: As `check_model` and `build_trainer`; a fixed `visual_token_budget`; batches that are packed or
            grouped by length.
    """
    if options.get("visual_token_budget") is not None:
        raise ValueError(
            f"`visual_token_budget={options['visual_token_budget']}` fixes the token count, and joint routing trains "
            "at every count. Leave it out."
        )
    if options.get("pack_batches"):
        raise ValueError(
            "`pack_batches=True` puts many rows into one, and joint routing weighs the loss of each row. Leave it out."
        )
    if groups_by_length(training):
        raise ValueError(
            "Rows are to be grouped by length, but joint routing shows every row at every token count. Leave "
            "`group_by_length` out."
        )
    check_model(model, training)
    model.model.router.requires_grad_(True)
    trainer: Any = build_trainer(
        model, processor, training, train_dataset, eval_dataset, trainer_class=JointRoutingTrainer, **options
    )
    return trainer


def main(arguments: list[str] | None = None) -> SFTTrainer:
    """Train as the recipe and the command line say."""
    parsed = parse_arguments(arguments, config_class=JointRoutingConfig, command="joint_routing")
    return fine_tune(*parsed, build=build_joint_trainer)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
