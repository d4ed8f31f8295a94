"""DFMR as data augmentation: in training, a router's thresholds rise and fall with the learning rate.

Paper: LLaVA-Zip, https://arxiv.org/abs/2412.08771, section 4: adaptive counts augment the training data, and are not
used in its evaluations, which are at fixed counts. It publishes no code and no schedule; the rule here is

    threshold of a step = calibrated threshold * learning rate of the step / peak learning rate

An image so appears at many tokens while the rate is small (at the start of a warm-up and the end of a decay), and at
the router's own choice at the peak. Outside of the steps themselves the thresholds are the calibrated ones: in
evaluation, in every checkpoint, and afterwards. Nothing is remembered between steps, so a resumed run goes on exactly.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from adaptive_llava.modeling.option_schema import option_names
from adaptive_llava.modeling.router_registry import ROUTERS
from adaptive_llava.training.padding_share import inner_model


FOLLOWS = ("learning_rate",)


class ThresholdSchedule(TrainerCallback):
    """Scales the thresholds of any router that has some; pass it in `callbacks` of a trainer.

    Args:
        follows: What the thresholds follow; `"learning_rate"` is the one choice.

    Raises:
        ValueError: An unknown choice; when training starts, a router without thresholds.
    """

    def __init__(self, follows: str = "learning_rate"):
        if follows not in FOLLOWS:
            raise ValueError(
                f"`threshold_schedule={follows!r}` is unknown. Pass {FOLLOWS[0]!r}, or leave it out to keep the "
                "thresholds as they were calibrated."
            )
        self.follows = follows
        self._calibrated: tuple[float, ...] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        routed_by_thresholds(model)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        router = routed_by_thresholds(model)
        if self._calibrated is None:  # a step that failed has left it
            self._calibrated = tuple(router.thresholds)
        group = optimizer.param_groups[0]
        share = group["lr"] / group.get("initial_lr", args.learning_rate)
        router.thresholds = tuple(threshold * share for threshold in self._calibrated)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._restore(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._restore(model)

    def _restore(self, model: nn.Module) -> None:
        if self._calibrated is not None:
            routed_by_thresholds(model).thresholds = self._calibrated
            self._calibrated = None


def routed_by_thresholds(model: nn.Module) -> Any:
    """The router of a model, under any head or adapter.

    Raises:
        ValueError: It has no thresholds; the routers that have some are named.
    """
    router: Any = inner_model(model).router
    if not getattr(router, "thresholds", ()):
        known = sorted(name for name, router_class in ROUTERS.items() if "thresholds" in option_names(router_class))
        raise ValueError(
            f"`threshold_schedule` needs a router with thresholds, and the model has {type(router).__name__}. Routers "
            f"that have, on a compressor with several token counts: {', '.join(known)}."
        )
    return router
