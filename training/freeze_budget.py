"""Write a copy of a checkpoint that spends the same number of visual tokens on every image (with AnyRes: view).

    python -m adaptive_llava freeze-budget my_model --tokens 144 --to my_model_144

Engines that know an image's size and nothing else can then serve it: the router is `fixed`, and the processor writes
one placeholder per visual token. Weights, tokenizer and code are the source's own, byte by byte; only weights of the
former router are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from adaptive_llava.modeling.configuration_adaptive_llava import AdaptiveLlavaConfig
from adaptive_llava.modeling.visual_token_geometry import highest_rung
from adaptive_llava.training.whole_folder import check_free, whole_folder


CONFIG, PROCESSOR, INDEX = "config.json", "processor_config.json", "model.safetensors.index.json"
# what only trainers read, and what tells of the former router
_LEFT_OUT = (
    "*.pt",
    "*.pth",
    "*.bin",
    "README.md",
    "trainer_state.json",
    "calibration_histogram.png",
    "router_training.json",
)


def freeze_budget(source: str | os.PathLike, target: str | os.PathLike, tokens: int) -> AdaptiveLlavaConfig:
    """Write the copy; the target appears only when it is complete.

    Args:
        source: Folder of an adaptive LLaVA model with its processor.
        target: Folder to write; must not exist, or be empty.
        tokens: Most visual tokens for an image; with AnyRes for each of its views, so that an image's tokens follow
            from its size. The largest count that fits is taken.

    Returns:
        The copy's config.

    Raises:
        ValueError: `source` is no such folder, `tokens` is below the model's smallest count, or `target` is taken.
    """
    folder = Path(source)
    check_free(target)
    check_model_folder(folder)
    counts = AdaptiveLlavaConfig.from_pretrained(str(folder)).visual_token_counts
    if tokens < counts[0]:
        raise ValueError(
            f"`tokens={tokens}` is below the smallest count of this model (counts: {list(counts)}). Pass at least "
            f"{counts[0]}."
        )
    router = {"type": "fixed", "rung": highest_rung(counts, tokens)}
    with whole_folder(target) as copy:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not any(path.match(pattern) for pattern in (*_LEFT_OUT, ".*")):
                _copy(path, copy / path.name)
        if (folder / "additional_chat_templates").is_dir():
            shutil.copytree(folder / "additional_chat_templates", copy / "additional_chat_templates")
        _forget_router_weights(copy)
        _change(copy / CONFIG, router=router, calibration=None, router_training=None)
        _change(copy / PROCESSOR, router=router, layout="expanded")
    return AdaptiveLlavaConfig.from_pretrained(str(target))


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that does not hold an adaptive LLaVA model with its processor.

    Raises:
        ValueError: It holds something else; what to do is said.
    """
    missing = [name for name in (CONFIG, PROCESSOR) if not (folder / name).is_file()]
    if missing:
        advice = (
            "It holds an adapter: merge it first, with `python -m adaptive_llava.training.merge`."
            if (folder / "adapter_config.json").is_file()
            else "Pass a folder that `save_pretrained` of the model and of its processor wrote."
        )
        raise ValueError(f"{folder} has no {' and no '.join(missing)}. {advice}")
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"`{folder / CONFIG}` holds no JSON object ({error}). Save the model again.") from error
    if kind != AdaptiveLlavaConfig.model_type:
        raise ValueError(
            f"{folder} holds a {kind!r} model. Only adaptive LLaVA models have counts to choose from: convert it "
            "with `python -m adaptive_llava convert`."
        )


def main(arguments: list[str] | None = None) -> int:
    """Freeze as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m adaptive_llava freeze-budget", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="DIR", help="folder of an adaptive LLaVA model with its processor")
    parser.add_argument(
        "--tokens", type=int, required=True, help="most visual tokens for an image (AnyRes: for a view)"
    )
    parser.add_argument("--to", dest="target", required=True, help="folder to write")
    options = parser.parse_args(arguments)
    config = freeze_budget(options.source, options.target, options.tokens)
    count = config.visual_token_counts[config.router["rung"]]
    part = "view" if config.tiling["type"] == "anyres" else "image"
    print(f"{options.target}: {count} visual tokens for every {part} (of {list(config.visual_token_counts)})")
    return 0


def _copy(source: Path, target: Path) -> None:
    # no hard link: saving into one of the folders later would change the other
    shutil.copyfile(source.resolve(), target)


def _change(path: Path, **entries: Any) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(stored | entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _forget_router_weights(folder: Path) -> None:
    """Take the router's tensors out of the shards that hold some, and out of the index."""
    dropped = {"total_size": 0, "total_parameters": 0}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            names, metadata = list(tensors.keys()), tensors.metadata()
            former = [tensors.get_tensor(name) for name in names if _is_of_router(name)]
            if not former:
                continue
            rest = {name: tensors.get_tensor(name) for name in names if not _is_of_router(name)}
        dropped["total_size"] += sum(tensor.nbytes for tensor in former)
        dropped["total_parameters"] += sum(tensor.numel() for tensor in former)
        shard.unlink()
        if rest:
            save_file(rest, shard, metadata)
    index = folder / INDEX
    if dropped["total_parameters"] and index.is_file():
        stored = json.loads(index.read_text(encoding="utf-8"))
        sizes = {name: size - dropped.get(name, 0) for name, size in stored["metadata"].items()}
        weights = {name: shard for name, shard in stored["weight_map"].items() if not _is_of_router(name)}
        _change(index, metadata=sizes, weight_map=weights)


def _is_of_router(name: str) -> bool:
    return name.removeprefix("model.").startswith("router.")


if __name__ == "__main__":
    raise SystemExit(main())
