"""What the quickstart counts from the answers and prints on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_llava.training.rendered_images import KINDS


SHOWN_PER_KIND = 4


def score(answers: dict[str, list[dict]]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy and mean tokens by budget and kind, `all` kinds together at the end."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for budget, rows in answers.items():
        groups = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS} | {"all": rows}
        table[budget] = {
            kind: {
                "accuracy": sum(row["right"] for row in group) / len(group),
                "mean_tokens": sum(row["tokens"] for row in group) / len(group),
                "questions": len(group),
            }
            for kind, group in groups.items()
        }
    return table


def pick_examples(rows: Sequence[dict]) -> list[dict]:
    """The first question of the first few images of each kind, as they come."""
    first_questions = {row["image"]: row for row in reversed(rows)}
    ordered = [row for row in rows if first_questions[row["image"]] is row]
    return [row for kind in KINDS for row in [row for row in ordered if row["kind"] == kind][:SHOWN_PER_KIND]]


def print_examples(rows: Sequence[dict]) -> None:
    """One line per image: tokens, question, answer, right or wrong."""
    print("\nHeld-out images, each at the number of tokens the router chose\n")
    print(f"  {'image':<18}{'tokens':>6}  {'question':<31}{'answer':<10}")
    for row in rows:
        verdict = "right" if row["right"] else f"WRONG, it is {row['expected']}"
        name, question = Path(row["image"]).stem, f"{row['question']}?"
        print(f"  {name:<18}{row['tokens']:>6}  {question:<31}{row['answer']:<10}{verdict}")


def print_scores(scores: dict[str, Any], counts: Sequence[int]) -> None:
    """Accuracy and mean tokens, one line per run and one column per kind."""
    labels = {
        "before_largest": f"before LoRA, always {counts[-1]}",
        "before_auto": "before LoRA, per image",
        "smallest": f"after LoRA, always {counts[0]}",
        "auto": "after LoRA, per image",
        "largest": f"after LoRA, always {counts[-1]}",
    }
    questions = ", ".join(f"{scores['auto'][kind]['questions']} about {kind}s" for kind in KINDS)
    print(f"\nAccuracy, and mean tokens per image in brackets ({questions})\n")
    print("  " + " " * 24 + "".join(f"{kind:>15}" for kind in (*KINDS, "all")))
    for run, label in labels.items():
        cells = (scores[run][kind] for kind in (*KINDS, "all"))
        print(f"  {label:<24}" + "".join(f"{cell['accuracy']:>8.1%} ({cell['mean_tokens']:4.1f})" for cell in cells))
    print(f"\n  LoRA saw each image only at its own count; it was not tuned for {counts[-1]} tokens everywhere.")


def print_own_images(routed: Sequence[dict]) -> None:
    """Tokens of each of the user's own images, if there are any."""
    if not routed:
        return
    print("\nYour images, which this tiny model sees at 64 x 64 pixels and was never trained on: the counts show how")
    print("routing works, not how many tokens they deserve\n")
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
