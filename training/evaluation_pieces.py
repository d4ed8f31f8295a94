"""Answers on the disk while a dataset is asked: one file per batch, so that a killed run loses one batch per process.

The files lie in a hidden folder beside the output. Which questions make a batch does not depend on the number of
processes, so a run may be taken up by more or fewer of them. Several machines need a common file system.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from adaptive_llava.training.whole_folder import tell_what_is_not_written


_SETTINGS = "settings.json"
_PATIENCE = timedelta(days=30)


def ask_all(
    batches: Sequence[Sequence[int]],
    ask: Callable[[Sequence[int]], dict[str, Any]],
    pieces: Pieces,
    processes: Processes,
) -> list[dict[str, Any]] | None:
    """Ask the batches that are missing, each by one process.

    Args:
        batches: Indices of questions.
        ask: What gives the piece of a batch.
        pieces: What was said so far.
        processes: Who asks.

    Returns:
        The pieces of all batches; `None` in any process but the first.
    """
    missing = pieces.missing(len(batches))
    processes.meet("counted")  # before any more are asked
    asked = [len(batch) for batch in batches]
    start = sum(asked) - sum(asked[number] for number in missing)
    with tqdm(total=sum(asked), initial=start, unit="question", desc="ask", disable=processes.rank > 0) as bar:
        for step, number in enumerate(missing[processes.rank :: processes.count]):
            pieces.add(number, ask(batches[number]))
            # the others are about as far
            bar.update(sum(asked[other] for other in missing[step * processes.count : (step + 1) * processes.count]))
        processes.leave("answered")
        if processes.rank == 0:
            processes.wait_for_all("answered")
    return pieces.all(len(batches)) if processes.rank == 0 else None


class Processes:
    """The processes that `torchrun` or `accelerate launch` started, or this one alone.

    Attributes:
        rank: Number of this one.
        count: How many there are.
    """

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._store = next(iter(torch.distributed.rendezvous("env://")))[0] if self.count > 1 else None

    @property
    def device(self) -> torch.device:
        """The accelerator of this process, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def meet(self, place: str) -> None:
        """Wait until all have come to a place."""
        self.leave(place)
        self.wait_for_all(place)

    def leave(self, place: str) -> None:
        """Say that this process has come there."""
        if self._store is not None:
            self._store.set(f"{place} {self.rank}", "1")

    def wait_for_all(self, place: str) -> None:
        """Wait until all have said so."""
        if self._store is not None:
            self._store.wait([f"{place} {rank}" for rank in range(self.count)], _PATIENCE)


class Pieces:
    """What was said so far.

    Args:
        output: Folder that the results will have.
        settings: All that the answers depend on, JSON.
        create: Make the folder if there is none.

    Raises:
        ValueError: An interrupted run with other settings lies there.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, create: bool):
        self.folder = output.with_name(f".{output.name}.unfinished")
        path = self.folder / _SETTINGS
        if create and not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(path, settings)
        found = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in settings if found.get(name) != settings[name]]
        if other:
            raise ValueError(
                f"`--output {output}` belongs to an interrupted run that differs in {', '.join(other)}: "
                f"{', '.join(f'{name}={found.get(name)!r}' for name in other)}. Finish that one with its own options, "
                f"name another folder, or remove {self.folder}."
            )

    def missing(self, batches: int) -> list[int]:
        """Numbers of the batches that are still to be asked."""
        return [number for number in range(batches) if not self._path(number).is_file()]

    def add(self, number: int, piece: Mapping[str, Any]) -> None:
        """Keep what was said about one batch."""
        self._write(self._path(number), piece)

    def all(self, batches: int) -> list[dict[str, Any]]:
        """What was said about each batch."""
        return [json.loads(self._path(number).read_text(encoding="utf-8")) for number in range(batches)]

    def remove(self) -> None:
        """Remove the files, when the results stand elsewhere."""
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08}.json"

    def _write(self, path: Path, content: Any) -> None:
        partial = path.with_suffix(".partial")
        with tell_what_is_not_written(path, self.folder), partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
