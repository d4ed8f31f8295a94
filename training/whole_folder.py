"""Folders that appear only when they are complete, on disk as well as by name."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


# What says that a folder is a model or an adapter; without it nothing loads the folder.
_ENTRIES = ("config.json", "adapter_config.json")

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "iostream error")  # it has no class for it


class NotWritten(OSError):
    """A file could not be written; the message names the folder, the reason and the room that is left."""


@contextmanager
def tell_what_is_not_written(name: str | os.PathLike, folder: str | os.PathLike) -> Iterator[None]:
    """Turn what torch, safetensors and the system say of a full disk into one sentence.

    Args:
        name: What is being written in the block.
        folder: On the same file system.

    Raises:
        NotWritten: There was no room.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        if isinstance(error, RuntimeError):
            no_room = any(part in reason for part in _TORCH_WRITES)
            reason = f"torch could not write a file, as on a full disk ({reason})"
        elif isinstance(error, SafetensorError):
            no_room = "serializing" in reason and "deserializing" not in reason
        else:
            no_room = error.errno in _NO_ROOM
        if not no_room:
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise NotWritten(
            f"{name} could not be written: {reason} ({free:.1f} MB are free there). Nothing half-written is left "
            "under its name. Make room, or lift the limit, and run the same command again."
        ) from error


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
        NotWritten: There was no room.
    """
    path = check_free(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.partial-"
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    try:
        with tell_what_is_not_written(path, path.parent):
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
