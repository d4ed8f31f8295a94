"""The model that comes with the package: the study's best elastic model, with its classifier as its router.

    python -m adaptive_llava.training.study.ship --config training/study/cpu.yaml

Of all seeds and of both compressors that can spend several counts, the model whose classifier answers most calibration
pictures at the study's target mean. The classifier is trained again as in the study; the price of a token that meets
the target is written into its biases, so that the likeliest rung is the priced one.

Written to `--output`: config, safetensors, processor, tokenizer, `README.md` (the card), and `results.json`, whose
figures are those of test pictures; and, so that `push` can write the card again, `evaluation.json` and `card.yaml`.
The remote code is not: the package has it, and `save_pretrained` adds it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptive_llava.hub_cards.card_facts import FROM_SCRATCH, CardFacts, write_facts
from adaptive_llava.hub_cards.card_text import render_card
from adaptive_llava.training.count_price import price_for, shares_of_largest
from adaptive_llava.training.study.arms import (
    Arm,
    arms_of,
    cheapest_right_rungs,
    new_model,
    pictures_of,
    train_classifier,
)
from adaptive_llava.training.study.policies import by_value
from adaptive_llava.training.study.settings import Settings, read_settings
from adaptive_llava.training.study.small_model import answers, take_weights


SHIPPED = Path(__file__).resolve().parent / "checkpoint"

_ARMS = ("pool", "resampler")
_LOADING = """It comes with the package:

```python
from adaptive_llava.training.study.families import render
from adaptive_llava.training.study.ship import load_shipped

model, processor = load_shipped()
picture = render(1, seed=1, test=True, families=["page_4"])[0]
question, answer = picture.questions[0]
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=picture.image, text=prompt, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=2)
```"""
_TRAINING_DATA = """Pictures that `adaptive_llava.training.study.families` draws, and nothing else; the test
pictures are in fonts and rulings that training pictures never have. What the study says about routing is in
`training/study/results`. It is rebuilt from nothing by

```sh
make study
python -m adaptive_llava.training.study.ship
```"""
_AUTO_MAP_FILES = ("config.json", "processor_config.json")


def load_shipped() -> tuple[Any, Any]:
    """The shipped model, ready to answer, and its processor. It reads pictures of `families.render`."""
    from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor

    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(SHIPPED)
    return model.eval(), AdaptiveLlavaProcessor.from_pretrained(SHIPPED)


def best_model(settings: Settings, work: Path) -> tuple[int, Arm]:
    """The seed and the arm whose classifier is right most often on calibration pictures, at the target mean."""
    found = []
    for seed in settings.seeds:
        for arm in (arm for arm in arms_of(settings) if arm.name in _ARMS):
            evidence = np.load(work / f"seed_{seed}" / f"{arm.name}.npz")
            right, said = evidence["right_calibration"], evidence["classifier_calibration"]
            counts = new_model(settings, seed, arm.fields)[0].config.visual_token_counts
            choice = by_value(said, said, counts, settings.target_mean)
            found.append((float(right[np.arange(len(right)), choice].mean()), seed, arm))
    _, seed, arm = max(found, key=lambda entry: entry[0])
    return seed, arm


def build(settings: Settings, work: Path, seed: int, arm: Arm) -> tuple[Any, Any, dict[str, Any]]:
    """The model with its router, its processor, and what it answers on the test pictures."""
    model, processor = new_model(settings, seed, arm.fields)
    take_weights(model, torch.load(work / f"seed_{seed}" / f"{arm.name}.pt", weights_only=True))
    model.config.compressor_trained = True
    model.eval()
    router, counts = model.model.router, model.config.visual_token_counts
    train_classifier(router, settings, seed, model, processor, cheapest_right_rungs(settings, seed, model, processor))
    evidence = np.load(work / f"seed_{seed}" / f"{arm.name}.npz")
    price = price_for(evidence["classifier_calibration"], counts, settings.target_mean)
    with torch.no_grad():
        router.linear_2.bias -= torch.from_numpy(price * shares_of_largest(counts)).float()
    model.config.router_training = {
        "method": "study",
        "price_of_the_largest_count": round(price, 4),
        "target_mean": settings.target_mean,
    }
    return model, processor, _test(settings, seed, arm, model, processor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava.training.study.ship", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--config", default=str(SHIPPED.parent / "cpu.yaml"), help="settings of the run (%(default)s)")
    parser.add_argument("--work", help="folder of its pieces (study_work/<name>)")
    parser.add_argument("--output", default=str(SHIPPED), help="folder to write to (%(default)s)")
    options = parser.parse_args(arguments)
    settings = read_settings(options.config)
    work = Path(options.work or Path("study_work") / settings.name)
    model, processor, results = build(settings, work, *best_model(settings, work))
    write(model, processor, results, Path(options.output))
    print(json.dumps(results["all"], indent=2))
    return 0


def write(model: Any, processor: Any, results: dict[str, Any], output: Path) -> None:
    """Write the folder, in place of an older one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for path in (*folder.glob("*.py"), folder / "adaptive_llava_code.json"):
            path.unlink()
        for file in _AUTO_MAP_FILES:
            fields = json.loads((folder / file).read_text(encoding="utf-8"))
            fields.pop("auto_map")
            (folder / file).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (folder / "evaluation.json").write_text(json.dumps(evaluations(results), indent=1) + "\n", encoding="utf-8")
        write_facts(folder, card_facts(model, results))
        (folder / "README.md").write_text(card(model, results), encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        shutil.copytree(folder, output)


def card_facts(model: Any, results: dict[str, Any]) -> CardFacts:
    """What the model card says beside config and results."""
    return CardFacts(
        name="The small model of adaptive-llava",
        license="apache-2.0",
        base_model=FROM_SCRATCH,
        datasets=(),
        language=("en",),
        summary=(
            f"It reads pictures of {results['image_size']} pixels of the kinds that "
            '`adaptive_llava.training.study.families` draws, asked in their words ("which digit at r2c3"), and '
            "nothing else: it is here to try every part of the package in seconds on a CPU."
        ),
        training_data=_TRAINING_DATA,
        loading=_LOADING,
        weights=model.num_parameters(),
    )


def evaluations(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The results as `evaluate` writes them: of all test pictures, and of each family as a subset of them."""
    number, counts = results["test_pictures"], results["counts"]
    return [
        {
            "data": "test pictures",
            "metric": "accuracy",
            "questions": number if family is None else number // len(results["families"]),
            "budgets": [
                *(
                    {"budget": str(count), "score": {"value": row[str(count)]["accuracy"]}, "mean_tokens": count}
                    for count in counts
                ),
                {"budget": "auto", "score": {"value": row["auto"]["accuracy"]}, "mean_tokens": row["auto"]["tokens"]},
            ],
            "options": {"subset": family},
            "measured_by": "python -m adaptive_llava.training.study.ship",
        }
        for family, row in {None: results["all"], **results["families"]}.items()
    ]


def card(model: Any, results: dict[str, Any]) -> str:
    """The model card, by the template of all cards."""
    return render_card(evaluations(results), model.config, card_facts(model, results), pictures=False)


@torch.no_grad()
def _test(settings: Settings, seed: int, arm: Arm, model: Any, processor: Any) -> dict[str, Any]:
    from adaptive_llava.training.tiny_model import pixels_of

    pictures = pictures_of(settings, "test", seed)
    right = answers(model, processor, pictures, seed=seed)
    pixels = pixels_of(processor, [picture.pixels for picture in pictures])
    features = [model.model.extract_features(batch) for batch in pixels.split(100)]
    choice = torch.cat([model.model.router(part).rungs for part in features]).numpy()
    counts = np.asarray(model.config.visual_token_counts)
    families = np.array([picture.family for picture in pictures])

    def row(where: np.ndarray) -> dict[str, Any]:
        chosen = right[where, choice[where]]
        fixed = {str(count): {"accuracy": round(float(right[where, r].mean()), 4)} for r, count in enumerate(counts)}
        tokens = round(float(counts[choice[where]].mean()), 2)
        return {"auto": {"accuracy": round(float(chosen.mean()), 4), "tokens": tokens}, **fixed}

    return {
        "arm": arm.name,
        "seed": seed,
        "counts": counts.tolist(),
        "image_size": settings.layout.size,
        "test_pictures": len(pictures),
        "all": row(np.arange(len(pictures))),
        "families": {str(name): row(np.flatnonzero(families == name)) for name in dict.fromkeys(families.tolist())},
    }


if __name__ == "__main__":
    sys.exit(main())
