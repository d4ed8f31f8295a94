"""Write the card of a saved model or adapter, with its pictures and results, or check the one that is there.

    python -m adaptive_llava card my_model --results out/receipts/results.json --license apache-2.0 \\
        --base-model llava-hf/llava-1.5-7b-hf --dataset user/receipts --language en
    python -m adaptive_llava card my_model --check

What is stated by options is kept in `my_model/card.yaml`, and results are copied beside the model, so that the same
card can be written again with `card my_model`; `push` does that, to name the repository and the commit to pin. A card
that a person wrote or edited is left alone unless `--overwrite` is given; the empty form that transformers or PEFT
leave is not. Ends with status 1 if the card lacks something that it should have; all of it is listed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from adaptive_llava.hub_cards.card_config import base_of, read_config
from adaptive_llava.hub_cards.card_facts import FROM_SCRATCH, RELATIONS, CardFacts, read_facts, write_facts
from adaptive_llava.hub_cards.card_lint import lint_card
from adaptive_llava.hub_cards.card_metadata import (
    EVAL_RESULTS,
    Results,
    check_results,
    eval_result_files,
    is_untrained,
    slug,
)
from adaptive_llava.hub_cards.card_pictures import draw_pictures
from adaptive_llava.hub_cards.card_text import is_as_rendered, render_card
from adaptive_llava.hub_cards.stock_card import is_stock
from adaptive_llava.hub_cards.upload_plan import ADAPTER, CARD, RESULT_FILES, UploadPlan
from adaptive_llava.modeling.configuration_adaptive_llava import AdaptiveLlavaConfig


def main(arguments: list[str] | None = None) -> int:
    """`python -m adaptive_llava card`."""
    options = _parser().parse_args(arguments)
    folder: Path = options.folder
    stated = {name: value for name, value in vars(options).items() if name in _STATED}
    config, facts = described(folder, read_facts(folder, stated))
    if options.check:
        if not (folder / CARD).is_file():
            raise ValueError(f"{folder} has no {CARD} to check. Write one: `python -m adaptive_llava card {folder}`.")
    else:
        if not (may_write(folder) or options.overwrite):
            raise ValueError(
                f"{folder / CARD} was written or edited by hand. Pass --overwrite to replace it, or --check "
                "to check it."
            )
        for path in options.results or ():
            keep_results(folder, path)
        write_facts(folder, facts)
        results = read_results(path for path in folder.iterdir() if is_results(path.name))
        for name in write_card(results, config, facts, folder):
            print(f"written: {folder / name}")
    problems = lint_card((folder / CARD).read_text(encoding="utf-8"), folder, untrained=is_untrained(config, facts))
    for problem in problems:
        print(f"{folder / CARD}: {problem}")
    if not problems:
        print(f"{folder / CARD}: complete")
    return 1 if problems else 0


def described(
    folder: Path, facts: CardFacts, base: str | None = None, token: str | None = None
) -> tuple[AdaptiveLlavaConfig, CardFacts]:
    """The config that a folder's card describes, and the facts with those of an adapter's base.

    Args:
        folder: Holds a model or an adapter.
        facts: Of the folder.
        base: Folder or Hub id of the adapter's base; by default what the adapter says.
        token: Access token for the base; by default that of `hf auth login`, or HF_TOKEN.

    Raises:
        ValueError: It is another kind of model.
        HubFailure: The base could not be read.
    """
    if facts.adapter is None:
        return read_config(folder), facts
    found = base_of(folder, base, token)
    return found.config, replace(facts, chat=found.chat, base_revision=found.commit)


def may_write(folder: Path) -> bool:
    """Whether the folder has no card, or one that nobody wrote: rendered and not edited since, or an empty form."""
    path = folder / CARD
    return not path.is_file() or is_nobodys(path.read_text(encoding="utf-8"))


def is_nobodys(card: str) -> bool:
    """Whether a card was written by a program and not edited since."""
    return is_as_rendered(card) or is_stock(card)


def keep_results(folder: Path, path: Path) -> None:
    """Copy results beside the model, in place of older ones about the same data, split and metric.

    Raises:
        ValueError: They are no results of `evaluate`.
    """
    results = check_results(json.loads(path.read_text(encoding="utf-8")), str(path))
    told = (results["data"], *((results.get("options") or {}).get(name) for name in ("subset", "split")))
    name = "_".join(["evaluation", *(slug(str(part)) for part in told if part), slug(results["metric"])])
    if path.resolve() != (folder / f"{name}.json").resolve():
        (folder / f"{name}.json").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")


def is_results(file: str) -> bool:
    """Whether a file's name is one under which results stand beside a model."""
    return any(fnmatch(file, pattern) for pattern in RESULT_FILES)


def read_results(paths: Iterable[Path]) -> list[Results]:
    """Those of `evaluate` among files with results, each with one or a list of them, by data and metric."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    found = [one for each in read for one in (each if isinstance(each, list) else [each])]
    ours = [results for results in found if isinstance(results, dict) and {"budgets", "metric"} <= set(results)]
    return sorted((check_results(results) for results in ours), key=lambda one: (one["data"], one["metric"]))


def write_card(results: Sequence[Results], config: AdaptiveLlavaConfig, facts: CardFacts, target: Path) -> list[str]:
    """Render a card, with pictures and `.eval_results`.

    Args:
        results: Of `evaluate`.
        config: Of the model.
        facts: What people state.
        target: Folder to write to. Older pictures and entries there stay.

    Returns:
        Names of the files written, the card last.
    """
    card = render_card(results, config, facts)
    names = draw_pictures(results, target)
    for name, text in eval_result_files(results).items():
        (target / EVAL_RESULTS).mkdir(exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
        names.append(name)
    (target / CARD).write_text(card, encoding="utf-8")
    return [*names, CARD]


def describe_upload(
    plan: UploadPlan, folder: Path, name: str, token: str | None = None
) -> tuple[AdaptiveLlavaConfig, CardFacts]:
    """What the card of an upload is written from, as `described`.

    Args:
        plan: What goes up: an adapter's base is the one that its config names there.
        folder: Holds the model or adapter.
        name: Hub id of the repository.
        token: As of `described`.
    """
    facts = replace(read_facts(folder), name=name, loading=None)
    if plan.is_adapter:
        named = json.loads(plan.files[ADAPTER].read_text(encoding="utf-8"))["base_model_name_or_path"]
        return described(folder, replace(facts, base_model=named), named, token)
    config = read_config(folder)
    config.code_repository = plan.code_repository
    return config, facts


def add_card(plan: UploadPlan, staging: Path, config: AdaptiveLlavaConfig, facts: CardFacts) -> None:
    """Put a rendered card, its pictures and `.eval_results` into what goes up.

    Args:
        plan: Gets them, and a note for each thing that the card lacks.
        staging: Where they are written.
        config: Of the model, or of the adapter's base.
        facts: What people state, and the commits to pin.
    """
    written = write_card(_results_in(plan), config, facts, staging)
    plan.files |= {file: staging / file for file in written}
    plan.left_out = [file for file in plan.left_out if file not in written]
    card = (staging / CARD).read_text(encoding="utf-8")
    plan.notes += [f"card: {problem}" for problem in lint_card(card, staging, untrained=is_untrained(config, facts))]


def pin_card(plan: UploadPlan, staging: Path, config: AdaptiveLlavaConfig, facts: CardFacts) -> None:
    """Write the text of an added card again, with another commit to pin."""
    (staging / CARD).write_text(render_card(_results_in(plan), config, facts), encoding="utf-8")


def _results_in(plan: UploadPlan) -> list[Results]:
    return read_results(path for file, path in plan.files.items() if "/" not in file and is_results(file))


_STATED = (
    "name",
    "license",
    "base_model",
    "base_model_relation",
    "datasets",
    "language",
    "summary",
    "training_data",
    "limits",
    "revision",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what `save_pretrained` of a model or adapter and processor wrote")
    parser.add_argument("--results", type=Path, nargs="+", metavar="FILE", help="results.json of `evaluate`")
    parser.add_argument("--check", action="store_true", help="check the card that is there, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace a card that a person wrote or edited")
    parser.add_argument("--name", metavar="USER/NAME", help="repository (default: the folder's name)")
    parser.add_argument("--revision", metavar="COMMIT", help="commit that the loading snippet pins")
    parser.add_argument("--license", help="identifier of the Hub, such as apache-2.0")
    parser.add_argument("--base-model", metavar="USER/NAME", help=f"{FROM_SCRATCH}: trained from nothing")
    parser.add_argument("--relation", dest="base_model_relation", choices=RELATIONS, help="to the base model")
    parser.add_argument("--dataset", dest="datasets", action="append", metavar="NAME", help="training data; repeat it")
    parser.add_argument("--language", action="append", metavar="CODE", help="ISO 639; repeat it for several")
    parser.add_argument("--summary", metavar="TEXT", help="what it is for, in Markdown")
    parser.add_argument("--training-data", metavar="TEXT", help="what it was trained on, in Markdown")
    parser.add_argument("--limits", metavar="TEXT", help="what it cannot do, in Markdown")
    return parser
