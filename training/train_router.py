"""Train a classifier router on labelled images and write it into a checkpoint.

    python -m adaptive_llava train-router --model my_model --output routed \
        --positive data/docvqa data/textvqa data/chartqa --negative data/vqav2 data/st_vqa data/localized_narratives
    python -m adaptive_llava train-router --model my_model --output routed --source photos=my_photos \
        --source charts=my_charts --source pages=org/scans --rung photos=0 --rung charts=1 --rung pages=top

The first command has the sources of the DynamicResampler report, which trains its router apart from the model: pages,
charts and text in pictures get the most tokens, plain pictures the fewest. The images of a source all want one rung
(0 is the fewest tokens). What the router reads of each is computed once and kept; see `router_inputs.py`. With AnyRes
it learns from whole images, since a label says nothing of a tile, and then judges each tile by itself as it did those.

Part of the images is only measured: what is printed, and written to `router_training.json` beside the model, comes
from these. The model's other weights stay as they are; its router, of whatever type, is replaced by the trained one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptive_llava.modeling.router_classifier import FEATURES, ClassifierRouter
from adaptive_llava.modeling.vision_tower_features import has_class_token
from adaptive_llava.training.labelled_images import described_sources, labelled_images, named_places, open_labelled
from adaptive_llava.training.router_fit import fit_router, split_images
from adaptive_llava.training.router_inputs import RouterInputs, default_cache
from adaptive_llava.training.router_report import held_out_report, summary
from adaptive_llava.training.whole_folder import check_free, whole_folder


RESULTS = "router_training.json"


def replace_router(model: nn.Module, **options: Any) -> ClassifierRouter:
    """Give a model a new, untrained classifier; its config says so.

    Args:
        model: A model with a router, of any type.
        options: Of the classifier. What is left out is as in the model's own classifier if it has one; else the
            default, with the mean of the patches where the tower has no [CLS].

    Raises:
        ValueError: A compressor with a single token count, or options that do not fit the tower.
    """
    inner = _inner(model)
    config = inner.config
    if inner.compressor.num_rungs == 1:
        raise ValueError(
            f"The model's compressor {config.compressor!r} has one token count, so there is nothing to choose. Give "
            "it several, such as 'average_pool' with factors [1, 3]."
        )
    own = dict(config.router) if config.router["type"] == "classifier" else {"type": "classifier"}
    if "features" in options or "blocks" in options:
        own.pop("hidden_dim", None)  # written out, it is the width of the old input
    if "features" not in own and not has_class_token(config.vision_config):
        own["features"] = "mean"
    config.router = own | options
    config.check_options()
    like = inner.get_input_embeddings().weight
    inner.router = config.build_router(inner.compressor).to(device=like.device, dtype=like.dtype).eval()
    _write_config(model, router=config.router, router_training=None, calibration=None)
    return inner.router


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    check_free(options.output)
    for name in ("holdout", "validation"):
        if not 0 < getattr(options, name) <= 0.4:
            raise ValueError(f"`--{name} {getattr(options, name)}` must be a share above 0, up to 0.4.")
    for name in ("batch_size", "epochs"):
        if getattr(options, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')} {getattr(options, name)}` must be at least 1.")
    places = named_places(options.source, options.rung, options.positive, options.negative)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    remote = {"trust_remote_code": options.trust_remote_code}
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto", **remote)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    wanted = {"features": options.features, "hidden_dim": options.hidden_dim, "threshold": options.threshold}
    router = replace_router(
        model.eval(),
        **{name: value for name, value in wanted.items() if value is not None},
        **({} if options.blocks is None else {"blocks": options.blocks}),
    )
    sources = open_labelled(places, router.num_rungs, split=options.split, limit=options.limit)
    processor = AutoProcessor.from_pretrained(options.model, **remote)
    reader = RouterInputs(
        _inner(model), router, processor, cache=options.cache or default_cache(), batch_size=options.batch_size
    )
    read = [reader.read(source.images, source.name) for source in sources]
    images = labelled_images(sources, read)
    parts = split_images(images.rungs, validation=options.validation, holdout=options.holdout, seed=options.seed)
    train, validation = parts["train"], parts["validation"]
    fit = fit_router(
        router,
        images.values[train],
        images.rungs[train],
        images.values[validation],
        images.rungs[validation],
        balanced=options.balanced,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        epochs=options.epochs,
        patience=options.patience,
        seed=options.seed,
    )
    counts = list(model.config.visual_token_counts)
    names = [source.name for source in sources]
    report = held_out_report(
        router, images, parts["held_out"], names, counts, balanced=options.balanced, seed=options.seed
    )
    record = {
        "method": "train_router",
        "sources": described_sources(sources, read, images),
        "images": {name: len(indices) for name, indices in parts.items()},
        "balanced": options.balanced,
        "epochs": fit.epochs,
        "validation_loss": round(fit.loss, 6),
        "temperature": round(fit.temperature, 4),
        "auc": {name: row["auc"] for name, row in report["separation"].items()},
        "accuracy": report["accuracy"],
        "seed": options.seed,
        "date": datetime.now(UTC).date().isoformat(),
    }
    result = record | {"router": model.config.router, "counts": counts, "held_out": report}
    _write_config(model, router_training=record)
    processor.router = dict(model.config.router)
    with whole_folder(options.output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / RESULTS).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(summary(result, reader.computed))
    print(f"written: {options.output}, {Path(options.output) / RESULTS}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava train-router", description="Train a classifier router on labelled images."
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of an adaptive LLaVA model")
    parser.add_argument("--output", required=True, help="folder to write: the model with its trained router")
    data = "folder of images, *.jsonl, *.json, saved dataset, *.parquet, or Hub dataset id"
    parser.add_argument("--source", action="append", default=[], metavar="NAME=DATA", help=f"{data}, with a name")
    parser.add_argument("--rung", action="append", default=[], metavar="NAME=RUNG", help="0 (fewest tokens) to 'top'")
    parser.add_argument("--positive", nargs="+", action="extend", default=[], metavar="DATA", help="sources at 'top'")
    parser.add_argument("--negative", nargs="+", action="extend", default=[], metavar="DATA", help="sources at rung 0")
    parser.add_argument("--features", choices=FEATURES, help="what the router reads; default: [CLS] if there is one")
    parser.add_argument("--blocks", type=_whole_numbers, help="further hidden states to read, by index: 6,12,18")
    parser.add_argument("--hidden-dim", type=int, help="width of the hidden layer; default: that of its input")
    parser.add_argument("--threshold", type=float, help="P(document) above which the top count is given (0.5)")
    parser.add_argument("--validation", type=float, default=0.15, help="share of images to stop by (%(default)s)")
    parser.add_argument("--holdout", type=float, default=0.2, help="share of images only measured (%(default)s)")
    parser.add_argument("--no-balance", dest="balanced", action="store_false", help="rungs weigh by their images")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=200, help="most epochs (%(default)s)")
    parser.add_argument("--patience", type=int, default=20, help="epochs without gain before the end (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step of the tower (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of split and training (%(default)s)")
    parser.add_argument("--limit", type=int, help="images per source, at most")
    parser.add_argument("--split", default="train", help="split of a dataset (%(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for what the router reads; default: in the Hub's cache")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in the model's repository")
    return parser


def _whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _inner(model: nn.Module) -> Any:
    return next(part for part in model.modules() if hasattr(part, "extract_features"))


def _write_config(model: nn.Module, **fields: Any) -> None:
    for owner in (model, _inner(model)):  # a head may hold a copy
        for name, value in fields.items():
            setattr(owner.config, name, value)


if __name__ == "__main__":
    raise SystemExit(main())
