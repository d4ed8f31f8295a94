"""The trainings of a run, piece by piece: a base per seed, then its arms. A piece that is done is never done again."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path

from adaptive_llava.training.study.settings import Settings


def run_pieces(settings: Settings, work: Path, workers: int, deadline: float) -> bool:
    """Train what is not trained yet: bases first, and arms as soon as their base is there. `False` if time was up.

    Args:
        settings: Of the run.
        work: Folder for what pieces leave behind.
        workers: Processes.
        deadline: `time.time()` at which to stop.
    """
    from adaptive_llava.training.study.arms import arms_of

    arms = {
        seed: [a.name for a in arms_of(settings) if not _leaves(work, seed, a.name).exists()]
        for seed in settings.seeds
    }
    bases = [seed for seed in settings.seeds if not _leaves(work, seed, None).exists()]
    waiting = len(bases) + sum(map(len, arms.values()))
    if not waiting:
        return True
    print(f"{waiting} of {len(settings.seeds) * (1 + len(arms_of(settings)))} pieces to train", flush=True)
    if time.time() > deadline:
        return False
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:

        def start(seed: int, name: str | None) -> Future[bool]:
            return pool.submit(_train_piece, settings, work, deadline, seed, name)

        running = {start(seed, None): seed for seed in bases}
        of_arms = [start(seed, name) for seed in settings.seeds if seed not in bases for name in arms[seed]]
        for base in as_completed(running):
            if base.result():
                of_arms += [start(running[base], name) for name in arms[running[base]]]
        return all(future.result() for future in (*running, *of_arms))


def _end_with_parent() -> None:
    """End this process when the one that started it has gone: killed, it would leave its trainings running."""

    def wait() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _train_piece(settings: Settings, work: Path, deadline: float, seed: int, name: str | None) -> bool:
    """Train the base of a seed, or one of its arms; `False` if time was up."""
    import torch
    import transformers

    from adaptive_llava.training.study.arms import arms_of, train_arm, train_base
    from adaptive_llava.training.study.small_model import OutOfTime

    torch.set_num_threads(1)  # these matrices are too small to share among threads
    transformers.utils.logging.set_verbosity_error()
    folder = work / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    left = time.monotonic() + deadline - time.time()
    if left <= time.monotonic():
        return False
    started = time.process_time()
    try:
        if name is None:
            train_base(settings, seed, folder, left)
        else:
            train_arm(settings, seed, next(arm for arm in arms_of(settings) if arm.name == name), folder, left)
    except OutOfTime:
        return False
    finally:
        _add_seconds(folder / f"{name or 'base'}.seconds", time.process_time() - started)
    print(f"seed {seed}: {name or 'base'}", flush=True)
    return True


def _leaves(work: Path, seed: int, name: str | None) -> Path:
    """The file that says that a piece is done."""
    return work / f"seed_{seed}" / ("base.pt" if name is None else f"{name}.npz")


def _add_seconds(path: Path, seconds: float) -> None:
    before = json.loads(path.read_text())["cpu_seconds"] if path.exists() else 0
    path.write_text(json.dumps({"cpu_seconds": before + seconds, "commit": commit()}))


def commit() -> str:
    """The commit of this code."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not in a checkout"
    return found.stdout.strip()
