"""Learning rates of their own for the parts of a model.

`--projector_learning_rate 2e-5` beside `--learning_rate 2e-4` trains the projector ten times slower than the rest, as
LLaVA-1.5's LoRA script does. A part is told by the first module of that name on a parameter's path, so that the router
of a language model made of experts is not taken for ours. The optimizer is the one that transformers builds: each of
its groups is split, so that what has no weight decay (biases, norms) still has none.

Differs from the authors' code: LLaVA-STF gives every parameter the projector's rate once one is set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adaptive_llava.modeling.backbone_assembly import OWN_PARTS
from adaptive_llava.training.dense_batches import DenseBatchTrainer


# What an option `<name>_learning_rate` names, and the module that it is.
PARTS = {
    "vision_tower": "vision_tower",
    "fusion": "multi_block_fusion",
    "compressor": "compressor",
    "projector": "multi_modal_projector",
    "prefusion": "modality_prefusion",
    "router": "router",
}

_NAMES = {module: name for name, module in PARTS.items()}
_MODULES = {"vision_tower", "language_model", "lm_head", *OWN_PARTS}


def part_of(parameter_name: str) -> str | None:
    """The part that a parameter belongs to, by its full name; `None` for the language model and its head."""
    module = next((module for module in parameter_name.split(".") if module in _MODULES), None)
    return None if module is None else _NAMES.get(module)


class PartRatesTrainer(DenseBatchTrainer):
    """`SFTTrainer` whose parts may have learning rates of their own; takes the arguments of `DenseBatchTrainer`.

    All rates follow the same schedule. The log shows that of `learning_rate`.

    Args:
        learning_rates: Peak rate by part, a name of `PARTS`. Other parts have `args.learning_rate`.

    Raises:
        ValueError: An unknown part, one that is not trained, or a rate that is no positive number.
    """

    def __init__(self, *arguments: Any, learning_rates: Mapping[str, float] | None = None, **options: Any):
        self.learning_rates = dict(learning_rates or {})
        for part, rate in self.learning_rates.items():
            if part not in PARTS:
                raise ValueError(f"`learning_rates` names {part!r}. Known parts: {', '.join(PARTS)}.")
            if not 0 < rate < math.inf:
                raise ValueError(f"`{part}_learning_rate={rate}` must be a positive number, such as 2e-5.")
        super().__init__(*arguments, **options)
        model: Any = self.model
        trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        for part in self.learning_rates.keys() - trained:
            known = ", ".join(f"{name}_learning_rate" for name in PARTS if name in trained) or "none"
            raise ValueError(
                f"`{part}_learning_rate={self.learning_rates[part]}` would be used by nothing: this model has no "
                f"`{PARTS[part]}` that learns, or it is frozen. Leave it out. Here there may be: {known}."
            )

    def create_optimizer(self, *arguments: Any, **options: Any) -> Optimizer:
        built = self.optimizer is not None
        optimizer: Any = super().create_optimizer(*arguments, **options)
        if self.learning_rates and not built:
            model: Any = arguments[0] if arguments else options.get("model")
            split_groups(optimizer, self.model if model is None else model, self.learning_rates)
        return optimizer


def split_groups(optimizer: Optimizer, model: nn.Module, learning_rates: Mapping[str, float]) -> None:
    """Split an optimizer's groups by part, in place; it must not have taken a step yet.

    Args:
        optimizer: Over parameters of `model`.
        model: Any wrapper of the model.
        learning_rates: Rate by part.

    Raises:
        ValueError: The optimizer holds other tensors than the model's parameters.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        members: dict[str | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"{type(optimizer).__name__} does not hold the model's parameters themselves, so their parts "
                    "cannot have learning rates of their own. Choose another `optim`, such as 'adamw_torch'."
                )
            part = part_of(names[id(parameter)])
            members.setdefault(part if part in learning_rates else None, []).append(parameter)
        for part, parameters in members.items():
            rate = {} if part is None else {"lr": learning_rates[part]}
            groups.append({**group, "params": parameters, **rate})
    main = [group for group in groups if group["lr"] == optimizer.defaults["lr"]]
    others = [group for group in groups if group["lr"] != optimizer.defaults["lr"]]
    optimizer.param_groups[:] = main + others  # the first group's rate is logged
