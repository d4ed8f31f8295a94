"""Answer a dataset of questions about images at several token budgets, and score the answers.

    python -m adaptive_llava evaluate --model my_model --data my_receipts --metric anls --output out/receipts
    torchrun --nproc-per-node 4 -m adaptive_llava evaluate --model user/model --data user/charts --split test \\
        --metric relaxed_accuracy --budgets 1,16,64,576,auto --output out/charts
    python -m adaptive_llava evaluate --plot curve.png out/one/results.json out/other/results.json

Each image is encoded once for all budgets. The same command goes on after an interruption, also with another number of
processes. Written to `--output`, when all is answered: `results.json` and `samples.jsonl`, a line per question.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import adaptive_llava
from adaptive_llava.training.accuracy_plot import draw_results
from adaptive_llava.training.evaluation import (
    MAX_NEW_TOKENS,
    QUESTION,
    BatchAnswers,
    answer_batch,
    batches_by_length,
)
from adaptive_llava.training.evaluation_pieces import Pieces, Processes, ask_all
from adaptive_llava.training.evaluation_results import results_of, table_of
from adaptive_llava.training.metric_table import METRICS, Metric, known_metric
from adaptive_llava.training.question_samples import (
    ANSWER_FIELDS,
    IMAGE_FIELDS,
    QUESTION_FIELDS,
    Sample,
    read_samples,
)
from adaptive_llava.training.router_inputs import fingerprint
from adaptive_llava.training.token_budgets import adaptive_config, named_budgets, read_budgets
from adaptive_llava.training.whole_folder import check_free, whole_folder


RESULTS, SAMPLES = "results.json", "samples.jsonl"

_READING = ("split", "subset", "image_field", "question_field", "answer_field", "limit")
_ASKING = ("prompt", "batch_size", "max_new_tokens")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    check_options(options)
    paths = [Path(path) for path in options.results]
    if options.model is not None:
        output = Path(options.output)
        results = evaluate_dataset(options)
        if results is None:
            return 0
        print(f"\n{table_of(results)}\nwritten: {output / RESULTS}, {output / SAMPLES}")
        paths.insert(0, output / RESULTS)
    if options.plot:
        draw_results([json.loads(path.read_text(encoding="utf-8")) for path in paths], options.plot)
        print(f"drawn: {options.plot}")
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: Neither a model nor results to draw, or a model without what it is asked.
    """
    if options.model is None:
        if not (options.plot and options.results):
            raise ValueError("Pass `--model` to ask one, or `--plot PICTURE` and results files to draw them.")
        return
    missing = [f"--{name}" for name in ("data", "metric", "output") if getattr(options, name) is None]
    if missing:
        raise ValueError(f"`--model` without {', '.join(missing)}: pass what to ask, how to score and where to write.")
    if options.results and not options.plot:
        raise ValueError(
            f"`{options.results[0]}` is of no use without `--plot`, which draws it beside the new results."
        )


def evaluate_dataset(options: argparse.Namespace) -> dict[str, Any] | None:
    """Ask, score and write.

    Returns:
        What `results.json` holds; `None` in any process but the first.

    Raises:
        ValueError: Options that do not go with the model or the data, or the output is there already.
    """
    metric, output = known_metric(options.metric), check_free(options.output)
    budgets = named_budgets(*read_budgets(options.budgets, adaptive_config(options.model)))
    if options.max_new_tokens < 1:
        raise ValueError(f"`--max-new-tokens {options.max_new_tokens}` must be at least 1.")
    fields = {name: getattr(options, name) for name in _READING}
    samples = read_samples(options.data, **fields, seed=options.seed)
    references = [metric.reference(sample) for sample in samples]
    processes = Processes()
    model, processor = _load(options, processes)
    batches = list(batches_by_length(processor, samples, options.batch_size, options.prompt))
    settings = {
        "model": fingerprint({}, model),
        "data": fingerprint({"samples": [(sample.id, sample.question, sample.answers) for sample in samples]}),
        "metric": metric.name,
        "budgets": list(budgets),
        **{name: getattr(options, name) for name in _ASKING},
    }
    if processes.rank == 0:
        pieces = Pieces(output, settings, create=True)
    processes.meet("begun")
    if processes.rank > 0:
        pieces = Pieces(output, settings, create=False)

    def ask(batch: Sequence[int]) -> dict[str, Any]:
        asked = [samples[index] for index in batch]
        said = answer_batch(
            model, processor, asked, budgets, max_new_tokens=options.max_new_tokens, prompt=options.prompt
        )
        return _piece(asked, said, [references[index] for index in batch], metric)

    found = ask_all(batches, ask, pieces, processes)
    if found is None:
        return None
    by_index = {
        index: row
        for batch, piece in zip(batches, found, strict=True)
        for index, row in zip(batch, piece["rows"], strict=True)
    }
    rows = [by_index[index] for index in range(len(samples))]
    seconds = [piece["seconds"] for piece in found]
    figures = results_of(
        rows, seconds, references, metric, model.config, bytes_per_value=model.dtype.itemsize, seed=options.seed
    )
    results = {
        "model": _public_name(options.model),
        "data": _public_name(options.data),
        "token_counts": list(model.config.visual_token_counts),
        **figures,
        "options": {name: getattr(options, name) for name in (*_READING, "seed", *_ASKING)},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "versions": {module.__name__: module.__version__ for module in (adaptive_llava, torch, transformers)},
    }
    with whole_folder(output) as folder:
        with (folder / SAMPLES).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    pieces.remove()
    return results


def _load(options: argparse.Namespace, processes: Processes) -> tuple[Any, Any]:
    from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor

    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(options.model, dtype=options.dtype)
    return model.to(processes.device), AdaptiveLlavaProcessor.from_pretrained(options.model)


def _piece(
    samples: Sequence[Sample], answers: BatchAnswers, references: Sequence[Any], metric: Metric
) -> dict[str, Any]:
    rows = [
        {
            "id": sample.id,
            "question": sample.question,
            "answers": list(sample.answers),
            "text_tokens": answers.text_tokens[row],
            "image_sizes": answers.image_sizes[row],
            "answered": {
                name: {
                    "prediction": texts[row],
                    "visual_tokens": answers.tokens[name][row],
                    "score": round(float(metric.score(texts[row], references[row])), 6),
                }
                for name, texts in answers.texts.items()
            },
        }
        for row, sample in enumerate(samples)
    ]
    return {"rows": rows, "seconds": answers.seconds | {"images": sum(map(len, answers.image_sizes))}}


def _public_name(source: str) -> str:
    """A Hub id as it is, a path without the folders above it."""
    path = Path(source)
    return path.resolve().name if path.exists() else source


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava evaluate",
        description="Answer a dataset of questions about images at several token budgets, and score the answers.",
        epilog="Several processes: torchrun --nproc-per-node 2 -m adaptive_llava evaluate ... An interrupted run goes "
        "on when the same command is given again.",
        allow_abbrev=False,
    )
    parser.add_argument("results", nargs="*", help="with --plot: results.json of other runs to draw")
    parser.add_argument("--model", help="folder or Hub id of an adaptive LLaVA model")
    parser.add_argument(
        "--data", help="folder with manifest.jsonl or metadata.jsonl; *.jsonl, *.json, *.parquet; Hub id"
    )
    parser.add_argument("--metric", help=", ".join(METRICS))
    parser.add_argument("--output", help="folder to write; must be new or empty")
    parser.add_argument(
        "--budgets", "--budget", help="tokens per image, and auto: 1,16,64,auto; default: all counts, auto"
    )
    parser.add_argument("--plot", metavar="PICTURE", help="draw scores against mean tokens; a PNG")
    parser.add_argument("--split", help="split of a stored dataset (its only one, or test, or validation)")
    parser.add_argument("--subset", help="configuration of a dataset on the Hub")
    for name, known in (("image", IMAGE_FIELDS), ("question", QUESTION_FIELDS), ("answer", ANSWER_FIELDS)):
        parser.add_argument(f"--{name}-field", help=f"by default the first of: {', '.join(known)}")
    parser.add_argument("--limit", type=int, help="ask only so many questions, drawn with --seed")
    parser.add_argument("--prompt", default=QUESTION, help="text around {question}, and {options} (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="questions per step (%(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="length at which an answer is cut (%(default)s)"
    )
    parser.add_argument("--dtype", default="auto", help="precision of the model (%(default)s: that of its weights)")
    parser.add_argument("--seed", type=int, default=0, help="of --limit and of the intervals (%(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
