"""What no file of a checkpoint decides: which code runs, and which files outside of it are read.

Weights are safetensors, which hold numbers and nothing that runs, in the checkpoint's own folder; the attention is the
user's to choose, since its name may be that of a repository with code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = f"{SAFE}.index.json"

# What a config may choose: ways to compute that are part of transformers.
_HARMLESS = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, as an index of shards names it.

    Args:
        path: The index, `*.index.json`.

    Raises:
        ValueError: It is no index, or names a file outside of its folder.
    """
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in places.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`{path}` is no index of shards, with a 'weight_map' of tensors and files ({type(error).__name__}: "
            f"{error}). Download or save the checkpoint again."
        ) from error
    away = sorted(file for file in set(named.values()) if Path(file).name != file or file in ("", ".."))
    if away:
        raise ValueError(
            f"`{path}` names {away[0]!r}, and a checkpoint reads no file outside of its folder. Download or save it "
            "again."
        )
    return named


def check_stored_weights(source: str | os.PathLike | None) -> None:
    """Refuse a folder whose weights would be read from a pickle, or from elsewhere.

    Args:
        source: Folder; a Hub id is left to the Hub's own rules.

    Raises:
        ValueError: It holds a pickle in place of safetensors, or an index that is none.
    """
    folder = Path(source or "")
    if not source or not folder.is_dir():
        return
    if (folder / INDEX).is_file():
        read_index(folder / INDEX)
    elif not (folder / SAFE).is_file() and any(folder.glob("pytorch_model*.bin*")):
        raise ValueError(
            f"`{folder}` holds its weights as a pickle ({PICKLED}), which can run code when it is loaded, and is not "
            "read. Ask for safetensors; if you trust it, load it once with `use_safetensors=False` and save it again."
        )


def check_stored_choices(stored: Any, where: str) -> None:
    """Refuse a config that chooses the attention, reads weights from elsewhere, or has no type for numbers.

    Args:
        stored: What its file says; anything but a dict passes.
        where: Name of the file or part, for the errors.

    Raises:
        ValueError: It does.
    """
    if not isinstance(stored, Mapping):
        return
    for name in ("dtype", "torch_dtype"):
        value = stored.get(name)
        kind = getattr(torch, value, None) if isinstance(value, str) else value
        # those of the parts stand side by side in a dict
        if not (value is None or value == "auto" or isinstance(kind, (torch.dtype, Mapping))):
            raise ValueError(f"`{where}` has `{name}={value!r}`, which must be a type of torch, like 'bfloat16'.")
    packed = stored.get("quantization_config")
    if not (packed is None or isinstance(packed, Mapping) or hasattr(packed, "to_dict")):
        raise ValueError(f"`{where}` has `quantization_config={packed!r}`, which must be a dict.")
    weights = stored.get("transformers_weights")
    if weights is not None and not (isinstance(weights, str) and os.path.basename(weights) == weights):
        raise ValueError(
            f"`{where}` has `transformers_weights={weights!r}`, and a checkpoint reads no file outside of its folder. "
            "Remove the entry."
        )
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        value = stored.get(name)
        if value is not None and value not in _HARMLESS:
            raise ValueError(
                f"`{where}` asks for `{name}={value!r}`, and no file of a checkpoint chooses what code runs. Remove "
                "the entry; pass `attn_implementation` to `from_pretrained` if you want it."
            )
