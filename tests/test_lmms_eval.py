"""lmms-eval started as a user starts it: scores, answers and counts of visual tokens; batches and processes.

It runs in an environment of its own (`make test-lmms`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.__main__ import main as command_line
from tests.lmms_eval_samples import AFTER_QUESTION, COUNT, Sample, benchmark_samples, chat, save_taught_model


PYTHON = os.environ.get("ADAPTIVE_LLAVA_LMMS_PYTHON")

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ROOT / "training" / "lmms_eval_plugin" / "README.md"
METRICS = ROOT / "training" / "metrics"
OFFICIAL = {"docvqa": "docvqa/docvqa_val", "chartqa": "chartqa/chartqa", "pope": "pope/pope"}  # task files
BENCHMARKS = tuple(OFFICIAL)
SCORES = [  # benchmark, our figure, lmms-eval's
    ("docvqa", "anls", "anls"),
    ("chartqa", "relaxed_accuracy", "relaxed_overall"),
    ("pope", "accuracy", "pope_accuracy"),
    ("pope", "precision", "pope_precision"),
    ("pope", "recall", "pope_recall"),
    ("pope", "f1", "pope_f1_score"),
]
TASKS_OF_THE_PAPERS = (
    "docvqa_val", "chartqa", "pope", "mmmu_val", "gqa", "textvqa_val", "vqav2_val", "mme", "seedbench",
    "scienceqa_img", "mmbench_en_dev_static", "vizwiz_vqa_val",
)  # fmt: skip
CHOICES = ["yes", "no"]
_MEAN = {"aggregation": "mean", "higher_is_better": True}
OWN_TASKS: dict[
    str, dict[str, Any]
] = {  # on the samples of POPE: multiple choice; and prompts with none, one or two images
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": CHOICES,
        "metric_list": [{"metric": "acc", **_MEAN}],
    },
    "several": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "generation_kwargs": {"max_new_tokens": 3, "num_beams": 2},
        "metric_list": [{"metric": "exact_match", **_MEAN}],
    },
}
PICTURES = """
def choice(row):
    return [row["image"].convert("RGB")]


def several(row):
    return [row["image"].convert("RGB")] * (int(row["question_id"]) % 3)
"""
TEXT, PICTURE = Value("string"), Image()
COLUMNS = {
    "docvqa": {"questionId": TEXT, "question": TEXT, "image": PICTURE, "answers": List(TEXT)},
    "chartqa": {"type": TEXT, "question": TEXT, "image": PICTURE, "answer": TEXT},
    "pope": {"question_id": TEXT, "question": TEXT, "image": PICTURE, "answer": TEXT, "category": TEXT},
}

PARSE = """
import inspect, json, sys
from lmms_eval.__main__ import parse_eval_args
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string
from adaptive_llava.training.lmms_eval_plugin.model_arguments import parse_budget

known, parsed = set(TaskManager().all_tasks), []
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    arguments = parse_eval_args()[1]
    given = simple_parse_args_string(arguments.model_args)
    inspect.signature(get_model(arguments.model, arguments.force_simple)).bind(**given)
    parse_budget(given.get("budget", "auto"))
    tasks = arguments.tasks.split(",")
    parsed.append({"tasks": tasks, "unknown": sorted(set(tasks) - known)})
print(json.dumps(parsed))
"""


def environment() -> dict[str, str]:
    """Offline, and without this process's path: the package is there as it was installed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    """A command of lmms-eval's environment."""
    if not PYTHON:
        pytest.skip("set ADAPTIVE_LLAVA_LMMS_PYTHON to an interpreter with lmms-eval (make test-lmms)")
    return subprocess.run(
        [PYTHON, *map(str, arguments)],
        env=environment() | {"HF_HOME": str(folder / "huggingface")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def benchmark_row(name: str, index: int, sample: Sample) -> dict:
    """A sample in the columns of the benchmark."""
    row: dict[str, Any] = {"questionId": str(index), "question_id": str(index), "question": sample.question}
    row |= {"image": str(sample.image), "answer": sample.answer, "answers": [sample.answer]}
    row |= {"type": "human_test" if index % 2 else "augmented_test", "category": ("random", "popular")[index % 2]}
    return {column: row[column] for column in COLUMNS[name]}


@pytest.fixture(scope="module")
def place(shared, tmp_path_factory):
    """Folder with a model, the benchmarks' samples and the task files that point at them."""
    folder = tmp_path_factory.mktemp("lmms")
    samples = benchmark_samples(shared)
    found = run("-c", "import importlib.util as u; print(u.find_spec('lmms_eval').origin)", folder=folder)
    official = Path(found.stdout.strip()).parent / "tasks"
    save_taught_model(folder / "model", samples)
    (folder / "tasks").mkdir()
    local: dict[str, dict[str, Any]] = {}
    for name, given in samples.items():
        rows = [benchmark_row(name, index, sample) for index, sample in enumerate(given)]
        split = "validation" if name == "docvqa" else "test"
        DatasetDict({split: Dataset.from_list(rows, features=Features(COLUMNS[name]))}).save_to_disk(folder / name)
        local[name] = {"dataset_path": str(folder / name), "dataset_name": None}
        local[name]["dataset_kwargs"] = {"load_from_disk": True}
        task = {"include": f"{official / OFFICIAL[name]}.yaml", "task": f"local_{name}", **local[name]}
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    (folder / "tasks" / "pictures.py").write_text(PICTURES)
    for name, options in OWN_TASKS.items():
        task = {**local["pope"], "task": f"local_{name}", "test_split": "test", "doc_to_target": "answer", **options}
        visual = f"doc_to_visual: !function pictures.{name}\n"
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task) + visual)
    return folder, samples


class Evaluation:
    """A finished run: its results, and its log of samples by task."""

    def __init__(self, output: Path, said: str):
        self.said = said
        (results,) = output.rglob("*_results.json")
        self.results = json.loads(results.read_text())
        self.logs = {}
        for path in output.rglob("*_samples_*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            name = path.stem.split("_samples_local_")[1]
            self.logs[name] = sorted(rows, key=lambda row: row["doc_id"])

    def scores(self, name: str) -> dict[str, float]:
        """What lmms-eval says of a benchmark."""
        rows = self.results["results"][f"local_{name}"].items()
        return {key.split(",")[0]: value for key, value in rows if key.endswith(",none")}

    def answers(self, name: str) -> list[str]:
        """Answers in the order of the samples."""
        return [row["filtered_resps"] for row in self.logs[name]]

    def visual_tokens(self, name: str) -> list[list[int]]:
        """Visual tokens of each sample's requests."""
        return [[part["visual_tokens"] for part in row["token_counts"]] for row in self.logs[name]]


def evaluation(place, name: str, tasks: Sequence[str], budget: object, batch_size: int, *more: str, start=()):
    """Run lmms-eval over tasks; with DEBUG its exit code says whether it failed."""
    folder, _ = place
    done = run(
        *start, "-m", "lmms_eval",
        "--model", "adaptive_llava",
        "--model_args", f"pretrained={folder / 'model'},budget={budget}",
        "--tasks", ",".join(f"local_{task}" for task in tasks),
        "--include_path", folder / "tasks",
        "--batch_size", batch_size,
        "--device", "cpu",
        "--log_samples",
        "--output_path", folder / name,
        "--verbosity", "DEBUG",
        *more,
        folder=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Evaluation(folder / name, done.stdout)


@pytest.fixture(scope="module")
def chats(place):
    """Chat tasks in batches, all images at one budget."""
    return evaluation(place, "chat", (*BENCHMARKS, "several"), 4, 4)


@pytest.fixture(scope="module")
def two_processes(place):
    """Chat tasks in two processes, the router's budgets."""
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    start = [*launch.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    return evaluation(place, "two", BENCHMARKS, "auto", 2, start=start)


@pytest.fixture(scope="module")
def simple(place):
    """Simple tasks, one of them multiple choice, at a ceiling."""
    return evaluation(place, "simple", ("pope", "several", "choice"), '{"ceiling": 9}', 3, "--force_simple")


@pytest.fixture(scope="module")
def parts(place):
    """The model and its processor in this process, without lmms-eval."""
    folder, _ = place
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(folder / "model").eval()
    return model, AdaptiveLlavaProcessor.from_pretrained(folder / "model")


@torch.no_grad()
def asked_here(place, parts, name: str, budget) -> list[tuple[str, int]]:
    """Answers and visual tokens of a benchmark's samples, asked one by one."""
    (_, samples), (model, processor) = place, parts
    pairs = []
    for sample in samples[name]:
        inputs = processor.apply_chat_template(
            chat(sample.image, sample.prompt(name)),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(
            **inputs, visual_token_budget=budget, max_new_tokens=16, do_sample=False, return_dict_in_generate=True
        )
        new_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
        pairs.append((processor.decode(new_ids, skip_special_tokens=True).strip(), output.num_visual_tokens.item()))
    return pairs


def our_score(name: str, predictions: list[str], samples: Sequence[Sample]) -> dict[str, float]:
    """What our metric says of the same answers."""
    metric, references = {
        "docvqa": ("anls", [[sample.answer] for sample in samples]),
        "chartqa": ("relaxed_accuracy", [[sample.answer] for sample in samples]),
        "pope": ("pope", [{"answer": sample.answer, "category": "all"} for sample in samples]),
    }[name]
    return evaluate.load(str(METRICS / metric)).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_answers_are_those_without_lmms_eval(place, parts, chats, name):
    answers, counts = zip(*asked_here(place, parts, name, 4), strict=True)
    assert chats.answers(name) == list(answers)
    assert chats.visual_tokens(name) == [[count] for count in counts] == [[4]] * COUNT


@pytest.mark.parametrize("name", BENCHMARKS)
def test_two_processes_answer_each_sample_once_at_the_routers_counts(place, parts, two_processes, name):
    answers, counts = zip(*asked_here(place, parts, name, "auto"), strict=True)
    assert [row["doc_id"] for row in two_processes.logs[name]] == list(range(COUNT))
    assert two_processes.answers(name) == list(answers)
    assert two_processes.visual_tokens(name) == [[count] for count in counts]


def test_router_gives_unlike_counts(two_processes):
    assert len({tuple(tokens) for name in BENCHMARKS for tokens in two_processes.visual_tokens(name)}) > 1


@pytest.mark.parametrize("kind", ["chats", "two_processes", "simple"])
def test_throughput_table_has_the_mean_of_the_log(kind, request):
    evaluation = request.getfixturevalue(kind)
    logged = [count for name in evaluation.logs for row in evaluation.visual_tokens(name) for count in row]
    images = sum(
        sum(index % 3 if name == "several" else len(row["token_counts"]) for index, row in enumerate(rows))
        for name, rows in evaluation.logs.items()
    )
    mean = sum(logged) / images
    table = dict(re.findall(r"\|\s*(avg_\w+|total_\w+)\s*\|\s*([\d.]+)", evaluation.said))
    assert evaluation.results["throughput"]["avg_visual_tokens_per_image"] == pytest.approx(mean)
    assert float(table["avg_visual_tokens_per_image"]) == pytest.approx(mean, abs=1e-4)
    written = [
        part["output_tokens"] for rows in evaluation.logs.values() for row in rows for part in row["token_counts"]
    ]
    assert float(table["total_gen_tokens"]) == sum(written) > 0


def test_input_tokens_are_text_and_visual_tokens(place, parts, two_processes):
    (_, samples), (_, processor) = place, parts
    prompts = [
        processor.apply_chat_template(
            chat(sample.image, sample.prompt("pope")), add_generation_prompt=True, tokenize=True
        )
        for sample in samples["pope"]
    ]
    rows = [row["token_counts"][0] for row in two_processes.logs["pope"]]
    assert [row["input_tokens"] for row in rows] == [
        len(prompt[0]) - 1 + row["visual_tokens"] for prompt, row in zip(prompts, rows, strict=True)
    ]


@pytest.mark.parametrize(("name", "ours", "theirs"), SCORES)
def test_score_is_that_of_our_metric(place, chats, name, ours, theirs):
    score = our_score(name, chats.answers(name), place[1][name])[ours]
    assert 0 < score < 1
    assert chats.scores(name)[theirs] == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize(("name", "metric"), [("docvqa", "anls"), ("chartqa", "relaxed_accuracy")])
def test_evaluate_gives_the_same_answers_counts_and_scores(place, chats, two_processes, name, metric, tmp_path):
    folder, _ = place
    prompt = "{question}" + AFTER_QUESTION[name]
    arguments = ["evaluate", "--model", folder / "model", "--data", folder / name, "--metric", metric, "--output"]
    arguments += [tmp_path / "out", "--budgets", "4,auto", "--prompt", prompt, "--max-new-tokens", "16"]
    assert command_line([str(argument) for argument in arguments]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    figures = {row["budget"]: row["figures"] for row in results["budgets"]}
    theirs = {"docvqa": "anls", "chartqa": "relaxed_overall"}[name]
    for budget, run_there in (("4", chats), ("auto", two_processes)):
        answered = [row["answered"][budget] for row in rows]
        assert [answer["prediction"] for answer in answered] == run_there.answers(name)
        assert [answer["visual_tokens"] for answer in answered] == run_there.visual_tokens(name)
        assert figures[budget][metric] == pytest.approx(run_there.scores(name)[theirs], abs=1e-4)


def test_yes_ratio_of_lmms_eval_is_that_of_the_references(place, chats):
    answers = [sample.answer for sample in place[1]["pope"]]
    assert chats.scores("pope")["pope_yes_ratio"] == pytest.approx(answers.count("yes") / COUNT)
    ours = our_score("pope", chats.answers("pope"), place[1]["pope"])["yes_ratio"]
    assert ours == pytest.approx(chats.answers("pope").count("yes") / COUNT)
    assert ours != pytest.approx(answers.count("yes") / COUNT)


def test_simple_tasks_answer_as_chats_do(place, parts, simple):
    answers, counts = zip(*asked_here(place, parts, "pope", {"ceiling": 9}), strict=True)
    assert simple.answers("pope") == list(answers)
    assert simple.visual_tokens("pope") == [[count] for count in counts]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "budget"), [("chats", 4), ("simple", {"ceiling": 9})])
def test_prompts_may_show_no_image_or_several(place, parts, kind, budget, request):
    (_, samples), (model, processor) = place, parts
    run_of_kind = request.getfixturevalue(kind)
    answers, counts = [], []
    for index, sample in enumerate(samples["pope"]):
        text = {"type": "text", "text": sample.question}
        content = [*[{"type": "image", "path": str(sample.image)}] * (index % 3), text]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(
            **inputs,
            visual_token_budget=budget,
            max_new_tokens=3,
            num_beams=2,
            do_sample=False,
            return_dict_in_generate=True,
        )
        new_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(new_ids, skip_special_tokens=True).strip())
        counts.append([output.num_visual_tokens.sum().item() if index % 3 else 0])
    assert run_of_kind.answers("several") == answers
    assert run_of_kind.visual_tokens("several") == counts


@torch.no_grad()
def test_choices_are_scored_by_their_mean_loss(place, parts, simple):
    (_, samples), (model, processor) = place, parts
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    right = 0
    for sample, row in zip(samples["pope"], simple.logs["choice"], strict=True):
        losses = []
        for choice in CHOICES:
            asked = processor.apply_chat_template(
                chat(sample.image, sample.question), add_generation_prompt=True, **options
            )
            inputs = processor.apply_chat_template(chat(sample.image, sample.question, choice), **options)
            start, ids = asked["input_ids"].shape[1], inputs["input_ids"][0]
            scores = model(**inputs, visual_token_budget={"ceiling": 9}).logits[0].log_softmax(-1)
            assert start < len(ids)
            losses.append(-sum(scores[at - 1, ids[at]] for at in range(start, len(ids))).item() / (len(ids) - start))
        logged = [float(loss) for loss, _ in row["filtered_resps"]]
        assert logged == pytest.approx(losses, rel=1e-4)
        right += CHOICES[losses.index(min(losses))] == sample.answer
    assert simple.scores("choice")["acc"] == pytest.approx(right / COUNT)
    assert 0 < right < COUNT


def test_documented_commands_parse_and_name_every_benchmark(tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", COMMANDS.read_text(encoding="utf-8"), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line.split("lmms_eval ", 1)[1]) for line in lines if "-m lmms_eval " in line]
    done = run("-c", PARSE, json.dumps(commands), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    parsed = json.loads(done.stdout.splitlines()[-1])
    assert [command["unknown"] for command in parsed] == [[]] * len(commands)
    assert {task for command in parsed for task in command["tasks"]} >= set(TASKS_OF_THE_PAPERS)


def test_failed_run_says_why_and_ends_with_an_error(place):
    folder, _ = place
    done = run(
        "-m", "lmms_eval", "--model", "adaptive_llava", "--model_args", f"pretrained={folder / 'model'},budget=some",
        "--tasks", "local_pope", "--include_path", folder / "tasks", "--verbosity", "DEBUG", folder=folder,
    )  # fmt: skip
    assert done.returncode != 0
    assert "`budget=some` is no budget" in done.stdout + done.stderr
