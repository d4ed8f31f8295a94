"""Does joint routing spend fewer tokens on simple images, at the accuracy of the most tokens? On a tiny model, it can.

    python -m adaptive_llava.training.joint_routing_study [--seeds 0 1 2] [--output results]

For each seed a model is trained from nothing at 16 tokens per image, then by the same number of further steps on the
same images, either jointly with its router (at 1, 4 and 16 tokens, no label says which image needs which) or at 16
tokens as before. Controls, where answers at the router's own choices are compared with:

* every image at 1, 4 or 16 tokens, by the same model;
* the router's counts shuffled over the images;
* joint training from a model that never learned to see (`cold_start`), and without the entropy term
  (`temperature_0`), for the first seed only.

Written: `joint_routing.json` and `joint_routing.png`. Three rendered kinds of image that were made to need different
counts: this shows that the method finds them, not that routing pays on real images.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_llava.training.rendered_images import KINDS, RenderedImage, render_images


WARM_STEPS, FURTHER_STEPS, BATCH_SIZE = 1500, 400, 32
LEARNING_RATE = 1e-3
HELD_OUT_IMAGES = 900
SHUFFLES = 200
MARGIN = 0.02  # accuracy that routing may lose

# Sets that share no random numbers, apart from each other by the seeds of the study.
_WARM_SEED, _FURTHER_SEED, _HELD_OUT_SEED = 1000, 2000, 3000


def run(seeds: Sequence[int], steps_scale: float = 1.0) -> dict[str, Any]:
    """The whole study; what `joint_routing.json` holds.

    Args:
        seeds: One run each.
        steps_scale: Multiplies training steps and image counts.
    """
    import torch
    import transformers

    torch.set_num_threads(1)  # these matrices are too small to share among threads
    transformers.utils.logging.set_verbosity_error()
    start = time.process_time()
    runs = [run_seed(seed, steps_scale, controls=seed == seeds[0]) for seed in seeds]
    return {
        "command": f"python -m adaptive_llava.training.joint_routing_study --seeds {' '.join(map(str, seeds))}",
        "steps": {"warm": _scaled(WARM_STEPS, steps_scale), "further": _scaled(FURTHER_STEPS, steps_scale)},
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "runs": runs,
        "summary": summarise(runs),
        "cpu_seconds": round(time.process_time() - start),
    }


def run_seed(seed: int, steps_scale: float, *, controls: bool) -> dict[str, Any]:
    """One seed: every arm's accuracy and mean tokens by kind of image."""
    from adaptive_llava.training.quickstart_report import score
    from adaptive_llava.training.tiny_model import build_model, train_from_scratch

    router = {"type": "classifier"}
    steps = _scaled(FURTHER_STEPS, steps_scale)
    rows = _rows(_scaled(FURTHER_STEPS * BATCH_SIZE, steps_scale), _FURTHER_SEED + seed)
    model, processor = build_model(seed, router=router)
    _say(f"seed {seed}: from scratch at the largest count")
    train_from_scratch(model, processor, steps=_scaled(WARM_STEPS, steps_scale), seed=_WARM_SEED + seed)
    largest = model.config.visual_token_counts[-1]
    arms: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        held_out = write_images(
            render_images(_scaled(HELD_OUT_IMAGES, steps_scale), seed=_HELD_OUT_SEED + seed), Path(folder)
        )

        def further(name: str, start: Any, **options: Any) -> Any:
            _say(f"seed {seed}: {name}")
            arm = train_further(copy.deepcopy(start), processor, rows, steps, seed=seed, **options)
            budgets = [largest] if name == "largest_only" else ["auto", *arm.config.visual_token_counts]
            answers = ask(arm, processor, held_out, budgets)
            arms[name] = score(answers)
            return answers

        arms["before"] = score(ask(model, processor, held_out, [largest]))
        answers = further("joint", model, joint=True)
        arms["joint"] |= shuffled_choice(answers, seed)
        further("largest_only", model, joint=False)
        if controls:
            further("temperature_0", model, joint=True, temperature=0.0)
            untrained, _ = build_model(seed, router=router)
            further("cold_start", untrained, joint=True, allow_cold_start=True)
    return {"seed": seed, "counts": list(model.config.visual_token_counts), "arms": arms}


def write_images(images: Sequence[RenderedImage], folder: Path) -> list[dict[str, Any]]:
    """Saves images as PNG; two questions are asked about each, in turn."""
    entries = []
    for index, image in enumerate(images):
        path = folder / f"{image.kind}_{index:03d}.png"
        image.image.save(path)
        first = index // len(KINDS)  # not always the same two cells
        asked = [image.questions[(first + offset) % len(image.questions)] for offset in (0, 1)]
        entries.append({"path": str(path.resolve()), "kind": image.kind, "questions": asked})
    return entries


def train_further(model: Any, processor: Any, rows: Any, steps: int, *, joint: bool, seed: int, **options: Any) -> Any:
    """Train everything, the vision tower too, jointly with the router or at the largest count only.

    Args:
        model: Changed in place.
        processor: Its processor.
        rows: Dataset of `messages` and `images`.
        steps: Optimiser steps.
        joint: With `JointRoutingTrainer`; otherwise `SFTTrainer` at the largest count.
        seed: Order of the images.
        options: Further fields of `JointRoutingConfig`.
    """
    from transformers import PrinterCallback
    from trl import SFTConfig

    from adaptive_llava.training.joint_routing import JointRoutingConfig, build_joint_trainer
    from adaptive_llava.training.sft import build_trainer

    with tempfile.TemporaryDirectory() as folder:
        training = (JointRoutingConfig if joint else SFTConfig)(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            seed=seed,
            assistant_only_loss=True,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            **options,
        )
        build = build_joint_trainer if joint else build_trainer
        fixed = {} if joint else {"visual_token_budget": model.config.visual_token_counts[-1]}
        trainer = build(model, processor, training, rows, train_vision_tower=True, **fixed)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()


def ask(model: Any, processor: Any, images: list[dict], budgets: Sequence[int | str]) -> dict[str, list[dict]]:
    """Answers to every question about every image at each budget, by the budget's name."""
    from adaptive_llava.training.quickstart_answers import answer

    return {str(budget): answer(model, processor, images, budget) for budget in budgets}


def shuffled_choice(answers: dict[str, list[dict]], seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Scores if the router's counts were dealt to the images at random, mean of many deals.

    Args:
        answers: Of one model at `"auto"` and at each count; the same questions in the same order.
        seed: Of the deals.
    """
    from adaptive_llava.training.quickstart_report import score

    rng = np.random.default_rng(seed)
    chosen = {row["image"]: row["tokens"] for row in answers["auto"]}
    dealt: list[dict] = []
    for _ in range(SHUFFLES):
        counts = dict(zip(chosen, rng.permutation(list(chosen.values())).tolist(), strict=True))
        dealt += [answers[str(counts[row["image"]])][place] for place, row in enumerate(answers["auto"])]
    return score({"shuffled": dealt})


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per kind, over the seeds: accuracy of routing against the largest count only, and the tokens it spent."""
    kinds = {}
    for kind in (*KINDS, "all"):
        cells = [
            {
                "routed": run["arms"]["joint"]["auto"][kind],
                "shuffled": run["arms"]["joint"]["shuffled"][kind],
                "largest": run["arms"]["largest_only"][str(run["counts"][-1])][kind],
            }
            for run in runs
        ]
        difference = [cell["routed"]["accuracy"] - cell["largest"]["accuracy"] for cell in cells]
        kinds[kind] = {
            "routed": _mean([cell["routed"]["accuracy"] for cell in cells]),
            "largest": _mean([cell["largest"]["accuracy"] for cell in cells]),
            "shuffled": _mean([cell["shuffled"]["accuracy"] for cell in cells]),
            "mean_tokens": _mean([cell["routed"]["mean_tokens"] for cell in cells]),
            "difference": _mean(difference),
            "difference_by_seed": [round(value, 4) for value in difference],
            "within_margin": all(abs(value) <= MARGIN for value in difference),
        }
    fewer = [
        run["arms"]["joint"]["auto"]["scene"]["mean_tokens"] < run["arms"]["joint"]["auto"]["document"]["mean_tokens"]
        for run in runs
    ]
    return {"margin": MARGIN, "kinds": kinds, "fewer_tokens_on_scenes_than_documents": all(fewer)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava.training.joint_routing_study", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (%(default)s)")
    parser.add_argument("--output", default="results", help="folder to write to (%(default)s)")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="multiplies training steps and image counts (%(default)s)"
    )
    options = parser.parse_args(arguments)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    result = run(options.seeds, options.steps_scale)
    (output / "joint_routing.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(result, output / "joint_routing.png")
    for kind, row in result["summary"]["kinds"].items():
        _say(
            f"{kind:<10}{row['mean_tokens']:5.1f} tokens  {row['routed']:.1%} right, {row['largest']:.1%} at the "
            f"largest count only, {row['shuffled']:.1%} shuffled"
        )
    return 0


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy against mean tokens: one panel per kind, one point per seed and way to choose the count."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = result["runs"][0]["counts"]
    ways = [
        ("joint", "auto", "router", "#c0392b", "o"),
        ("joint", "shuffled", "same counts, shuffled", "#888888", "x"),
    ]
    ways += [("joint", str(count), f"always {count}", "#7a9cc6", f"${count}$") for count in counts]
    ways += [("largest_only", str(counts[-1]), f"trained at {counts[-1]} only", "#2c3e50", "+")]
    kinds = list(result["summary"]["kinds"])
    figure = Figure(figsize=(3.2 * len(kinds), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        for arm, way, label, colour, marker in ways:
            cells = [run["arms"][arm][way][kind] for run in result["runs"]]
            tokens, accuracy = [c["mean_tokens"] for c in cells], [c["accuracy"] for c in cells]
            axes.scatter(tokens, accuracy, label=label, color=colour, marker=marker, s=60, alpha=0.8)
        axes.set(title=kind, xlabel="mean tokens per image", xscale="log", xticks=counts, xticklabels=counts)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("right answers")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _rows(count: int, seed: int) -> Any:
    from datasets import Dataset

    from adaptive_llava.training.tiny_model import conversation

    rng = np.random.default_rng(seed)
    images = render_images(count, seed=seed)
    return Dataset.from_list([{"images": [image.image], "messages": conversation(image, rng)} for image in images])


def _scaled(number: int, scale: float) -> int:
    return max(4, round(number * scale))


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
