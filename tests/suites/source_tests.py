"""The tests in the source distribution of the installed transformers: fetched with pip, checked, never committed.

The distribution leaves out what some of its tests import. `STAND_INS` are ours.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.suites.generation_suite import GenerationTesterMixin
from tests.suites.sample_media import url_to_local_path


# of transformers-<version>.tar.gz on PyPI
SHA256 = {
    "5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
    "4.57.6": "55e44126ece9dc0a291521b7e5492b572e6ef2766338a610b9ab5afbb70689d3",
}
PACKAGE = "transformers_source_tests"


class ExportTesterMixin:
    """Instead of the exporters' tests, which the distribution lacks: none."""


STAND_INS: dict[str, dict[str, Any]] = {
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "fetch_hub_objects_for_ci": {"url_to_local_path": url_to_local_path},
    "utils.fetch_hub_objects_for_ci": {"url_to_local_path": url_to_local_path},
}


class NotFetched(OSError):
    """The source distribution is not here and could not be downloaded."""


def load_tests(name: str) -> Any:
    """A module of the tests of the installed transformers, such as `"test_modeling_common"`.

    Where the tests cannot be fetched the calling module is skipped; in CI (`CI` is set) that is an error.
    """
    try:
        folder = fetch_tests(transformers.__version__, cache_folder())
    except NotFetched as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error), allow_module_level=True)
    _install(PACKAGE, {"__path__": [str(folder)]})
    for module, content in STAND_INS.items():
        parent = module.rpartition(".")[0]
        if parent:
            _install(parent, {"__path__": []})
        _install(module, content)
    return importlib.import_module(f"{PACKAGE}.{name}")


def without_unknown_tests(suite: type) -> type:
    """A class decorator that takes out the overrides of tests which this release of transformers does not have."""
    inherited = {name for base in suite.__mro__[1:] for name in vars(base)}
    for name in [name for name in vars(suite) if name.startswith("test_") and name not in inherited]:
        delattr(suite, name)
    return suite


def cache_folder() -> Path:
    """Where source distributions are kept: `ADAPTIVE_LLAVA_SUITES_CACHE`, or a folder of the user's cache."""
    given = os.environ.get("ADAPTIVE_LLAVA_SUITES_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptive-llava" / "suites"


def fetch_tests(version: str, cache: Path) -> Path:
    """The folder `tests/` of a release, unpacked from its source distribution.

    Args:
        version: Release of transformers; one of `SHA256`.
        cache: Folder that keeps the distribution, and gets the unpacked tests.

    Raises:
        NotFetched: The distribution is not in the cache, and pip cannot download it.
        ValueError: An unknown release, or a distribution with another checksum.
    """
    if version not in SHA256:
        raise ValueError(
            f"`version={version!r}` has no checksum here; known: {', '.join(SHA256)}. Add it to `SHA256`."
        )
    archive = cache / f"transformers-{version}.tar.gz"
    if not archive.is_file():
        _download(version, cache)
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    if checksum != SHA256[version]:
        raise ValueError(
            f"{archive} has the checksum {checksum}, expected {SHA256[version]}. Remove the file, and run again."
        )
    folder = cache / f"tests-{version}-{checksum[:8]}"
    if not folder.is_dir():
        _unpack(archive, f"transformers-{version}/tests/", folder)
    return folder


def _download(version: str, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        command += ["--dest", folder, f"transformers=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise NotFetched(f"transformers' own tests ({version}) could not be downloaded: {reason}")
        name = f"transformers-{version}.tar.gz"
        os.replace(Path(folder) / name, cache / name)


def _unpack(archive: Path, prefix: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, tarfile.open(archive) as content:
        members = [member for member in content if member.isfile() and member.name.startswith(prefix)]
        content.extractall(folder, members, filter="data")
        if not target.is_dir():  # another test process may have been first
            (Path(folder) / prefix).replace(target)


def _install(name: str, content: dict[str, Any]) -> None:
    module = sys.modules.setdefault(name, types.ModuleType(name))
    vars(module).update(content)
