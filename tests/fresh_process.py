"""Runs code in a fresh interpreter in which this package really does not exist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from adaptive_llava.training.process_without_package import link_libraries


_START = """
import importlib.util, sys, warnings
warnings.filterwarnings("ignore")
sys.path.append(sys.argv.pop(1))
assert importlib.util.find_spec("adaptive_llava") is None, "the package is there"
"""


def run_without_package(
    code: str,
    *arguments: object,
    folder: Path,
    python: str = sys.executable,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Standard output of `code`, run isolated and without `site`, with links to all libraries but this package.

    Args:
        code: Python source; `sys.argv[1:]` are the arguments.
        arguments: What the code gets, as text.
        folder: Working directory and home of the process.
        python: Interpreter whose libraries are used.
        variables: Environment of the process; by default an offline one with its caches in `folder`.
    """
    libraries = Path(tempfile.mkdtemp(dir=folder)) / "libraries"
    link_libraries(libraries, _search_path(python))
    offline = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [python, "-I", "-S", "-c", _START + code, str(libraries), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=offline if variables is None else dict(variables),
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@cache
def _search_path(python: str) -> list[str]:
    code = "import json, sys; print(json.dumps(sys.path))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
