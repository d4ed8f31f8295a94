"""Run a script in a fresh process in which this package really does not exist.

Neither an installation, an editable one, nor the working directory may supply it: Python starts isolated and without
`site`, and imports from a folder of links to everything installed except this package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_without_package(script: str | os.PathLike, arguments: list[str], folder: str | os.PathLike) -> None:
    """Runs `python script arguments... LIBRARIES`; the script appends LIBRARIES to `sys.path` itself.

    Args:
        script: Script that imports nothing of this package.
        arguments: What comes before the folder of libraries on the command line.
        folder: Empty folder for the links; the process starts there.

    Raises:
        subprocess.CalledProcessError: The script failed; what it said stands on the terminal.
    """
    libraries = Path(folder).resolve() / "libraries"
    link_libraries(libraries)
    copied = libraries.parent / Path(script).name
    copied.write_text(Path(script).read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-I", "-S", str(copied), *arguments, str(libraries)]
    subprocess.run(command, cwd=libraries.parent, check=True)


def link_libraries(libraries: Path, search_path: Sequence[str] | None = None) -> None:
    """Links everything installed, except this package, into a new folder.

    Args:
        libraries: Folder to make.
        search_path: Where to look for what is installed, by default this interpreter's `sys.path`.
    """
    libraries.mkdir()
    for entry in sys.path if search_path is None else search_path:
        if Path(entry).name not in ("site-packages", "dist-packages") or not Path(entry).is_dir():
            continue
        for item in Path(entry).iterdir():
            link = libraries / item.name
            if "adaptive_llava" not in item.name and item.suffix != ".pth" and not os.path.lexists(link):
                link.symlink_to(item, target_is_directory=item.is_dir())
