"""Which parts of an adaptive LLaVA model LoRA adapts, which are trained in full beside it, and which stay frozen.

PEFT matches short names anywhere in a model: `q_proj` and `all-linear` would also adapt the vision tower and the
projector. Here both mean the language model alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft import PeftModel
from torch import nn

from adaptive_llava.modeling.backbone_assembly import OWN_PARTS


ALL_LINEAR = "all-linear"

_LANGUAGE_MODEL = "model.language_model"
_ROUTER = "model.router"  # chooses, and is trained on its own
_VISUAL_PARTS = tuple(name for name in (f"model.{part}" for part in OWN_PARTS) if name != _ROUTER)
_VISION_TOWER = "model.vision_tower"


def language_model_targets(model: nn.Module, targets: str | Sequence[str] | None = ALL_LINEAR) -> str | list[str]:
    """`target_modules` for PEFT: a pattern that matches linear layers of the language model and nothing else.

    Args:
        model: An `AdaptiveLlavaForConditionalGeneration`.
        targets: `"all-linear"` (or `None`), or short names such as `["q_proj", "v_proj"]`. Full names and patterns
            (with a dot) are handed on as they are.

    Raises:
        ValueError: A short name that is no linear layer of this language model; the known ones are listed.
    """
    linear = _linear_layers(model)
    known = sorted({name.rpartition(".")[2] for name in linear})
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        chosen = known
    else:
        chosen = [targets] if isinstance(targets, str) else list(targets)
        if any("." in name for name in chosen):
            return targets if isinstance(targets, str) else chosen
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            raise ValueError(
                f"`lora_target_modules={chosen}`: {', '.join(unknown)} is no linear layer of this language model. "
                f"Pass {ALL_LINEAR!r}, some of {', '.join(known)}, or full module names."
            )
    wanted = {name for name in linear if name.rpartition(".")[2] in chosen}
    pattern = rf"{re.escape(_LANGUAGE_MODEL)}\.(?:.*\.)?(?:{'|'.join(map(re.escape, chosen))})"
    matched = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    # a name shared with a layer of another kind (say, stacked experts): list the linear ones one by one
    return pattern if matched == wanted else sorted(wanted)


def fully_trained_modules(model: nn.Module, *, vision_tower: bool = False) -> list[str]:
    """Full names of the modules trained beside LoRA, for PEFT's `modules_to_save`.

    This package's own parts (`OWN_PARTS`), as far as they have parameters meant to be trained.

    Args:
        model: An `AdaptiveLlavaForConditionalGeneration`.
        vision_tower: Train the vision tower too.
    """
    names = [*_VISUAL_PARTS, _ROUTER, *([_VISION_TOWER] if vision_tower else [])]
    return [name for name in names if _trainable(model, name)]


def freeze_vision_tower(model: nn.Module) -> None:
    """Leave the vision tower out of full training."""
    model.get_submodule(_VISION_TOWER).requires_grad_(False)


def freeze_all_but_visual_parts(model: nn.Module) -> None:
    """Leave language model, vision tower and router out of training; the parts that make visual tokens stay in it."""
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(f"{part}." for part in _VISUAL_PARTS)):
            parameter.requires_grad_(False)


def visual_parts(model: nn.Module) -> list[str]:
    """Full names of the modules that make visual tokens and have parameters."""
    return [name for name in _VISUAL_PARTS if _has_parameters(model, name)]


def trains_visual_parts(model: nn.Module) -> bool:
    """Whether every parameter that makes visual tokens is being trained, also inside a PEFT model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = [base.get_submodule(name) for name in visual_parts(base)]
    # under PEFT the trained copy stands beside the frozen original
    copies = [getattr(part, "modules_to_save", None) for part in parts]
    parts = [part if copy is None else copy for part, copy in zip(parts, copies, strict=True)]
    return bool(parts) and all(parameter.requires_grad for part in parts for parameter in part.parameters())


def _linear_layers(model: nn.Module) -> list[str]:
    decoder = model.get_submodule(_LANGUAGE_MODEL)
    return [f"{_LANGUAGE_MODEL}.{name}" for name, module in decoder.named_modules() if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    # also GPT-2's `Conv1D`, and the 4- and 8-bit layers, which are subclasses
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _has_parameters(model: nn.Module, name: str) -> bool:
    part = getattr(model.model, name.rpartition(".")[2])
    return part is not None and next(part.parameters(), None) is not None


def _trainable(model: nn.Module, name: str) -> bool:
    part = getattr(model.model, name.rpartition(".")[2])
    return part is not None and any(parameter.requires_grad for parameter in part.parameters())
