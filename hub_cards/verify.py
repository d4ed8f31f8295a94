"""Check what a repository of the Hub would run, without running it, and say which commit to pin.

    python -m adaptive_llava verify user/name
    python -m adaptive_llava verify user/name@revision

Of one commit, everything but the weights is downloaded and read, and of the weights the headers. Refused are code that
differs from the repository's manifest or from this package's own files, references to other code, pickles, and files
of any kind that loading does not need and that might be run. A code repository that the configs point to is checked
too. Ends with status 1 if anything is refused.
"""

from __future__ import annotations

import argparse
import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import SafetensorsParsingError

from adaptive_llava import __version__
from adaptive_llava.hub_cards.code_manifest import differing_files, package_sums
from adaptive_llava.hub_cards.hub_errors import check_reachable, tell_hub_failures
from adaptive_llava.modeling.code_files import AUTO_MAP, MANIFEST_NAME


_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".keras", ".dill")
_PROGRAMS = (".so", ".dll", ".dylib", ".exe", ".pyc", ".pyd", ".whl", ".sh", ".bat", ".ps1", ".ipynb", ".js", ".jar")
_BINARY = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", "tokenizer.model", "spiece.model")
_MOST_BYTES = 100_000_000


@dataclass
class Checked:
    """What was found in one repository.

    Attributes:
        name: Hub id.
        commit: The commit that was read, to be pinned.
        code: Number of code files.
        refused: Why it should not be loaded; empty if nothing speaks against it.
        notes: What else is worth knowing.
        origins: Hub ids of other repositories whose code its configs ask for.
    """

    name: str
    commit: str
    code: int = 0
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    origins: set[str] = field(default_factory=set)


def verify(name: str, revision: str | None = None) -> list[Checked]:
    """The repository, and the one with its code if that stands elsewhere.

    Args:
        name: Hub id.
        revision: Branch, tag or commit; by default the newest commit of `main`.

    Raises:
        ValueError: It is no Hub id.
        HubFailure: It does not exist, may not be seen, or could not be downloaded.
    """
    first = check_repository(name, revision)
    if len(first.origins) > 1:
        first.refused.append(f"its code is spread over {', '.join(sorted(first.origins))}")
    return [first, *(check_repository(origin) for origin in sorted(first.origins - {name}))]


def check_repository(name: str, revision: str | None = None) -> Checked:
    """Download a commit, and read all of it but the numbers in its weights."""
    check_reachable("verify", name, needs_login=False)
    api = HfApi()
    with tell_hub_failures(name, "was not verified"):
        checked = Checked(name, api.repo_info(name, revision=revision).sha)
        entries = api.list_repo_tree(name, revision=checked.commit, recursive=True)
        sizes = {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
        wanted = [path for path in sizes if _is_wanted(checked, path, sizes[path])]
        for path in sorted(sizes):
            if path.endswith(".safetensors"):
                try:
                    api.parse_safetensors_file_metadata(name, path, revision=checked.commit)
                except SafetensorsParsingError as error:
                    checked.refused.append(f"{path}: no safetensors file ({error})")
        patterns = [glob.escape(path) for path in wanted]
        folder = Path(api.snapshot_download(name, revision=checked.commit, allow_patterns=patterns))
    contents = {path: (folder / path).read_bytes() for path in wanted}
    for path, content in contents.items():
        _check_content(checked, path, content)
    _check_references(checked, contents)
    _check_code(checked, contents, folder)
    return checked


def _is_wanted(checked: Checked, path: str, size: int) -> bool:
    """Whether to download a file; what is refused by its name is not."""
    if path.endswith(_PICKLES):
        checked.refused.append(f"{path}: a pickle or the like, which can run code when it is loaded")
    elif path.endswith(_PROGRAMS) or (path.endswith(".py") and "/" in path):
        checked.refused.append(f"{path}: a program that loading does not need")
    elif size > _MOST_BYTES and not path.endswith(".safetensors"):
        checked.refused.append(f"{path}: {size:,} bytes of an unknown kind")
    else:
        return not path.endswith(".safetensors")
    return False


def _check_content(checked: Checked, path: str, content: bytes) -> None:
    if path.endswith(_BINARY) and not content.startswith((b"\x7fELF", b"MZ", b"PK\x03\x04", b"\x80", b"#!")):
        return
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        checked.refused.append(f"{path}: neither text nor a picture, whatever its name says")
    else:
        if content.startswith(b"#!"):
            checked.refused.append(f"{path}: a script that loading does not need")


def _check_references(checked: Checked, contents: dict[str, bytes]) -> None:
    """Which code the configs ask for: this package's classes, here or in one other repository."""
    known = set(AUTO_MAP.values())
    for path, content in contents.items():
        if not path.endswith(".json"):
            continue
        try:
            parsed = json.loads(content)
        except ValueError:
            checked.refused.append(f"{path}: no JSON")
            continue
        for key, reference in _references(parsed):
            origin, _, name = reference.rpartition("--")
            if key == "custom_pipelines" or name not in known:
                checked.refused.append(f"{path}: asks for other code ({key}: {reference})")
            elif origin:
                checked.origins.add(origin)
            elif f"{name.split('.')[0]}.py" not in contents:
                checked.refused.append(f"{path}: asks for {name}, which is not there")
        if path == "adapter_config.json":
            base = parsed.get("base_model_name_or_path")
            checked.notes.append(f"It is an adapter, and loading it loads {base} too: verify that as well.")


def _references(value: Any) -> Iterator[tuple[str, str]]:
    """Every reference to code in a config, at any depth."""
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("auto_map", "custom_pipelines"):
                yield from ((key, text) for text in _texts(item, key))
            else:
                yield from _references(item)


def _texts(value: Any, key: str) -> Iterator[str]:
    if key == "custom_pipelines":
        yield json.dumps(value)
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item, key)
    elif value is not None:
        yield str(value)


def _check_code(checked: Checked, contents: dict[str, bytes], folder: Path) -> None:
    code = {path: content for path, content in contents.items() if path.endswith(".py")}
    checked.code = len(code)
    if not code:
        return
    sums = _manifest(checked, contents)
    foreign = differing_files(code)
    for name in differing_files(code, sums):
        if name in sums:
            checked.refused.append(f"{name}: differs from the manifest ({MANIFEST_NAME})")
        elif name in foreign:
            checked.refused.append(f"{name}: not in the manifest, and no file of this package")
    checked.refused += [f"{name}: in the manifest, but not there" for name in sorted(set(sums) - set(code))]
    if foreign:
        checked.refused.append(
            f"{len(foreign)} of {len(code)} code files are not those of this package ({__version__}): "
            f"{', '.join(foreign)}. They are another release's, or somebody's own. Install the release that wrote "
            f"them and verify again, or read them in {folder}"
        )
    absent = sorted(set(package_sums()) - set(code))
    if absent and not foreign:
        checked.notes.append(f"It lacks {len(absent)} files of this package: {', '.join(absent)}.")


def _manifest(checked: Checked, contents: dict[str, bytes]) -> dict[str, str]:
    try:
        sums = json.loads(contents[MANIFEST_NAME])["sha256"]
        return {str(name): str(expected) for name, expected in sums.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        checked.refused.append(f"{MANIFEST_NAME}: there is none that can be read")
        return {}


def report(found: list[Checked]) -> str:
    """For people: the verdict, and how to load exactly what was read."""
    lines = []
    for one in found:
        lines.append(f"{one.name} at commit {one.commit}: read, and nothing of it was run")
        lines += [f"  refused: {reason}" for reason in one.refused]
        if one.code and not one.refused:
            lines.append(f"  its {one.code} code files are those of its manifest and of this package ({__version__})")
        lines += [f"  {note}" for note in one.notes]
    if any(one.refused for one in found):
        return "\n".join([*lines, "Do not load it with trust_remote_code=True."])
    pins = f'revision="{found[0].commit}"' + "".join(f', code_revision="{one.commit}"' for one in found[1:])
    trust = ", trust_remote_code=True" if any(one.code for one in found) else ""
    return "\n".join([*lines, f'Load exactly this: from_pretrained("{found[0].name}", {pins}{trust})'])


def main(arguments: list[str] | None = None) -> int:
    """`python -m adaptive_llava verify`."""
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", metavar="user/name[@revision]", help="repository, and branch, tag or commit")
    name, _, revision = parser.parse_args(arguments).repository.partition("@")
    found = verify(name, revision or None)
    print(report(found))
    return 1 if any(one.refused for one in found) else 0
