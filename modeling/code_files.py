"""The remote code of a checkpoint: which files travel with it, where they come from, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path


MANIFEST_NAME = "adaptive_llava_code.json"

AUTO_MAP = {
    "AutoConfig": "configuration_adaptive_llava.AdaptiveLlavaConfig",
    "AutoModel": "modeling_adaptive_llava.AdaptiveLlavaModel",
    "AutoModelForImageTextToText": "modeling_adaptive_llava.AdaptiveLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_adaptive_llava.AdaptiveLlavaForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_adaptive_llava.AdaptiveLlavaForConditionalGeneration",
    "AutoProcessor": "processing_adaptive_llava.AdaptiveLlavaProcessor",
}


def auto_map(code_repository: str | None = None) -> dict[str, str]:
    """Which class serves which Auto class, for `config.json` and `processor_config.json`.

    Args:
        code_repository: Hub id (or folder) of a repository that holds the code for many checkpoints; `None` if the
            code stands beside the weights.
    """
    prefix = f"{code_repository}--" if code_repository else ""
    return {auto_class: prefix + reference for auto_class, reference in AUTO_MAP.items()}


def code_files() -> list[Path]:
    """The flat Python files of a checkpoint, sorted by name.

    In an installed package they stand in `modeling` and `processing`; in a checkpoint loaded as remote code all that
    was fetched stands in this file's own folder.
    """
    here = Path(__file__).resolve().parent
    folders = [here, here.parent / "processing"] if here.name == "modeling" else [here]
    files = [path for folder in folders for path in folder.glob("*.py") if path.name != "__init__.py"]
    return sorted(files, key=lambda path: path.name)


def copy_code(folder: str | os.PathLike) -> list[str]:
    """Write the remote code and its manifest of sha256 sums into a checkpoint folder.

    A file already there with the same content is left alone. Returns the names of all code files in the manifest.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in code_files()}
    for path in code_files():
        destination = target / path.name
        if not destination.exists() or destination.read_bytes() != path.read_bytes():
            # through a temporary name, so that an interruption leaves no half-written module
            partial = destination.with_suffix(".py.partial")
            shutil.copyfile(path, partial)
            os.replace(partial, destination)
    manifest = target / MANIFEST_NAME
    if manifest.exists():
        # a processor saved beside an older model save adds to its list
        names |= {name for name in json.loads(manifest.read_text())["sha256"] if (target / name).exists()}
    sums = {name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in sorted(names)}
    manifest.write_text(json.dumps({"sha256": sums}, indent=2) + "\n")
    return sorted(names)
