"""Where a training that was interrupted goes on: the newest checkpoint that is whole.

`WholeCheckpointTrainer` gives a checkpoint its name only when it is complete. Folders of other programs, such as
`trl sft`, are written under their final name; so each is looked at before it is used.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

# Where checkpoints stand while they are written: uploads to the Hub leave names that begin with `_` out.
UNFINISHED = "_unfinished"

_NEWEST = ("last", "true")
_NAME = re.compile(r"checkpoint-(\d+)")


def resume_point(output_dir: str | os.PathLike, wish: str | bool | None) -> str | None:
    """The checkpoint to go on from, or `None` to start; warns of those that are passed over.

    Args:
        output_dir: Of the run.
        wish: `resume_from_checkpoint`: `"last"` or `"true"` for the newest whole checkpoint of `output_dir`, if there
            is one; a folder; `None` for a new run.

    Raises:
        ValueError: A new run in a folder that holds checkpoints, or a named checkpoint that is not whole.
    """
    found = checkpoints(output_dir)
    if wish is None or wish is False:
        if found:
            raise ValueError(
                f"`output_dir={str(output_dir)!r}` holds {found[-1].name} of an earlier run. Pass "
                "--resume_from_checkpoint last to go on from it, or another `output_dir` for a new run."
            )
        return None
    if wish is not True and str(wish) not in _NEWEST:
        fault = checkpoint_fault(Path(str(wish)))
        if fault is not None:
            raise ValueError(
                f"`resume_from_checkpoint={str(wish)!r}` is no whole checkpoint: {fault}. Pass 'last' for the newest "
                "whole one of `output_dir`, or another folder."
            )
        return str(wish)
    chosen, faults = _newest(found)
    faults |= {path: "it was being written when the run ended" for path in checkpoints(Path(output_dir, UNFINISHED))}
    goes_on = f"goes on from {chosen}" if chosen else "starts from the beginning"
    for path, fault in faults.items():
        logger.warning(f"{path} is not whole and is passed over: {fault}. Training {goes_on}.")
    return None if chosen is None else str(chosen)


def newest_whole(output_dir: str | os.PathLike) -> Path | None:
    """The newest checkpoint of a run from which one can go on."""
    return _newest(checkpoints(output_dir))[0]


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Folders `checkpoint-N`, whole or not, by step."""
    folder = Path(output_dir)
    found = folder.iterdir() if folder.is_dir() else iter(())
    steps = {path: int(name[1]) for path in found if (name := _NAME.fullmatch(path.name)) and path.is_dir()}
    return sorted(steps, key=lambda path: steps[path])


def checkpoint_fault(folder: Path) -> str | None:
    """Why training cannot go on from a folder; `None` if it can.

    Every file says by itself whether it was cut short, so nothing is read but beginnings and ends.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError):
        return "trainer_state.json, which is written last, is missing or cut short"
    names = sorted(os.listdir(folder))
    for name in names:
        path = folder / name
        if name.endswith(".index.json"):
            try:
                shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError):
                return f"{name} is cut short"
            if missing := sorted(set(shards) - set(names)):
                return f"{missing[0]}, which {name} names, is missing"
        if (name.endswith(".safetensors") and not _whole_safetensors(path)) or (
            name.endswith((".pt", ".pth", ".bin")) and not zipfile.is_zipfile(path)
        ):
            return f"{name} is cut short"
    if not any(re.fullmatch(r"optimizer.*|global_step\d+", name) for name in names):
        return "it has no state of the optimizer (`save_only_model`)"
    if not any(re.match(r".*model.*\.(safetensors|bin)|.*_model_.*|global_step\d+", name) for name in names):
        return "it has no weights"
    return None


def _newest(found: list[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole one, and why each newer one is not."""
    faults: dict[Path, str] = {}
    for path in reversed(found):
        fault = checkpoint_fault(path)
        if fault is None:
            return path, faults
        faults[path] = fault
    return None, faults


def _whole_safetensors(path: Path) -> bool:
    # 8 bytes for the length of a JSON header, the header, then the tensors at the offsets it names
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < path.stat().st_size else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, AttributeError, KeyError, TypeError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)
