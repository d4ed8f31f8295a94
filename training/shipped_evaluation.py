"""The shipped model on pictures of its own kinds, and on real images whose words it was never taught.

    python -m adaptive_llava.training.shipped_evaluation --shared ../shared --output results/evaluation.json

It knows the words of `study/families.py` and no others: an unknown word of a question becomes its `<unk>`, and an
answer with an unknown word cannot be given. So on real images its scores say nothing of the method; the file shows
what `evaluate` measures, and `words` how little of each dataset the model can read or say.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_llava.training import evaluate
from adaptive_llava.training.question_samples import read_samples
from adaptive_llava.training.study.families import render
from adaptive_llava.training.study.ship import SHIPPED, load_shipped


OWN = "own pictures"
DATASETS = {  # name: metric
    "easyvqa": "gqa",
    "nlvr": "gqa",
    "photos": "gqa",
    "charts": "relaxed_accuracy",
    "documents": "anls",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava.training.shipped_evaluation", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--shared", default="../shared", help="folder with data/<name>/manifest.jsonl (%(default)s)")
    parser.add_argument("--output", default="results/evaluation.json", help="file to write (%(default)s)")
    parser.add_argument("--questions", type=int, default=60, help="of each dataset, drawn with --seed (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_own_pictures(work / OWN, options.questions, options.seed)
        places = {OWN: work / OWN} | {name: Path(options.shared, "data", name) for name in DATASETS}
        for name, place in places.items():
            output = work / "answers" / name
            asked = {
                "model": SHIPPED,
                "data": place,
                "metric": DATASETS.get(name, "gqa"),
                "limit": options.questions,
                "max-new-tokens": 8,
                "seed": options.seed,
                "output": output,
            }
            print(f"\n{name}", flush=True)
            evaluate.main([str(part) for option, value in asked.items() for part in (f"--{option}", value)])
            results = json.loads((output / evaluate.RESULTS).read_text(encoding="utf-8"))
            samples = read_samples(place, limit=options.questions, seed=options.seed)
            found[name] = {
                "words": {
                    "of_questions_known": known_share(sample.question for sample in samples),
                    "answers_that_can_be_said": known_share((sample.answers[0] for sample in samples), whole=True),
                },
                **results,
            }
    Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {options.output}")
    return 0


def write_own_pictures(folder: Path, number: int, seed: int) -> None:
    """Pictures as the model was trained on, in fonts and rulings it has not seen, with one question each."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for index, picture in enumerate(render(number, seed=seed, test=True)):
            picture.image.save(folder / f"{index}.png")
            question, answer = picture.questions[0]
            row = {"file_name": f"{index}.png", "question": question, "answer": answer, "family": picture.family}
            file.write(json.dumps(row) + "\n")


def known_share(texts: Iterable[str], *, whole: bool = False) -> float:
    """Share of the words, or of the whole texts, that the shipped model has tokens for."""
    tokenizer = load_shipped()[1].tokenizer
    known = [[token != tokenizer.unk_token_id for token in tokenizer(text)["input_ids"]] for text in texts]
    found = [all(text) for text in known] if whole else [token for text in known for token in text]
    return round(float(np.mean(found)), 4)


if __name__ == "__main__":
    raise SystemExit(main())
