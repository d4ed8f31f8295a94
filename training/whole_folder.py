"""Folders that appear only when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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

    Raises:
        ValueError: `target` is a file or a folder with something in it.
    """
    path = check_free(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)  # mkdtemp gives it to its owner alone
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
