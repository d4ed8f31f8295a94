"""Folders that appear only when they are complete, on disk as well as by name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# What says that a folder is a model or an adapter; without it nothing loads the folder.
_ENTRIES = ("config.json", "adapter_config.json")


def check_free(target: str | os.PathLike) -> Path:
    """The absolute path of a folder that is yet to be written.

    Raises:
        ValueError: It is a file, or a folder with something in it.
    """
    path = Path(target).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is already there, and nothing is overwritten. Name a new folder, or remove it.")
    return path


@contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` once the block has ended well; otherwise it is removed.

    What killed processes have left of the same target is removed with the first that ends well.

    Raises:
        ValueError: `target` is a file or a folder with something in it.
    """
    path = check_free(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.partial-"
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)  # mkdtemp gives it to its owner alone
        sync_folder(partial)
        os.replace(partial, path)
        sync_names(path.parent)
        for other in path.parent.iterdir():  # they can only fail now, since the name is taken
            if other.name.startswith(prefix):
                shutil.rmtree(other, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Give a complete folder its name; what stood there before is gone, or moved beside `source` if that was killed.

    Args:
        source: On the same file system.
        target: Is absent, or the old folder, or the new one, at any time; never a mixture.
    """
    sync_folder(source)
    if target.exists():
        old = source.with_name(f"{source.name}.old")
        os.replace(target, old)
        os.replace(source, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(source, target)
    sync_names(target.parent)


def move_into(source: Path, target: Path) -> None:
    """Move a model's files into a folder that may hold other things; until all are there, nothing can load it.

    Args:
        source: A complete folder on the same file system; empty afterwards.
        target: Has no configuration while files move: it is removed first, and the new one comes last.
    """
    sync_folder(source)
    names = sorted(os.listdir(source), key=lambda name: (name in _ENTRIES, name))
    if set(names) & set(_ENTRIES):
        for name in _ENTRIES:
            (target / name).unlink(missing_ok=True)
        sync_names(target)
    for name in names:
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        if name in _ENTRIES:
            sync_names(target)
        os.replace(source / name, target / name)
    sync_names(target)


def sync_folder(folder: Path) -> None:
    """Wait until every file below `folder`, and its names, are on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place, name), os.O_RDWR)
        sync_names(Path(place))


def sync_names(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, where a system can do that."""
    if os.name == "posix":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
