"""Trains a classifier router on inputs that were read once: (n, input_dim) and the rung each should get.

The loss is the cross-entropy over the rungs, for two rungs the binary one. Training stops when images that it does not
see get no better; on the same images the logits are divided by the temperature that fits them best. Standardisation
and temperature are folded into the weights, so that the router reads features as the tower gives them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptive_llava.modeling.router_classifier import ClassifierRouter


TEMPERATURES = np.geomspace(0.5, 8, 161)


@dataclass(frozen=True)
class RouterFit:
    """What came of a training.

    Attributes:
        epochs: Epochs until the weights that were kept.
        loss: Cross-entropy of the validation images with these weights, after the temperature.
        temperature: What the logits were divided by.
    """

    epochs: int
    loss: float
    temperature: float


def split_images(rungs: np.ndarray, *, validation: float, holdout: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of the images to train on, to stop by, and only to measure; every rung has its share in each.

    Args:
        rungs: Label of each image, `(n,)`.
        validation: Share of the images that stop the training and set the temperature.
        holdout: Share that is only measured.
        seed: Seed of the choice.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "held_out": []}
    for rung in np.unique(rungs):
        order = rng.permutation(np.flatnonzero(rungs == rung))
        held, stop = (max(2, round(share * len(order))) for share in (holdout, validation))
        for name, chosen in zip(parts, (order[held + stop :], order[held : held + stop], order[:held]), strict=True):
            parts[name].append(chosen)
    return {name: np.sort(np.concatenate(chosen)) for name, chosen in parts.items()}


def class_weights(rungs: np.ndarray, num_rungs: int, *, balanced: bool) -> np.ndarray:
    """Weight of an image of each rung, `(num_rungs,)`, 1 on average; balanced, each rung has the same say."""
    counts = np.bincount(rungs, minlength=num_rungs)
    present = counts > 0
    if not balanced:
        return present.astype(np.float64)
    return np.where(present, len(rungs) / (present.sum() * np.maximum(counts, 1)), 0.0)


def fit_router(
    router: ClassifierRouter,
    inputs: np.ndarray,
    rungs: np.ndarray,
    validation_inputs: np.ndarray,
    validation_rungs: np.ndarray,
    *,
    balanced: bool = True,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    batch_size: int = 64,
    epochs: int = 200,
    patience: int = 20,
    seed: int = 0,
) -> RouterFit:
    """Train `router` in place, from new weights.

    Args:
        router: Its device and precision are kept; the training itself is in fp32 on the CPU.
        inputs: What the router reads, `(n, input_dim)`.
        rungs: Wanted rung of each, `(n,)`.
        validation_inputs: `(m, input_dim)`; decide when to stop, and the temperature.
        validation_rungs: `(m,)`.
        balanced: Whether all rungs have the same say, whatever their number of images.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        batch_size: Images per step.
        epochs: Most epochs.
        patience: Epochs without a better validation loss after which the training stops.
        seed: Seed of the start and of the order.

    Raises:
        ValueError: The loss is NaN or infinite; `router` is as it was.
    """
    network = copy.deepcopy(router).float().cpu().requires_grad_(True).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.initialise()
    mean, scale = inputs.mean(0, dtype=np.float64), inputs.std(0, dtype=np.float64)
    scale = np.where(scale > 0, scale, 1.0)
    seen, unseen = (_standardised(values, mean, scale) for values in (inputs, validation_inputs))
    targets, unseen_targets = torch.from_numpy(rungs), torch.from_numpy(validation_rungs)
    weights = torch.from_numpy(class_weights(rungs, router.num_rungs, balanced=balanced)).float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    best_loss, best_epoch, best = float("inf"), 0, copy.deepcopy(network.state_dict())
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(targets), generator=generator).split(batch_size):
            loss = F.cross_entropy(network.logits(seen[batch]), targets[batch], weight=weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            unseen_loss = F.cross_entropy(network.logits(unseen), unseen_targets, weight=weights).item()
        if not math.isfinite(unseen_loss):
            raise ValueError(
                f"`learning_rate={learning_rate}`: after epoch {epoch} the router's loss on validation images is "
                f"{unseen_loss}. Nothing was written. Pass a smaller rate; 1e-3 is the default."
            )
        if unseen_loss < best_loss:
            best_loss, best_epoch, best = unseen_loss, epoch, copy.deepcopy(network.state_dict())
        elif epoch - best_epoch >= patience:
            break
    network.load_state_dict(best)
    with torch.no_grad():
        logits = network.logits(unseen)
        losses = [F.cross_entropy(logits / t, unseen_targets, weight=weights).item() for t in TEMPERATURES]
    chosen = int(np.argmin(losses))
    _fold(network.linear_1, network.linear_2, mean, scale, float(TEMPERATURES[chosen]))
    router.load_state_dict(network.state_dict())
    return RouterFit(best_epoch, losses[chosen], float(TEMPERATURES[chosen]))


@torch.no_grad()
def route(router: ClassifierRouter, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rungs `(n,)`, scores `(n,)` and probabilities `(n, num_rungs)` that a router gives to inputs."""
    device = router.linear_1.weight.device
    routing = router.decide(router.logits(torch.from_numpy(inputs).to(device)))
    return routing.rungs.cpu().numpy(), routing.scores.cpu().numpy(), routing.logits.softmax(-1).cpu().numpy()


def _standardised(inputs: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> Tensor:
    return torch.from_numpy(((inputs - mean) / scale).astype(np.float32))


@torch.no_grad()
def _fold(first: nn.Linear, last: nn.Linear, mean: np.ndarray, scale: np.ndarray, temperature: float) -> None:
    # W ((x - mean) / scale) + b = (W / scale) x + (b - W (mean / scale))
    weight = first.weight.double() / torch.from_numpy(scale)
    first.bias.copy_(first.bias.double() - weight @ torch.from_numpy(mean))
    first.weight.copy_(weight)
    for parameter in last.parameters():
        parameter.div_(temperature)
