"""What the quickstart counts from the answers and prints on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def score(answers: dict[str, list[dict]], group: Callable[[str], str] = str) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy and mean tokens by budget and kind, in the order of the answers; `all` kinds together at the end.

    Args:
        answers: By budget.
        group: Name under which a kind is counted; by default its own.
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for budget, rows in answers.items():
        names = dict.fromkeys(group(row["kind"]) for row in rows)
        groups = {name: [row for row in rows if group(row["kind"]) == name] for name in names} | {"all": rows}
        table[budget] = {
            name: {
                "accuracy": sum(row["right"] for row in group) / len(group),
                "mean_tokens": sum(row["tokens"] for row in group) / len(group),
                "questions": len(group),
            }
            for name, group in groups.items()
        }
    return table


def pick_examples(rows: Sequence[dict], kinds: Sequence[str]) -> list[dict]:
    """One question per image, whether right or wrong; the next image of each kind in turn, as long as there is one.

    Args:
        rows: Answers.
        kinds: Kind of each image to show; repeat one to show more of it.
    """
    first_questions = {row["image"]: row for row in reversed(rows)}
    ordered = [row for row in rows if first_questions[row["image"]] is row]
    waiting = {kind: iter([row for row in ordered if row["kind"] == kind]) for kind in kinds}
    found = (next(waiting[kind], None) for kind in kinds)
    return [row for row in found if row is not None]


def print_model(model: Any, processor: Any) -> None:
    """What the loaded model is."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    image = config.vision_config.image_size
    rows, columns = config.vision_grid
    print(f"  {parameters:,} weights; images of {image} x {image} pixels in {rows} x {columns} patches")
    print(
        f"  compressor {config.compressor['type']}: {', '.join(map(str, config.visual_token_counts))} visual tokens; "
        f"router: {config.router['type']}"
    )
    print(f"  {len(processor.tokenizer)} words, as in 'which digit at r2c3'")


def print_families(scores: dict[str, Any], counts: Sequence[int]) -> None:
    """Tokens per image and accuracy, one line per kind of picture."""
    questions = scores["auto"]["all"]["questions"]
    print(f"\n  {questions} unseen pictures, in fonts that no training picture had, one question each\n")
    print(f"  {'kind':<14}{'tokens':>7}{'right':>8}{f'always {counts[0]}':>12}{f'always {counts[-1]}':>12}")
    for kind, chosen in scores["auto"].items():
        print(
            f"  {kind:<14}{chosen['mean_tokens']:>7.1f}{chosen['accuracy']:>8.0%}"
            f"{scores['smallest'][kind]['accuracy']:>12.0%}{scores['largest'][kind]['accuracy']:>12.0%}"
        )


def print_new_kind(scores: dict[str, Any], counts: Sequence[int], what: str) -> None:
    """How the model does on the new kind of document before it is taught."""
    chosen, largest = scores["auto"]["all"], scores["largest"]["all"]
    print(
        f"  {chosen['questions']} {what}s: {chosen['accuracy']:.0%} right at the {chosen['mean_tokens']:.1f} tokens "
        f"it chooses, {largest['accuracy']:.0%} at {counts[-1]}; guessing gives 10%"
    )


def print_examples(rows: Sequence[dict]) -> None:
    """One line per image: tokens, question, answer, right or wrong."""
    print("\nUnseen pictures, each at the number of tokens the router chose\n")
    print(f"  {'image':<18}{'tokens':>6}  {'question':<31}{'answer':<10}")
    for row in rows:
        verdict = "right" if row["right"] else f"WRONG, it is {row['expected']}"
        name, question = Path(row["image"]).stem, f"{row['question']}?"
        print(f"  {name:<18}{row['tokens']:>6}  {question:<31}{row['answer']:<10}{verdict}")


def run_labels(counts: Sequence[int]) -> dict[str, str]:
    """What each run of the fresh process is called in tables."""
    return {
        "before_auto": "before, per image",
        "before_largest": f"before, always {counts[-1]}",
        "auto": "after, per image",
        "smallest": f"after, always {counts[0]}",
        "largest": f"after, always {counts[-1]}",
    }


def print_scores(scores: dict[str, Any], counts: Sequence[int]) -> None:
    """Accuracy and mean tokens before and after fine-tuning, one line per run and one column per kind."""
    kinds = [kind for kind in scores["auto"] if kind != "all"]
    questions = ", ".join(f"{scores['auto'][kind]['questions']} about {kind}s" for kind in kinds)
    print(f"\nAccuracy, and mean tokens per image in brackets ({questions})\n")
    print("  " + " " * 20 + "".join(f"{f'{kind}s':>20}" for kind in kinds))
    for run, label in run_labels(counts).items():
        cells = (scores[run][kind] for kind in kinds)
        print(f"  {label:<20}" + "".join(f"{cell['accuracy']:>13.1%} ({cell['mean_tokens']:4.1f})" for cell in cells))


def print_own_images(routed: Sequence[dict], side: int) -> None:
    """Tokens of each of the user's own images, if there are any."""
    if not routed:
        return
    print(f"\nYour images, which this small model sees at {side} x {side} pixels and was never trained on: the counts")
    print("show how routing works, not how many tokens they deserve\n")
    for row in routed:
        print(f"  {row['tokens']:>3} tokens  {row['image']}")
    print(f"  mean {sum(row['tokens'] for row in routed) / len(routed):.1f} tokens over {len(routed)} images")


def print_closing(results: dict[str, Any], output: Path, picture: Path) -> None:
    """Time, memory, and where everything was written."""
    seconds, memory = results["seconds"], results["peak_memory_mib"]
    print(
        f"\n{seconds['total']:.0f} s in all; peak memory {memory['training']} MiB in training, "
        f"{memory['fresh_process']} MiB in the fresh process."
    )
    print(f"Picture: {picture}\nResults: {output / 'quickstart_results.json'}\nModel:   {output / 'model'}")
