"""Write the card of a saved model, with its pictures and results, or check the one that is there.

    python -m adaptive_llava card my_model --results out/receipts/results.json --license apache-2.0 \\
        --base-model llava-hf/llava-1.5-7b-hf --dataset user/receipts --language en
    python -m adaptive_llava card my_model --check

What is stated by options is kept in `my_model/card.yaml`, and results are copied beside the model, so that the same
card can be written again with `card my_model`; `push` does that, to name the repository and the commit to pin. A card
that a person wrote or edited is left alone unless `--overwrite` is given. Ends with status 1 if the card lacks
something that it should have; all of it is listed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from adaptive_llava.hub_cards.card_facts import FROM_SCRATCH, RELATIONS, CardFacts, read_facts, write_facts
from adaptive_llava.hub_cards.card_lint import lint_card
from adaptive_llava.hub_cards.card_metadata import EVAL_RESULTS, Results, check_results, eval_result_files, slug
from adaptive_llava.hub_cards.card_pictures import draw_pictures
from adaptive_llava.hub_cards.card_text import is_as_rendered, render_card
from adaptive_llava.hub_cards.upload_plan import CARD, CONFIG, RESULT_FILES, UploadPlan
from adaptive_llava.modeling.configuration_adaptive_llava import AdaptiveLlavaConfig


def main(arguments: list[str] | None = None) -> int:
    """`python -m adaptive_llava card`."""
    options = _parser().parse_args(arguments)
    folder: Path = options.folder
    config = read_config(folder)
    if options.check:
        if not (folder / CARD).is_file():
            raise ValueError(f"{folder} has no {CARD} to check. Write one: `python -m adaptive_llava card {folder}`.")
    else:
        stated = {name: value for name, value in vars(options).items() if name in _STATED}
        facts = read_facts(folder, stated)
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
    problems = lint_card((folder / CARD).read_text(encoding="utf-8"), folder, untrained=not config.compressor_trained)
    for problem in problems:
        print(f"{folder / CARD}: {problem}")
    if not problems:
        print(f"{folder / CARD}: complete")
    return 1 if problems else 0


def read_config(folder: Path) -> AdaptiveLlavaConfig:
    """The config of the folder's model.

    Raises:
        ValueError: There is none, or it is that of another kind of model.
    """
    path = folder / CONFIG
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else None
    if kind != AdaptiveLlavaConfig.model_type:
        raise ValueError(
            f"{path} has `model_type={kind!r}`. Pass the folder of a whole {AdaptiveLlavaConfig.model_type!r} model; "
            "merge an adapter into its base first."
        )
    return AdaptiveLlavaConfig.from_pretrained(str(folder))


def may_write(folder: Path) -> bool:
    """Whether the folder has no card, or one that was rendered and not edited since."""
    path = folder / CARD
    return not path.is_file() or is_as_rendered(path.read_text(encoding="utf-8"))


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
    """Those of `evaluate` among files with results, by data and metric."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
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


def gets_card(plan: UploadPlan, folder: Path) -> bool:
    """Whether a push renders the card: not for adapters, and not in place of one written by hand."""
    return not plan.is_adapter and may_write(folder)


def add_card(
    plan: UploadPlan,
    folder: Path,
    staging: Path,
    name: str,
    *,
    revision: str | None = None,
    code_revision: str | None = None,
) -> None:
    """Put a rendered card, its pictures and `.eval_results` into what goes up.

    Args:
        plan: Gets them, and a note for each thing that the card lacks.
        folder: Holds the model.
        staging: Where they are written.
        name: Hub id of the repository.
        revision: Commit to pin.
        code_revision: Commit of the code's own repository.
    """
    config = read_config(folder)
    config.code_repository = plan.code_repository
    facts = replace(read_facts(folder), name=name, revision=revision, code_revision=code_revision)
    results = read_results(path for file, path in plan.files.items() if "/" not in file and is_results(file))
    written = write_card(results, config, facts, staging)
    plan.files |= {file: staging / file for file in written}
    plan.left_out = [file for file in plan.left_out if file not in written]
    card = (staging / CARD).read_text(encoding="utf-8")
    problems = lint_card(card, staging, untrained=not config.compressor_trained)
    plan.notes = [note for note in plan.notes if not note.startswith("card: ")]
    plan.notes += [f"card: {problem}" for problem in problems]


_STATED = (
    "name",
    "license",
    "base_model",
    "base_model_relation",
    "datasets",
    "language",
    "training_data",
    "limits",
    "revision",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what `save_pretrained` of a model and its processor wrote")
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
    parser.add_argument("--training-data", metavar="TEXT", help="what it was trained on, in Markdown")
    parser.add_argument("--limits", metavar="TEXT", help="what it cannot do, in Markdown")
    return parser
