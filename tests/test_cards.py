"""Model cards: what the Hub reads of them, what people read, that every snippet runs, and that push pins them."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from datasets import Dataset, List
from datasets import Image as ImageColumn
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from safetensors.torch import load_file

from adaptive_llava import AdaptiveLlavaConfig
from adaptive_llava.__main__ import main as command_line
from adaptive_llava.hub_cards.card import describe_upload
from adaptive_llava.hub_cards.card import main as card_command
from adaptive_llava.hub_cards.card_facts import CardFacts, read_facts, write_facts
from adaptive_llava.hub_cards.card_lint import FIELDS, lint_card
from adaptive_llava.hub_cards.card_metadata import eval_result_files, eval_results, one_line
from adaptive_llava.hub_cards.card_pictures import draw_pictures
from adaptive_llava.hub_cards.card_text import SECTIONS, is_as_rendered, pinned_revision, render_card
from adaptive_llava.hub_cards.papers import bibtex, part_modules
from adaptive_llava.hub_cards.stock_card import is_stock
from adaptive_llava.hub_cards.upload_plan import plan_upload
from adaptive_llava.training import evaluate
from adaptive_llava.training.calibration_record import calibration_text
from adaptive_llava.training.study.families import render
from adaptive_llava.training.study.ship import SHIPPED
from tests.conftest import PRESETS_HERE, tiny_model
from tests.fresh_process import run_without_package
from tests.loopback_hub.adapters import save_adapter
from tests.loopback_hub.running import fault
from tests.test_evaluation import write_pictures
from tests.test_loading_paths import IS_5, save_checkpoint
from tests.test_push import GENERATIONS


pytestmark = pytest.mark.compat

HAS_ENTRIES = hasattr(huggingface_hub, "parse_eval_result_entries")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FACTS = CardFacts(
    name="ada/model",
    license="apache-2.0",
    base_model="org/base",
    datasets=("org/data", "my scans"),
    language=("en", "no"),
    weights=242_500,
)
STATED = ["--license", "mit", "--base-model", "none", "--dataset", "org/data", "--language", "en"]
INJECTED = (
    "a ---\n---\nlicense: mit\n- `x` ```\n| b | {{ 7 * 7 }} <!-- # [y](z) 'q' \"r\": *&!%@ $s$ \u2028\x00\x85 \\"
)


def results(data: str = "org/receipts", metric: str = "anls", **more) -> dict:
    """What `evaluate` writes, with numbers that can be told apart."""
    rows = [("1", 1, 0.25, {"1": 10}), ("36", 36, 0.75, {"36": 10}), ("auto", 8, 0.5, {"1": 8, "36": 2})]
    return {
        "model": "model",
        "data": data,
        "metric": metric,
        "questions": 10,
        "budgets": [
            {
                "budget": name,
                "score": {"value": score, "interval": [score - 0.125, score + 0.125]},
                "mean_tokens": tokens,
                "histogram": histogram,
                "prefill_flops": {"visual_only": tokens * 10**9, "end_to_end": tokens * 3 * 10**9},
                "kv_cache_bytes": tokens * 10**6,
                "ms_per_image": 2.5,
            }
            for name, tokens, score, histogram in rows
        ],
        "options": {"split": "test", "subset": None},
    } | more


@pytest.fixture(scope="module")
def config() -> AdaptiveLlavaConfig:
    return AdaptiveLlavaConfig.from_pretrained(SHIPPED)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The shipped model without its card and what that is written from."""
    left_out = shutil.ignore_patterns("README.md", "card.yaml", "evaluation*.json")
    return shutil.copytree(SHIPPED, tmp_path / "my_model", ignore=left_out)


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def read_back(card: str) -> Any:
    """What huggingface_hub reads of a card."""
    return ModelCard(card).data


def snippets(card: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


# ---- front matter


def test_the_front_matter_is_complete_and_huggingface_hub_reads_it_back(config):
    asked = [results(), results("my scans", "gqa")]
    card = render_card(asked, config, FACTS)
    assert lint_card(card) == []
    data = read_back(card)
    fields = data.to_dict()
    assert fields["library_name"] == "transformers" and fields["pipeline_tag"] == "image-text-to-text"
    assert data.license == "apache-2.0"
    assert (data.base_model, data.base_model_relation) == ("org/base", "finetune")
    assert (data.datasets, data.language, data.metrics) == (["org/data"], ["en", "no"], ["anls", "gqa"])
    assert {"adaptive-llava", "query_resampler", "classifier"} < set(data.tags)
    assert data.model_name == "ada/model" and data.eval_results == eval_results(asked)
    name, found = model_index_to_eval_results(front(card)["model-index"])
    assert name == "ada/model" and found == eval_results(asked)
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in found] == [
        (each, metric, value)
        for each, metric in (("org/receipts", "anls"), ("my scans", "gqa"))
        for value in (0.75, 0.5)
    ]
    assert found[1].metric_args == {"visual_token_budget": "auto", "mean_visual_tokens": 8}
    assert found[1].dataset_split == "test" and found[1].dataset_config is None


def test_the_index_is_short_and_the_tables_are_whole(config):
    part = {"split": "test", "subset": "small"}
    asked = [results(), results(options=part, questions=4), results("my scans", options=part)]
    card = render_card(asked, config, FACTS)
    told = [(one.dataset_name, one.dataset_config, one.metric_value) for one in read_back(card).eval_results]
    # of a subset only where the whole is not there; of budgets the largest and the router's choice
    assert told == [
        (name, subset, value)
        for name, subset in (("org/receipts", None), ("my scans", "small"))
        for value in (0.75, 0.5)
    ]
    scores = "0.250 (0.125 to 0.375) | 0.750 (0.625 to 0.875) | 0.500 (0.375 to 0.625) | 8 |"
    for label, questions in (("org/receipts", 10), ("org/receipts, small", 4), ("my scans, small", 10)):
        assert f"| {label} | anls | {questions} | {scores}" in card and f"| {label} | 8 | 0 | 0 | 2 | 0 | 8 |" in card


def test_results_on_hub_datasets_become_entries_one_file_each():
    files = eval_result_files([results(options={"split": "test", "subset": "small"}), results("my scans")])
    assert list(files) == [f".eval_results/org-receipts_small_anls_{name}.yaml" for name in ("36", "auto")]
    (entry,) = yaml.safe_load(files[".eval_results/org-receipts_small_anls_auto.yaml"])
    assert entry == {
        "dataset": {"id": "org/receipts", "task_id": "small"},
        "value": 0.5,
        "notes": "anls, tokens chosen per image, 8 on average",
    }


@pytest.mark.skipif(not HAS_ENTRIES, reason="huggingface_hub < 1 has no parser of .eval_results")
def test_huggingface_hub_reads_the_entries_back():
    files = eval_result_files([results()])
    read = [huggingface_hub.parse_eval_result_entries(yaml.safe_load(text)) for text in files.values()]
    assert [(one.dataset_id, one.task_id, one.value) for (one,) in read] == [
        ("org/receipts", "default", value) for value in (0.75, 0.5)
    ]
    written = [huggingface_hub.eval_result_entries_to_yaml(entries) for entries in read]
    assert written == [yaml.safe_load(text) for text in files.values()]


def test_the_same_input_gives_the_same_string_and_stays_as_it_was(config):
    asked = [results(), results("my scans")]
    before = copy.deepcopy(asked), config.to_dict()
    card = render_card(asked, config, FACTS)
    assert render_card(copy.deepcopy(asked), AdaptiveLlavaConfig.from_pretrained(SHIPPED), replace(FACTS)) == card
    assert (asked, config.to_dict()) == before
    assert render_card(asked[0], config, FACTS) == render_card(asked[:1], config, FACTS) != card


def test_names_that_try_to_break_out_stay_names(config):
    names = {name: INJECTED for name in ("name", "license", "base_model")}
    facts = replace(FACTS, datasets=(INJECTED, "org/data"), language=(INJECTED,), **names)
    asked = results(INJECTED, options={"split": INJECTED, "subset": None})
    card = render_card(asked, config, facts)
    data, plain = front(card), one_line(INJECTED)
    assert "\n" not in plain and "---" in plain and "```" in plain
    assert {data["license"], data["base_model"], *data["language"]} == {plain} and data["datasets"] == ["org/data"]
    assert set(data) == set(front(render_card(results(), config, FACTS)))
    read = read_back(card)
    assert read.model_name == plain and {one.dataset_name for one in read.eval_results} == {plain}
    text = card.split("\n---\n", 1)[1]
    usual = render_card(results(), config, FACTS).split("\n---\n", 1)[1]
    for line in ("```", "## ", "# ", "|", "---", "- ", "* "):
        found, expected = ([one for one in whole.split("\n") if one.startswith(line)] for whole in (text, usual))
        assert len(found) == len(expected), line
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in text.split("\n") if line.startswith("| a ")}
    assert cells == {8} and r"\{\{ 7 \* 7 \}\}" in text
    for block in snippets(text):
        compile(block, "snippet", "exec")
    assert is_as_rendered(card)


# ---- text


def test_it_says_what_it_spends_and_what_that_costs(config, tmp_path):
    card = render_card([results(), results("my scans")], config, FACTS)
    assert "spends 1, 4, 9, 36 visual tokens on an image, as many as its router chooses." in card
    assert "242,500 weights in all" in card and "[org/base](https://huggingface.co/org/base) (finetune)" in card
    assert "| org/receipts | 8 | 0 | 0 | 2 | 0 | 8 |" in card
    scores = "0.250 (0.125 to 0.375) | 0.750 (0.625 to 0.875) | 0.500 (0.375 to 0.625)"
    assert (
        f"| org/receipts | anls | 10 | {scores} | 8 |" in card
        and "| data | metric | questions | 1 | 36 | auto | tokens chosen |" in card
    )
    assert "| auto | 8 | 8 | 24 | 8 | 2.5 |" in card
    assert "](card_tokens.png)" in card and "](card_anls.png)" in card
    bare = {"data": "d", "metric": "gqa", "questions": 3}
    row = {"budget": "16", "score": {"value": 41.5}, "mean_tokens": 16}
    few = render_card([{**bare, "budgets": [row]}], config, FACTS)
    assert "| d | gqa | 3 | 41.5 |\n" in few and "Mean cost" not in few and "card_tokens" not in few
    timed = render_card([{**bare, "budgets": [row | {"ms_per_image": 2}]}], config, FACTS)
    assert "| 16 | 16 | - | - | - | 2 |" in timed and "![" not in render_card(results(), config, FACTS, pictures=False)
    assert draw_pictures([{**bare, "budgets": [row]}], tmp_path) == ["card_gqa.png"]  # without intervals too
    with pytest.raises(ValueError, match=r"results lacks metric, budgets\.score\. Pass `results\.json`"):
        render_card({"data": "d", "questions": 3, "budgets": [{"budget": "16", "mean_tokens": 16}]}, config, FACTS)


def test_the_pinned_commit_is_in_both_loading_snippets(config):
    card = render_card([results()], config, replace(FACTS, revision=COMMIT))
    assert card.count(f'repo, revision = "ada/model", "{COMMIT}"') == 2 and f"--model_revision {COMMIT}" in card
    assert pinned_revision(card) == COMMIT and pinned_revision(render_card([], config, FACTS)) is None
    elsewhere = copy.deepcopy(config)
    elsewhere.code_repository = "org/code"
    card = render_card([], elsewhere, replace(FACTS, revision=COMMIT, code_revision=COMMIT[::-1]))
    assert f'code = "{COMMIT[::-1]}"' in card and card.count("code_revision=code") == 4 and "`org/code`" in card
    for wrong in ("main", "v1", COMMIT[:8]):
        with pytest.raises(ValueError, match=f"`revision='{wrong}'` is no commit id"):
            replace(FACTS, revision=wrong)


def test_untrained_parts_are_told(config):
    untrained = copy.deepcopy(config)
    untrained.compressor_trained = False
    card = render_card([], untrained, FACTS)
    assert "> **Untrained.**" in card and "untrained" in front(card)["tags"]
    assert lint_card(card, untrained=True) == []  # nothing was measured, and nothing need be
    assert "> **Untrained.**" not in render_card([results()], config, FACTS)
    assert lint_card(render_card([results()], config, FACTS), untrained=True)[0].startswith("untrained: ")


def test_the_calibration_is_told_in_its_own_words(config):
    calibrated = copy.deepcopy(config)
    held_out = {"num_images": 40, "mean": 11.5, "standard_error": 0.5, "shares": []}
    tokens = {"kind": "tokens", "data": "d", "num_images": 80, "counted": "images", "target_mean": 12}
    certified = {
        "kind": "accuracy", "metric": "anls", "data": "d", "data_sha256": "ab", "num_tested": 90, "num_settings": 20,
        "max_drop": 0.02, "confidence": 0.9, "bound": 0.018, "score": {"full": 0.8, "chosen": 0.79},
        "mean_tokens": {"full": 36, "chosen": 12.5},
    }  # fmt: skip
    for record in (tokens | {"held_out": held_out}, certified):
        calibrated.calibration = record
        assert calibration_text(record) in render_card([], calibrated, FACTS)
    assert "Certified with 90 % confidence" in calibration_text(certified)


@pytest.mark.parametrize("preset", PRESETS_HERE)
def test_every_preset_has_a_complete_card_that_cites_its_papers(preset):
    model_config = tiny_model(preset).config
    card = render_card([results()], model_config, FACTS)
    assert lint_card(card) == []
    assert f"Router `{model_config.router['type']}`: " in card
    numbers = {
        number for module in part_modules(model_config) for number in re.findall(r"abs/([\d.]+\d)", module.__doc__)
    }
    assert all(f"arXiv:{number}" in entries for number in numbers for entries in ["".join(bibtex(model_config))])
    for block in snippets(card):
        compile(block, "snippet", "exec")


def test_a_preset_is_named(config):
    assert "the preset `llava` of" in render_card([], AdaptiveLlavaConfig(), FACTS)
    assert "the preset `dfmr` of" in render_card([], AdaptiveLlavaConfig.from_preset("dfmr"), FACTS)
    assert "the preset `stf-mbtf` of" in render_card([], AdaptiveLlavaConfig.from_preset("stf-mbtf"), FACTS)
    assert "the preset" not in render_card([], config, FACTS)


# ---- linter


@pytest.mark.parametrize("field", FIELDS)
def test_a_card_without_a_field_is_refused_by_the_field_s_name(field, config):
    card = render_card([results()], config, FACTS)
    data = front(card)
    assert field in data
    del data[field]
    lacking = f"---\n{yaml.safe_dump(data)}---\n{card.split('---' + chr(10), 2)[2]}"
    problems = lint_card(lacking)
    assert field in [problem.split(":")[0] for problem in problems]
    assert len(problems) == 1 + (field == "metrics")  # the index has a metric that is then not listed


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"license": "other"}, "license: 'other' needs `license_name`"),
        ({"base_model": "base"}, "base_model: base is no id on the Hub"),
        ({"base_model_relation": "cousin"}, "base_model_relation: must be one of finetune"),
        ({"datasets": ["scans"]}, "datasets: scans is no id on the Hub"),
        ({"language": []}, "language: missing"),
        ({"tags": ["llava"]}, "tags: adaptive-llava is not among them"),
        ({"pipeline_tag": "text-generation"}, "pipeline_tag: must be image-text-to-text"),
        ({"model-index": [{"name": "x"}]}, "model-index: huggingface_hub cannot read it (KeyError"),
        ({"model-index": [{"name": "x", "results": []}]}, "model-index: it has no name, or no results"),
    ],
)
def test_fields_with_wrong_values_are_refused(change, problem, config):
    card = render_card([results()], config, FACTS)
    wrong = f"---\n{yaml.safe_dump(front(card) | change)}---\n{card.split('---' + chr(10), 2)[2]}"
    assert any(said.startswith(problem) for said in lint_card(wrong)), lint_card(wrong)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_card_without_a_section_is_refused(section, config):
    card = render_card([results()], config, FACTS)
    start = card.index(f"## {section}\n")
    end = card.find("\n## ", start)
    assert f"section {section!r}: missing or empty." in lint_card(card[:start] + (card[end:] if end > 0 else ""))


def test_what_is_no_card_is_refused(tmp_path, config):
    assert lint_card("# A model\n")[0].startswith("front matter: there is none")
    assert lint_card("---\na: [\n---\n")[0].startswith("front matter: it is no YAML")
    assert lint_card("---\n- a\n---\n")[0].startswith("front matter: it is no mapping")
    card = render_card([results()], config, FACTS)
    assert [one.split(" ")[1] for one in lint_card(card, tmp_path)] == ["card_tokens.png", "card_anls.png"]
    assert lint_card(card.replace("revision=revision, ", ""))[0].startswith("section 'Load it': no snippet")
    assert lint_card(render_card([results()], config, replace(FACTS, datasets=())))[0].startswith(
        "text: it has 'Not st"
    )


# ---- command


def test_the_command_writes_a_card_that_can_be_written_again(folder, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results()))
    assert card_command([str(folder), "--results", str(path)]) == 1
    missing = {line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if "README.md: " in line}
    assert missing == {"license", "base_model", "datasets", "language", "text"}
    assert card_command([str(folder), *STATED]) == 0
    card = (folder / "README.md").read_text()
    data = front(card)
    assert data["license"] == "mit" and "base_model" not in data and "trained-from-scratch" in data["tags"]
    assert "# my_model" in card and "0.500 (0.375 to 0.625)" in card
    for name in ("card_tokens.png", "card_anls.png"):
        assert Image.open(folder / name).format == "PNG" and (folder / name).stat().st_size < 60_000
    assert (folder / ".eval_results" / "org-receipts_default_anls_auto.yaml").is_file()
    assert json.loads((folder / "evaluation_org-receipts_test_anls.json").read_text()) == results()
    weights = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert read_facts(folder).license == "mit" and read_facts(folder).weights == weights
    pictures = [(folder / name).read_bytes() for name in ("card_tokens.png", "card_anls.png")]
    assert card_command([str(folder)]) == 0 and (folder / "README.md").read_text() == card
    assert pictures == [(folder / name).read_bytes() for name in ("card_tokens.png", "card_anls.png")]
    assert card_command([str(folder), "--check"]) == 0 and "README.md: complete" in capsys.readouterr().out


def test_a_card_that_a_person_edited_is_left_alone(folder, capsys):
    assert card_command([str(folder)]) == 1
    card = (folder / "README.md").read_text().replace("# my_model", "# My own words")
    (folder / "README.md").write_text(card)
    assert command_line(["card", str(folder), "--license", "mit"]) == 2
    assert "was written or edited by hand. Pass --overwrite" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == card and read_facts(folder).license is None
    assert card_command([str(folder), "--check"]) == 1 and (folder / "README.md").read_text() == card
    assert card_command([str(folder), "--overwrite"]) == 1 and "# my_model" in (folder / "README.md").read_text()


def test_what_makes_no_sense_is_refused(folder, tmp_path, capsys):
    def refused(*arguments):
        assert command_line(["card", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "has no README.md to check" in refused(folder, "--check")
    assert "`model_type=None`. Pass the folder of an 'adaptive_llava' model" in refused(tmp_path)
    (tmp_path / "other.json").write_text('{"accuracy": 1}')
    assert "other.json lacks data, metric, questions, budgets" in refused(folder, "--results", tmp_path / "other.json")
    (folder / "card.yaml").write_text("licence: mit\n")
    assert "card.yaml has licence. Known fields: name, license" in refused(folder)
    (folder / "card.yaml").write_text("language: [no]\n")
    assert "`language=[False]` in" in refused(folder)
    (folder / "card.yaml").write_text("a: [\n")
    assert "card.yaml is no YAML" in refused(folder)


def test_results_of_evaluate_make_a_card(folder, tmp_path):
    (tmp_path / "pictures").mkdir()
    write_pictures(render(6, seed=5, test=True), tmp_path / "pictures")
    asked = {"model": folder, "data": tmp_path / "pictures", "metric": "gqa", "output": tmp_path / "out"}
    asked |= {"budgets": "1,36,auto", "max-new-tokens": 4}
    assert evaluate.main([str(part) for name, value in asked.items() for part in (f"--{name}", value)]) == 0
    path = tmp_path / "out" / "results.json"
    assert card_command([str(folder), "--results", str(path), *STATED]) == 0
    card, found = (folder / "README.md").read_text(), json.loads(path.read_text())
    written = [(one.metric_type, one.metric_value) for one in read_back(card).eval_results]
    assert written == [("gqa", row["score"]["value"]) for row in found["budgets"][1:]]
    spent = " | ".join(str(found["budgets"][2]["histogram"].get(count, 0)) for count in ("1", "4", "9", "36"))
    assert f"| pictures | {spent} | 0 | " in card and not (folder / ".eval_results").exists()


# ---- snippets and push


def run_snippets(card: str, hub, home: Path) -> None:
    """All Python of a card, each generation of transformers with its own, where the package is absent."""
    first, second, *more = snippets(card)
    Image.new("RGB", (40, 30), "red").save(home / "image.png")
    for which, python in GENERATIONS.items():
        loading = first if IS_5 == (which == "this") else second
        variables = {key: value for key, value in hub.environment(home).items() if key != "PYTHONPATH"}
        (home / which).mkdir()
        shutil.copy(home / "image.png", home / which)
        variables |= {"HOME": str(home / which), "HF_HOME": str(home / which / "cache")}
        code = "\n".join([loading, *more, "print('END', *{type(part).__module__ for part in model.modules()})"])
        said = run_without_package(code, folder=home / which, python=python, variables=variables)
        assert " transformers_modules." in said[said.index("END ") :]
        for line in ("1 [1]", "4 [4]", "9 [9]", "36 [36]"):
            assert line in said.splitlines(), said


def test_push_renders_a_card_that_pins_its_commit_and_whose_snippets_run(hub, client, folder, tmp_path):
    (folder / "evaluation_receipts.json").write_text(json.dumps(results()))
    (folder / "card.yaml").write_text("license: mit\nbase_model: none\ndatasets: [org/data]\nlanguage: [en]\n")
    planned = client.command("push", folder, "ada/carded", "--dry-run")
    assert "README.md" in planned.out and "card_tokens.png" in planned.out and "card: " not in planned.out
    done = client.command("push", folder, "ada/carded")
    assert done.status == 0, done.err
    pinning, everything = hub.commits("ada/carded")
    assert pinning["title"] == f"Pin {everything['id'][:8]} in the card" and everything["id"] in done.out
    card = hub.read("ada/carded", "README.md").decode()
    assert pinned_revision(card) == everything["id"] and is_as_rendered(card) and '"ada/carded"' in card
    assert lint_card(card) == []
    there = set(hub.files("ada/carded"))
    assert {"card_tokens.png", "card_anls.png", ".eval_results/org-receipts_default_anls_36.yaml"} < there
    assert "card.yaml" not in there and not (folder / "README.md").exists()
    assert client.command("verify", f"ada/carded@{pinned_revision(card)}").status == 0
    run_snippets(card, hub, tmp_path)


def test_an_adapter_s_card_pins_its_base_and_its_snippets_run(hub, client, folder, tmp_path):
    assert client.command("push", folder, "ada/base").status == 0
    base = hub.commits("ada/base")[0]["id"]
    adapter = save_adapter(folder, tmp_path / "my_adapter")
    assert is_stock((adapter / "README.md").read_text())
    (adapter / "card.yaml").write_text("license: mit\ndatasets: [org/data]\nlanguage: [en]\n")
    (adapter / "evaluation_receipts.json").write_text(json.dumps(results()))
    done = client.command("push", adapter, "ada/lora", "--base", "ada/base")
    assert done.status == 0, done.err
    pinning, everything = hub.commits("ada/lora")
    card = hub.read("ada/lora", "README.md").decode()
    assert pinned_revision(card) == everything["id"] and pinning["title"].startswith("Pin ")
    assert f'base, base_revision = "ada/base", "{base}"' in card and lint_card(card) == []
    data = read_back(card)
    said = data.to_dict()
    assert [said[key] for key in ("library_name", "base_model", "base_model_relation")] == [
        "peft",
        "ada/base",
        "adapter",
    ]
    assert {"lora", "adaptive-llava", "query_resampler"} < set(data.tags) and data.datasets == ["org/data"]
    assert "A LoRA adapter of rank 4 for [ada/base](https://huggingface.co/ada/base), a vision-language model" in card
    first = hub.read("ada/lora", "README.md", everything["id"]).decode()
    assert '"ada/lora", "main"' in first and is_as_rendered(first) and lint_card(first) == []
    again = client.command("push", adapter, "ada/lora", "--base", "ada/base")
    assert again.status == 0 and "has all of it already" in again.out and len(hub.commits("ada/lora")) == 2
    (block,) = snippets(card, "bash")
    merge = block.splitlines()[0].replace("my_model", str(tmp_path / "merged"))
    assert merge.startswith("python -m adaptive_llava.training.merge ")
    merged = client.code(f"from adaptive_llava.training import merge; merge.main({shlex.split(merge)[3:]!r})")
    assert merged.status == 0 and (tmp_path / "merged" / "model.safetensors").is_file(), merged.err
    run_snippets(card, hub, tmp_path)


def test_the_card_command_describes_an_adapter_by_its_base(folder, tmp_path, capsys):
    adapter = save_adapter(folder, tmp_path / "my_adapter")
    assert card_command([str(adapter), "--license", "mit"]) == 1
    assert f"base_model: {folder} is no id on the Hub" in capsys.readouterr().out
    assert card_command([str(adapter), "--base-model", "ada/base"]) == 1
    assert "base_model: " not in capsys.readouterr().out
    card = (adapter / "README.md").read_text()
    assert front(card)["base_model_relation"] == "adapter" and "LoRA adapter of rank 4" in card
    assert "spends 1, 4, 9, 36 visual tokens" in card and "weights of its own" in card


def test_a_second_push_pins_anew_only_what_changed(hub, client, folder):
    assert client.command("push", folder, "ada/repins").status == 0
    first = pinned_revision(hub.read("ada/repins", "README.md").decode())
    again = client.command("push", folder, "ada/repins")
    assert again.status == 0 and "has all of it already" in again.out and len(hub.commits("ada/repins")) == 2
    (folder / "card.yaml").write_text("license: mit\n")
    assert client.command("push", folder, "ada/repins").status == 0
    assert (
        pinned_revision(hub.read("ada/repins", "README.md").decode()) == first and len(hub.commits("ada/repins")) == 3
    )
    chosen = json.loads((folder / "generation_config.json").read_text()) | {"max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(chosen))
    assert client.command("push", folder, "ada/repins").status == 0
    pinned = pinned_revision(hub.read("ada/repins", "README.md").decode())
    assert pinned == hub.commits("ada/repins")[1]["id"] != first
    assert json.loads(hub.read("ada/repins", "generation_config.json", pinned))["max_new_tokens"] == 3


def test_a_push_that_ends_before_its_pin_is_complete_and_the_next_one_pins_it(hub, client, folder):
    name, passes = "ada/unpinned", fault("POST", "/commit/")
    ends = [passes, fault("POST", "/commit/", times=99, status=500)]
    chosen = json.loads((folder / "generation_config.json").read_text())
    for number in (1, 2):  # a new repository, then one whose card pins what was there before
        (folder / "generation_config.json").write_text(json.dumps(chosen | {"max_new_tokens": number}))
        broken = client.command("push", folder, name, faults=ends)
        assert broken.status == 2 and f"{name} was not pinned in its card" in broken.err
        newest = hub.commits(name)[0]["id"]
        card = hub.read(name, "README.md").decode()
        assert f'repo, revision = "{name}", "main"' in card and pinned_revision(card) is None and is_as_rendered(card)
        assert json.loads(hub.read(name, "generation_config.json"))["max_new_tokens"] == number
        assert client.command("push", folder, name).status == 0
        assert pinned_revision(hub.read(name, "README.md").decode()) == newest
        assert len(hub.commits(name)) == 2 * number


def test_the_fine_tuning_snippet_runs(hub, client, folder, tmp_path):
    assert client.command("push", folder, "ada/tuned").status == 0
    (block,) = snippets(hub.read("ada/tuned", "README.md").decode(), "bash")
    said = [{"role": "user", "content": "<image> which digit at r2c3"}, {"role": "assistant", "content": "7"}]
    home = tmp_path / "home"
    (home / "my_documents").mkdir(parents=True)
    rows = {"images": [[Image.new("RGB", (48, 48), colour)] for colour in ("red", "blue")], "messages": [said] * 2}
    documents = Dataset.from_dict(rows).cast_column("images", List(ImageColumn()))
    documents.to_parquet(str(home / "my_documents" / "train.parquet"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", block],
        env=hub.environment(home, PATH=path),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (home / "tuned" / "merged" / "model.safetensors").is_file()


LOADING = """It comes with the package:

```python
from adaptive_llava.training.study.families import render
from adaptive_llava.training.study.ship import load_shipped

model, processor = load_shipped()
inputs = processor(images=render(1, seed=1)[0].image, text="<image> which digit", return_tensors="pt")
```"""


def test_a_model_that_is_not_on_the_hub_says_how_to_load_it(config, folder, tmp_path, capsys):
    stated = replace(FACTS, loading=LOADING, summary="It reads *small* pictures.", base_model="none", datasets=())
    card = render_card([results()], config, replace(stated, training_data="Drawn."), pictures=False)
    assert lint_card(card, tmp_path) == [] and "\nIt reads *small* pictures.\n" in card
    assert "AutoModel" not in card and "--model_name_or_path my_model \\\n    --dataset_name" in card
    scope: dict = {}
    for block in snippets(card):
        exec(block, scope)
    assert "4 [4]\n9 [9]\n36 [36]\n" in capsys.readouterr().out
    write_facts(folder, stated)
    assert read_facts(folder).loading == LOADING
    plan = plan_upload(folder, tmp_path)
    assert describe_upload(plan, folder, "ada/model")[1].loading is None  # there it is on the Hub


def test_snippets_of_a_model_without_a_chat_template_run(tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "tiny")
    assert card_command([str(tmp_path / "tiny")]) == 1
    first, second, budgets = snippets((tmp_path / "tiny" / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("image.png")
    capsys.readouterr()
    exec((first if IS_5 else second) + budgets, {})
    said = capsys.readouterr().out
    assert "4 [4]\n9 [9]\n36 [36]\n" in said
