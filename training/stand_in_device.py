"""A stand-in for an accelerator on a machine without one: it shows what a forward pass makes the host wait for.

    with StandInDevice() as device:
        device.adopt(model)
        model(input_ids=device.hold(ids), pixel_values=device.hold(pixels))
    device.waits                                # [Wait("Tensor.tolist", "modeling/visual_tokens.py:131"), ...]

Tensors that it holds say that they lie on a GPU, and so does all that is computed from them; their values stay in the
CPU's memory. Every call that a GPU could only answer by finishing its queue is noted with the line that made it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map


DEVICE = torch.device("cuda", 0)
_HOST = torch.device("cpu")
_MARK = "_stand_in_device"
# Their results are on the host, or as large as values on the device say.
_READS = {
    "__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__", "allclose", "argwhere", "bincount",
    "cpu", "equal", "is_nonzero", "item", "masked_select", "nonzero", "numpy", "tolist", "unique",
    "unique_consecutive",
}  # fmt: skip
_FACTORIES = {"as_tensor", "tensor"}
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Wait:
    """One time the host waits for the device.

    Attributes:
        call: What was called, such as `"torch.Tensor.tolist"`.
        line: Where, `"file:line"`.
    """

    call: str
    line: str


class StandInDevice(TorchFunctionMode):
    """While it is entered, keeps account of tensors on the stand-in, and of what waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    def hold(self, tensor: Tensor) -> Tensor:
        """The tensor, as if it lay on the device."""
        setattr(tensor, _MARK, True)
        return tensor

    def adopt(self, model: nn.Module) -> None:
        """Take a model's parameters and buffers as lying on the device."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.hold(tensor)

    def release(self, model: nn.Module) -> None:
        """Forget that a model was adopted."""
        for tensor in (*model.parameters(), *model.buffers()):
            delattr(tensor, _MARK)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # of `to(other)`, the first alone is copied
        held = any(_is_held(tensor) for tensor in (tensors[:1] if name == "to" else tensors))
        target = _target(name, args, kwargs)
        waits = self._waits(name, args, kwargs, tensors, held, target)
        args, kwargs = tree_map(_on_host, (args, kwargs))
        result = func(*args, **kwargs)
        copies_nothing = name in _FACTORIES and result.numel() == 0
        if waits and not copies_nothing:
            self.waits.append(Wait(resolve_name(func) or name, _calling_line()))
        on_device = target == DEVICE.type if target is not None else held and name != "cpu"
        if isinstance(result, Tensor) and _is_held(result) != on_device and any(result is given for given in tensors):
            result = result.detach().clone()  # a copy on the other side, which the CPU sees no need to make
        if on_device:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.hold(leaf)
        return result

    def _attribute(self, func: Callable, args: tuple) -> Any:
        owner = getattr(func, "__self__", None)
        attribute = getattr(owner, "__name__", "")
        if isinstance(args[0], Tensor) and _is_held(args[0]):
            if attribute == "device":
                return DEVICE
            if attribute in ("is_cuda", "is_cpu"):
                return attribute == "is_cuda"
        result = func(*args)
        if isinstance(result, Tensor) and _is_held(args[0]):
            self.hold(result)
        return result

    def _waits(
        self, name: str, args: tuple, kwargs: dict, tensors: list[Tensor], held: bool, target: str | None
    ) -> bool:
        if name in _READS:
            return held
        if target is not None and name in ("to", "cuda", *_FACTORIES):
            crosses = held != (target == DEVICE.type) if tensors else target == DEVICE.type
            return crosses and (held or not kwargs.get("non_blocking", False))
        if name == "where":
            return held and len(args) + len(kwargs) == 1
        if name == "repeat_interleave":
            counts = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
            return isinstance(counts, Tensor) and _is_held(counts) and kwargs.get("output_size") is None
        if name in ("__getitem__", "__setitem__"):
            index = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            return _is_held(args[0]) and any(leaf.dtype == torch.bool or not _is_held(leaf) for leaf in index)
        return False


def _is_held(tensor: Tensor) -> bool:
    return getattr(tensor, _MARK, False)


def _target(name: str, args: tuple, kwargs: dict) -> str | None:
    """Kind of the device that a call names; of `to(other)`, where the other lies."""
    if name == "cuda":
        return DEVICE.type
    given = [kwargs.get("device"), *(args[1:] if name == "to" else ())]
    for value in given:
        if isinstance(value, Tensor):
            return DEVICE.type if _is_held(value) else _HOST.type
        if isinstance(value, torch.device):
            return value.type
        if isinstance(value, str):
            return torch.device(value).type
    return None


def _on_host(value: Any) -> Any:
    names_device = isinstance(value, torch.device) or (isinstance(value, str) and value.startswith(DEVICE.type))
    return _HOST if names_device and torch.device(value).type == DEVICE.type else value


def _calling_line() -> str:
    for frame in inspect.stack(context=0)[2:]:
        path = Path(frame.filename)
        if "torch" not in path.parts and path.name != Path(__file__).name:
            shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else Path(*path.parts[-2:])
            return f"{shown}:{frame.lineno}"
    return "?"
