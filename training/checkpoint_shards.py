"""Checkpoints of any size, read and written a tensor at a time: safetensors or PyTorch shards in, safetensors out.

Names, shapes and types come from the files' headers. Pickles are opened with `weights_only`, so that they can hold
tensors and nothing that runs.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adaptive_llava.modeling.checkpoint_trust import PICKLED, SAFE, read_index


# What is fetched from the Hub: small files, then weights of the preferred kind, then of the other if there are none.
_DOWNLOADS = (
    ["*.json", "*.jinja", "*.model", "*.txt"],
    ["model.safetensors", "model-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model-*.bin"],
)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of a tensor.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        file: Where it stands.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write.

    Attributes:
        shape: Its shape.
        dtype: Its type in the new checkpoint.
        read: Gives its values, when its turn has come.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class CheckpointFiles:
    """The tensors of a checkpoint folder: `stored` tells them all, `read` gives one.

    Args:
        folder: Holds `model.safetensors` or `pytorch_model.bin`, whole or in shards with an index.

    Raises:
        ValueError: No such file, a shard that is missing or damaged, or an index that tells of other tensors.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        files, expected = _shards(self.folder)
        self.stored: dict[str, StoredTensor] = {}
        self._open: tuple[Path, Any] | None = None
        for file in files:
            self.stored |= self._header(file)
        missing = sorted(expected - set(self.stored))
        if missing:
            raise ValueError(
                f"The index of {self.folder} names {len(missing)} tensors that its files do not hold: "
                f"{', '.join(missing[:5])}. Download the checkpoint again."
            )

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU; its values are fetched from the file when they are used."""
        file = self._file(self.stored[name].file)
        return file[name] if isinstance(file, dict) else file.get_tensor(name)

    def close(self) -> None:
        """Let go of the file that was read last, and of the memory its pages take."""
        self._open = None

    def _header(self, path: Path) -> dict[str, StoredTensor]:
        file = self._file(path)
        if isinstance(file, dict):
            found = {name: (value.shape, value.dtype) for name, value in file.items() if isinstance(value, Tensor)}
        else:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (view.get_shape(), _dtype(view.get_dtype(), name)) for name, view in slices.items()}
        self.close()
        return {name: StoredTensor(tuple(shape), dtype, path) for name, (shape, dtype) in found.items()}

    def _file(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self.close()  # first, so that two are never in memory
            self._open = path, _open_file(path)
        return self._open[1]


def checkpoint_folder(
    source: str | os.PathLike, revision: str | None = None, *, argument: str = "--from", with_weights: bool = True
) -> Path:
    """The folder of a checkpoint, fetched from the Hub where `source` is no folder.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        argument: What the caller calls `source`, for the errors.
        with_weights: Whether more than its small files is needed.

    Raises:
        ValueError: Neither is there, or its config.json cannot be read.
    """
    folder, reason = Path(source).expanduser(), "the file is missing"
    if not folder.is_dir():
        if str(source).startswith((".", "/", "~")):
            raise ValueError(f"`{argument}={str(source)!r}`: there is no such folder. Check the path.")
        try:
            for patterns in _DOWNLOADS if with_weights else _DOWNLOADS[:1]:
                folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
                if any(folder.glob("model*.safetensors")):
                    break
        except (OSError, ValueError) as error:
            reason = str(error)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`{argument}={str(source)!r}` has no config.json that can be read: {reason}.")
    return folder


def write_shards(
    folder: Path,
    tensors: Mapping[str, PlannedTensor],
    *,
    max_bytes: int,
    after_shard: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write a checkpoint; no more than one shard is in memory.

    Args:
        folder: Takes `model.safetensors`, or its shards and their index.
        tensors: By name, in the order in which they are read.
        max_bytes: Size of a shard, unless one tensor alone is larger.
        after_shard: Called when a shard is written.

    Returns:
        Names of the files with weights.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.size
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [SAFE]
    for file, names in zip(files, shards, strict=True):
        # a copy each: tensors of a pickle may share memory, and those of a mapped file keep it open
        values = {name: tensors[name].read().to(tensors[name].dtype, copy=True).contiguous() for name in names}
        assert all(value.shape == tensors[name].shape for name, value in values.items())
        save_file(values, folder / file, metadata={"format": "pt"})
        del values
        after_shard()
    if len(shards) > 1:
        place = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.size for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": place}
        (folder / f"{SAFE}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return files


def _shards(folder: Path) -> tuple[list[Path], set[str]]:
    # the files, and the names that the index promises
    for whole in (SAFE, PICKLED):
        index = folder / f"{whole}.index.json"
        if index.is_file():
            places = read_index(index)
            return [folder / name for name in sorted(set(places.values()))], set(places)
        if (folder / whole).is_file():
            return [folder / whole], set()
    raise ValueError(
        f"{folder} holds no weights: neither {SAFE} nor {PICKLED}, nor an index of shards. An adapter alone (LoRA, "
        "mm_projector.bin) must be merged into its language model first."
    )


def _open_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing. Download the checkpoint again.")
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # a file from before PyTorch 1.6
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}. Download it again.") from error
    except (pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError) as error:
        # all but the first are what torch's reader stumbles over in a damaged pickle
        raise ValueError(
            f"{path} is no file of plain tensors, and nothing else is opened, since it could run any code. Take a "
            "checkpoint in safetensors, or download it again."
        ) from error


def _dtype(name: str, tensor: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"{tensor} is of type {name}. Quantised weights cannot be converted; take the original ones.")
    return _DTYPES[name]
