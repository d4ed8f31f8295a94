"""Whether weights, and training at every step, are made of finite numbers; training never waits for the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


_NEVER = torch.iinfo(torch.int64).max


class FirstSpoiledStep:
    """The first step whose loss was NaN or infinite; stays on the device until somebody asks.

    Args:
        accelerator: That of a trainer.
    """

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator
        self._step = torch.tensor(_NEVER, device=accelerator.device)

    def note(self, step: int, loss: Tensor) -> None:
        """Take the loss of a step or of a part of one, `()` or `(n,)`."""
        spoiled = ~loss.detach().isfinite().all().to(self._step.device, non_blocking=True)
        self._step = torch.where(spoiled, self._step.clamp(max=step), self._step)

    def ask(self) -> int | None:
        """The step, over all processes, or `None`; the host waits for the device, and all processes must ask."""
        step = int(self._accelerator.gather(self._step).min())
        return None if step == _NEVER else step


def spoiled_tensor(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds NaN or an infinite number; `None` if all are finite.

    Args:
        named: Name and tensor, each looked at when its turn has come.
    """
    for name, tensor in named:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return name
    return None


def all_finite(model: nn.Module, optimizer: Optimizer | None, accelerator: Any) -> bool:
    """Whether what is trained, and what the optimizer remembers of it, is finite in all processes."""
    verdicts = [tensor.isfinite().all().to(accelerator.device) for tensor in _trained(model, optimizer)]
    verdict = torch.stack(verdicts).all() if verdicts else torch.tensor(True, device=accelerator.device)
    return bool(accelerator.gather(verdict.int()).min())


@torch.no_grad()
def _trained(model: nn.Module, optimizer: Optimizer | None) -> Iterator[Tensor]:
    states = [] if optimizer is None else optimizer.state.values()
    remembered = (value for state in states for value in state.values() if isinstance(value, Tensor))
    for tensor in (*(p.detach() for p in model.parameters() if p.requires_grad), *remembered):
        local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of sharded ones, this shard
        if local.is_floating_point() and local.numel():
            yield local
