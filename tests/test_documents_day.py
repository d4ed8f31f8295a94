"""`documents`: from rendered receipts to the tokens they need, and what is refused on the way."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from trl import ModelConfig

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.__main__ import main
from adaptive_llava.hub_cards.hub_errors import check_reachable
from adaptive_llava.training import invoice_memory, small_document_model
from adaptive_llava.training.budget_sweep import answer_at_budgets, chosen_budgets
from adaptive_llava.training.document_pages import read_pages, split_pages, write_conversations
from adaptive_llava.training.quantised_loading import NOT_QUANTISED, placement
from adaptive_llava.training.sft import check_arguments, parse_arguments
from adaptive_llava.training.small_document_model import build_model, byte_tokenizer
from adaptive_llava.training.token_need import PageScores, draw_pages, score_pages, summarise, token_need
from tests.conftest import tiny_model


SHOPS = {"NORD": (200, 40, 40), "OST": (40, 160, 60), "SUED": (40, 70, 200), "WEST": (230, 200, 40)}


def render_receipt(index):
    """A receipt on the shop's own paper, with noise so that no two are equal."""
    rng = np.random.default_rng(index)
    shop = list(SHOPS)[index % len(SHOPS)]
    paper = np.clip(np.array(SHOPS[shop]) + rng.normal(0, 12, (64, 48, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(paper)
    draw = ImageDraw.Draw(image)
    draw.text((4, 4), shop, fill=(0, 0, 0))
    draw.text((4, 40), f"{rng.uniform(1, 9):.2f}", fill=(0, 0, 0))
    return image, shop


@pytest.fixture(scope="module")
def receipts(tmp_path_factory):
    """Pages with a shop each, one page without fields, and one twice."""
    folder = tmp_path_factory.mktemp("data") / "receipts"
    folder.mkdir()
    rows: list[dict] = []
    for index in range(40):
        image, shop = render_receipt(index)
        image.save(folder / f"{index}.png")
        question = {"question": "Which shop?", "field": "shop", "answer": shop}
        rows.append({"file": f"{index}.png", "qa": [question]})
    render_receipt(0)[0].save(folder / "copy.bmp")
    rows.append({"file": "copy.bmp", "fields": {"shop": "NORD"}})
    rows.append({"file": "1.png", "qa": []})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    model, processor = build_model(width=64, layers=2, image_size=32, patch_size=8, factors=(1, 2, 4))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def command(base, receipts, output, *more):
    return [
        "documents", "--config", "documents_small.yaml", "--model", base, "--data", str(receipts),
        "--output", str(output), "--use_cpu", "true", "--dataloader_pin_memory", "false", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def day(base, receipts, tmp_path_factory):
    """One run of the command; its folder and results."""
    output = tmp_path_factory.mktemp("day") / "out"
    steps = ["--max_steps", "200", "--learning_rate", "3e-3", "--holdout", "0.3", "--logging_steps", "50"]
    assert main(command(base, receipts, output, *steps, "--useful", "0.5", "--margin", "0.1")) == 0
    return output, json.loads((output / "documents_day.json").read_text())


@pytest.mark.compat
def test_a_model_that_reads_is_told_how_many_tokens_it_needs(day):
    _, results = day
    assert results["pages"]["without_fields"] == 1
    assert results["pages"]["train"] + results["pages"]["held_out"] == 41
    assert [row["budget"] for row in results["curve"] if "auto" not in row["budget"]] == ["1", "4", "full"]
    assert [row["mean_tokens"] for row in results["curve"] if "auto" not in row["budget"]] == [1, 4, 16]
    full = results["curve"][-1]
    # the colour of the paper tells the shop: it shows at one token, and is lost with another page's
    assert full["field_f1"]["value"] >= 0.9 and results["other_page"]["field_f1"]["value"] <= 0.6
    assert results["need"]["reads"] and results["need"]["tokens"] == 1.0
    assert "Your pages need 1 token:" in results["need"]["sentence"]


@pytest.mark.compat
def test_the_router_is_calibrated_to_that_number(day):
    output, results = day
    calibrated = next(row for row in results["curve"] if row["budget"] == "auto, calibrated")
    assert results["calibration"]["target_mean"] == 1.0 and calibrated["mean_tokens"] < 2
    again = AdaptiveLlavaForConditionalGeneration.from_pretrained(output / "model")
    assert again.config.calibration == results["calibration"]
    assert AdaptiveLlavaProcessor.from_pretrained(output / "model").router == again.config.router
    assert sorted(path.name for path in output.iterdir()) == [
        "answers.jsonl", "calibration_histogram.png", "documents_day.json", "documents_day.png", "model",
    ]  # fmt: skip


@pytest.mark.compat
def test_the_result_file_holds_no_page_and_the_answers_all(day, receipts):
    output, results = day
    assert not any(shop in json.dumps(results) for shop in SHOPS)
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == results["pages"]["held_out"]
    _, held_out = split_pages(read_pages(receipts).pages, holdout=0.3)
    assert [row["file"] for row in rows] == [page.file for page in held_out]
    full = score_pages([row["answers"]["full"]["answer"] for row in rows], [page.answer for page in held_out])
    assert float(full.score("field_f1")) == pytest.approx(results["curve"][-1]["field_f1"]["value"], abs=1e-4)


@pytest.mark.compat
def test_a_fine_tuned_model_is_measured_without_training_and_scores_the_same(day, receipts, tmp_path, capsys):
    output, results = day
    arguments = ["documents", "--skip-training", "--model", str(output / "model"), "--data", str(receipts)]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--holdout", "0.3", "--budgets", "1"]) == 0
    again = json.loads((tmp_path / "out" / "documents_day.json").read_text())
    assert again["curve"][-1]["field_f1"] == results["curve"][-1]["field_f1"] and again["seconds"]["fine_tune"] < 1
    printed = capsys.readouterr().out.splitlines()
    header = next(index for index, line in enumerate(printed) if line.startswith("budget"))
    assert [line.split()[:2] for line in printed[header + 1 : header + 5 : 2]] == [["1", "1.0"], ["full", "16.0"]]
    assert (output / "model").is_dir()


def test_the_model_goes_to_the_hub_as_one_commit_with_its_results(day, receipts, hub, tmp_path):
    output, _ = day
    with hub.client(tmp_path / "user") as user:
        arguments = [
            "documents",
            "--skip-training",
            "--model",
            output / "model",
            "--data",
            receipts,
            "--holdout",
            "0.3",
        ]
        pushed = user.command(*arguments, "--budgets", "1", "--output", "out", "--push", "ada/receipts")
        assert pushed.status == 0, pushed.err
        verified = user.command("verify", "ada/receipts")
    assert verified.status == 0, verified.out
    assert {"model.safetensors", "config.json", "README.md", "documents_day.json"} <= set(hub.files("ada/receipts"))


@pytest.mark.compat
def test_a_model_that_does_not_read_is_told_so(base, receipts, tmp_path, capsys):
    lora = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--max_steps", "1", "--logging_steps", "1"]
    assert main(command(base, receipts, tmp_path / "out", *lora, "--budgets", "4,auto", "--holdout", "0.2")) == 0
    results = json.loads((tmp_path / "out" / "documents_day.json").read_text())
    assert not results["need"]["reads"] and results["need"]["tokens"] is None and results["calibration"] is None
    printed = capsys.readouterr().out
    assert "No budget reaches a useful score" in printed and "cannot read your pages" in printed
    assert [row["budget"] for row in results["curve"]] in (["4", "auto", "full"], ["auto", "4", "full"])
    # the adapter stays and the merged model moved
    assert (tmp_path / "out" / "training" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "training" / "merged").exists()
    assert AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "model").config.compressor_trained


def curve_row(budget, tokens, right, full_right, draws):
    def scores(flags):
        flags, ones = np.array(flags), np.ones(len(flags), dtype=int)
        return PageScores(flags, ones, ones, flags.astype(float), ones > 0)

    return {"budget": budget, "mean_tokens": tokens, **summarise(scores(right), scores(full_right), draws)}


def need_of(rights, *, other, margin=0.05):
    """The need that follows from pages of one field, right or wrong, by budget; the last has all tokens."""
    full = list(rights.values())[-1]
    draws = draw_pages(len(full), 0)
    curve = [curve_row(f"{tokens}", tokens, right, full, draws) for tokens, right in rights.items()]
    exchanged = curve_row("other page", list(rights)[-1], other, full, draws)
    return token_need(curve, exchanged, score="field_f1", margin=margin, useful=0.1)


def test_the_cheapest_budget_within_the_margin_is_taken():
    all_right, one_wrong = [1] * 100, [0] + [1] * 99
    need = need_of({1: [0] * 50 + [1] * 50, 16: one_wrong, 64: all_right, 256: all_right}, other=[0] * 100)
    assert (need.reads, need.tokens, need.certain) == (True, 16, True)
    assert "difference -0.010" in need.sentence


def test_few_pages_leave_a_doubt():
    need = need_of({1: [0] + [1] * 19, 256: [1] * 20}, other=[0] * 20)
    assert need.tokens == 1 and not need.certain and "hold out more pages" in need.sentence


def test_what_is_right_about_another_page_was_not_read():
    common = [1] * 30 + [0] * 70  # the value that most pages have
    need = need_of({1: common, 256: common}, other=common)
    assert not need.reads and "0.300 when it is shown another page" in need.sentence


def test_a_score_near_zero_says_nothing_about_tokens():
    need = need_of({1: [0] * 40, 256: [1] + [0] * 39}, other=[0] * 40)
    assert not need.reads and need.tokens is None and "No budget reaches a useful score" in need.sentence


def test_scores_of_pages_are_those_of_the_metrics():
    references = ['{"a": "12", "b": "xy"}', '{"a": "7"}']
    scores = score_pages(['{"a": "12", "b": "xz"}', "nothing"], references)
    assert float(scores.score("field_f1")) == pytest.approx(2 * 1 / (2 + 3))
    assert float(scores.score("anls")) == pytest.approx((1 + 0.5 + 0) / 3)


def test_images_are_encoded_once_for_all_budgets(base, receipts):
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    processor = AdaptiveLlavaProcessor.from_pretrained(base)
    pages, calls = read_pages(receipts).pages[:5], []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    answers = answer_at_budgets(
        model, processor, pages, {"1": 1, "4": 4, "full": "full"}, max_new_tokens=3, batch_size=2, exchanged="other"
    )
    assert len(calls) == 2  # steps, of two and three pages
    assert [set(answer.tokens) for answer in answers.values()] == [{1}, {4}, {16}, {16}]
    alone = model.generate(
        **processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "image", "path": pages[0].path},
                                           {"type": "text", "text": pages[0].prompt}]}]],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        ), visual_token_budget=4, max_new_tokens=3, do_sample=False,
    )  # fmt: skip
    assert processor.decode(alone[0, -3:], skip_special_tokens=True) == answers["4"].texts[0]


def test_copies_of_a_page_stay_on_one_side_and_added_pages_move_none(receipts):
    pages = read_pages(receipts).pages
    for seed in range(8):
        train, held_out = split_pages(pages, holdout=0.4, seed=seed)
        assert not {page.digest for page in train} & {page.digest for page in held_out}
        some = [page for page in pages if page.file < "3"]
        assert {page.file for page in split_pages(some, holdout=0.4, seed=seed)[1]} <= {p.file for p in held_out}
    assert split_pages(pages, holdout=0.4, seed=0) != split_pages(pages, holdout=0.4, seed=1)


def write_folder(folder, *rows, name="metadata.jsonl"):
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return folder


def test_fields_come_from_all_forms_of_rows(tmp_path):
    entries = [
        {"question": 'What is written in the field "Sum"?', "answer": 7},
        {"question": "Which day?", "field": "day", "answer": " 1  May "},
        {"question": "No field is named here", "answer": "x"},
        {"question": "", "field": "shop", "answer": "A"}, {"question": "", "field": "shop", "answer": "B"},
    ]  # fmt: skip
    folder = read_pages(write_folder(tmp_path / "x", {"file_name": "a.png", "fields": {"tax": "2"}, "qa": entries}))
    assert folder.pages[0].fields == {"tax": "2", "Sum": "7", "day": "1 May"}
    assert folder.ambiguous_fields == 1
    assert json.loads(folder.pages[0].answer) == folder.pages[0].fields
    assert '["tax", "Sum", "day"]' in folder.pages[0].prompt


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"file": '], "Line 1 of .* is no JSON object with a"),
        ([{"fields": {"a": "b"}}], "Line 1 of .* is no JSON object with a"),
        ([{"file": "a.png"}, {"file": "a.png", "qa": []}], "none of its 2 rows has fields"),
        ([{"file": "b.png", "fields": {"a": "b"}}], "Line 1 of .*b.png"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_pages(write_folder(tmp_path / "x", *rows))


def test_folders_without_a_listing_and_splits_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        read_pages(tmp_path / "none")
    with pytest.raises(ValueError, match="has no manifest.jsonl or metadata.jsonl"):
        read_pages(write_folder(tmp_path / "x", name="other.txt"))
    pages = read_pages(write_folder(tmp_path / "y", {"file": "a.png", "fields": {"a": "b"}})).pages
    with pytest.raises(ValueError, match="`holdout=1.5` must lie between 0 and 1"):
        split_pages(pages, holdout=1.5)
    with pytest.raises(ValueError, match="At least 2 are needed of each"):
        split_pages(pages, holdout=0.5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budgets", "1,many"], "must be whole numbers of tokens and 'auto'"),
        (["--budgets", "0,4"], "spends at least 1 tokens"),
        (["--holdout", "2"], "`holdout=2.0` must lie between 0 and 1"),
        (["--margin", "1"], "`--margin 1.0` must be a score"),
        (["--batch-size", "1"], "`--batch-size 1` must be at least 2"),
        (["--push", "no-user"], "`--push no-user` is no id of a repository. Pass `user/name`"),
        (["--push", "user/name"], "`--push user/name` needs the network, but HF_HUB_OFFLINE is set"),
        (
            ["--visual_token_budget", "4"],
            "`visual_token_budget` would be overruled here: leave it out; name token counts",
        ),
        (["--push_to_hub", "true"], "`push_to_hub` would be overruled here: leave it out; pass `--push user/name`"),
        (["--skip-training"], "`--skip-training` leaves no use for --use_cpu"),
        (["--load_in_4bit", "true"], "with `use_peft=False`|needs bitsandbytes, which is not installed"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(more, message, base, receipts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(command(base, receipts, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_several_processes_are_told_the_way(base, receipts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(base, receipts, tmp_path / "out")) == 2
    assert "runs in one process. To train with several" in capsys.readouterr().err


def test_a_push_needs_a_login(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("adaptive_llava.hub_cards.hub_errors.get_token", lambda: None)
    with pytest.raises(ValueError, match="needs a login. Run `hf auth login`"):
        check_reachable("--push", "user/name")


def test_other_models_and_tiled_ones_are_told_what_they_lack(tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="is of type 'llava'. Give it a compressor and a router first"):
        chosen_budgets(None, str(tmp_path / "llava"))
    tiny_model("dfmr", tiling={"type": "anyres", "view_layout": "sequence"}).config.save_pretrained(tmp_path / "tiled")
    with pytest.raises(ValueError, match="`--budgets` is missing: this model cuts images into tiles"):
        chosen_budgets(None, str(tmp_path / "tiled"))
    assert chosen_budgets("99,200,auto", str(tmp_path / "tiled")) == {
        "99": 99, "200": 200, "auto": "auto", "full": "full",
    }  # fmt: skip


def test_four_bits_without_bitsandbytes_are_refused_with_the_way_out(tmp_path, monkeypatch):
    given = ["--config", "documents_qlora.yaml", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    given += ["--model_name_or_path", "m", "--dataset_name", "d"]
    parsed = parse_arguments(given)
    assert parsed[2].load_in_4bit and parsed[2].dtype == "bfloat16" and parsed[0].device_map == "auto"
    monkeypatch.setattr("adaptive_llava.training.quantised_loading.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`load_in_4bit=True` needs bitsandbytes.*--load_in_4bit false.*float32"):
        check_arguments(*parsed)
    check_arguments(*parse_arguments([*given, "--load_in_4bit", "false"]))
    monkeypatch.setattr("adaptive_llava.training.quantised_loading.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="quantised weights do not learn. Use LoRA"):
        check_arguments(*parse_arguments([*given, "--use_peft", "false"]))


@pytest.mark.parametrize("preset", ["stf-mbtf", "llava-mini", "dynamic-resampler"])
def test_four_bits_reach_the_language_model_alone(preset):
    from transformers.quantizers.quantizers_utils import should_convert_module  # not in transformers 4

    linear = [name for name, part in tiny_model(preset).named_modules() if isinstance(part, torch.nn.Linear)]
    converted = {name for name in linear if should_convert_module(name, list(NOT_QUANTISED))}
    assert converted == {name for name in linear if name.startswith("model.language_model.")} != set(linear)


@pytest.mark.parametrize(
    ("device", "processes", "place"), [("cpu", 1, None), ("cuda", 1, "auto"), ("cuda", 4, {"": 3})]
)
def test_a_device_map_is_for_one_process_with_gpus(device, processes, place):
    training = SimpleNamespace(device=torch.device(device), world_size=processes, local_process_index=3)
    model = ModelConfig(load_in_4bit=False)
    assert placement(model, training, "auto") == {"quantization_config": None, "device_map": place}
    assert placement(model, training, None)["device_map"] is None


def test_in_training_images_appear_at_all_budgets(base, receipts, tmp_path):
    from adaptive_llava.training.collator import ConversationCollator

    processor = AdaptiveLlavaProcessor.from_pretrained(base)
    torch.manual_seed(0)
    collate = ConversationCollator(
        lambda rows: {"pixel_values": torch.zeros(len(rows), 3, 4, 4), "input_ids": torch.zeros(len(rows), 1)},
        processor, visual_token_budget=[1, 4],
    )  # fmt: skip
    drawn = [collate([{"prompt": "a", "completion": "b"}] * 8)["visual_token_budget"] for _ in range(4)]
    assert all(len(budgets) == 8 for budgets in drawn) and {1, 4} == {one for budgets in drawn for one in budgets}


@pytest.mark.parametrize("text", ['{"é": "12 €"}', " two  spaces\n", "日本"])
def test_the_small_model_s_tokenizer_writes_any_text(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_conversations_ask_once_per_page(receipts, tmp_path):
    pages = read_pages(receipts).pages[:2]
    write_conversations(pages, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [[page.path] for page in pages]
    assert json.loads(rows[0]["completion"][0]["content"]) == {"shop": "NORD"}


def test_memory_is_measured_by_budget_and_batch(base, tmp_path, capsys):
    arguments = ["--model", base, "--config", "documents_small.yaml", "--budgets", "16", "--batches", "2"]
    output = tmp_path / "memory.json"
    assert (
        invoice_memory.main([*arguments, "--answer-length", "20", "--output", str(output), "--use_cpu", "true"]) == 0
    )
    results = json.loads(output.read_text())
    assert [(row["budget"], row["batch"]) for row in results["rows"]] == [(16, 2)]
    assert all(row["peak_mib"] >= row["loaded_mib"] > 50 for row in results["rows"])
    assert "16 tok" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`--batches 2` with `--budgets 0` could not be measured: .*smallest count"):
        invoice_memory.main([*arguments[:4], "--budgets", "0", "--batches", "2", "--output", str(output)])


def test_the_small_model_is_written_by_a_command(tmp_path, capsys):
    assert small_document_model.main(["--output", str(tmp_path / "small"), "--width", "32", "--layers", "1"]) == 0
    assert "weights, [1, 16, 64, 256] visual tokens" in capsys.readouterr().out
    assert not AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "small").config.compressor_trained
    with pytest.raises(SystemExit, match="2"):
        small_document_model.main(["--output", str(tmp_path / "small")])
    assert "is already there, and nothing is overwritten" in capsys.readouterr().err
