"""Compare code with its manifest of sha256 sums, and with the files of this package."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from adaptive_llava.modeling.code_files import code_files


def sha256_of(content: bytes) -> str:
    """As the manifest writes it."""
    return hashlib.sha256(content).hexdigest()


def package_sums() -> dict[str, str]:
    """This package's own uploaded files: sha256 by name."""
    return {path.name: sha256_of(path.read_bytes()) for path in code_files()}


def differing_files(found: Mapping[str, bytes], sums: Mapping[str, str] | None = None) -> list[str]:
    """Names of files whose content is not the expected one, or of which none is known.

    Args:
        found: Content by name.
        sums: Expected sha256 by name; `None`: this package's.
    """
    expected = package_sums() if sums is None else sums
    return sorted(name for name, content in found.items() if sha256_of(content) != expected.get(name))
