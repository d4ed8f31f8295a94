"""Joint routing: its loss, what it trains, what it refuses, and that processes and micro-batches change nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from trl import ModelConfig, SFTConfig

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.joint_routing import (
    JointRoutingConfig,
    JointRoutingTrainer,
    build_joint_trainer,
    joint_routing_loss,
    main,
)
from adaptive_llava.training.joint_routing_study import shuffled_choice, summarise, write_images
from adaptive_llava.training.rendered_images import render_images
from adaptive_llava.training.sft import build_trainer
from tests.conftest import leave_together, tiny_model
from tests.test_convert import picture
from tests.test_sft import ANSWERS, inputs_of, logits_of, message_dataset, save, tiny_processor, turns


ROOT = Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "training" / "recipes" / "joint_routing.yaml")
CLASSIFIER = {"type": "classifier"}


def warm_model(**fields):
    """A tiny model with three counts (4, 9, 36 tokens) and a learned router that is not sure of anything."""
    model = tiny_model("dfmr", router=CLASSIFIER, **fields)
    with torch.no_grad():  # small weights: a few steps must not overflow
        for parameter in model.parameters():
            parameter.mul_(0.8)
    return model


def configuration(folder, **options):
    defaults = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "bf16": False, "use_cpu": True, "max_length": None, "report_to": "none", "logging_steps": 1,
        "lr_scheduler_type": "constant", "save_strategy": "no", "weight_decay": 0.0,
    }  # fmt: skip
    return JointRoutingConfig(**(defaults | options))


def train(model, folder, *, lora=False, rows=None, eval_rows=None, **options):
    arguments = ModelConfig(use_peft=lora, lora_dropout=0.0, lora_r=4, lora_target_modules=["all-linear"])
    return build_joint_trainer(
        model,
        tiny_processor(model),
        configuration(folder, **options),
        rows or message_dataset(),
        eval_rows,
        model_arguments=arguments,
    )


# ---- the loss


@pytest.mark.compat
def test_a_case_worked_out_by_hand():
    cross_entropy = torch.tensor([[2.0, 0.5, 7.0], [1.0, 0.5, 7.0]])  # two rungs, three rows, the last unlabelled
    logits = torch.tensor([[0.0, 0.0], [0.0, float(torch.tensor(3.0).log())], [0.0, 0.0]])
    rows, labelled = torch.tensor([0, 0, 2]), torch.tensor([True, True, False])
    prices = torch.tensor([0.1, 0.4])
    # costs of row 0: 2.1 and 1.4. Views: 1/2, 1/2 -> 1.75 and 1/4, 3/4 -> 1.575; row 1 has no view
    expected = ((1.5 + (1.75 + 1.575) / 2) + 0.5) / 2
    assert joint_routing_loss(cross_entropy, logits, rows, labelled, prices).item() == pytest.approx(expected)
    entropies = (0.693147 + 0.562335) / 2
    warm = joint_routing_loss(cross_entropy, logits, rows, labelled, prices, 0.2).item()
    assert warm == pytest.approx(expected - 0.2 * entropies / 2, abs=1e-6)


def test_the_best_router_is_a_softmax_of_the_costs():
    cross_entropy, prices = torch.tensor([[1.0], [0.8], [0.75]]), torch.tensor([0.0, 0.1, 0.3])
    logits = torch.zeros(1, 3, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=5.0)
    for _ in range(500):
        loss = joint_routing_loss(cross_entropy, logits, torch.tensor([0]), torch.tensor([True]), prices, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = (-(cross_entropy[:, 0] + prices) / 0.1).softmax(0)
    assert torch.allclose(logits.softmax(-1)[0], best, atol=1e-4) and best.argmax() == 1


def reference_loss(model, batch, price, temperature):
    """The loss of the module's docstring, row by row from the model's public outputs."""
    model.train()
    images = (batch["input_ids"] == model.config.image_token_id).sum(1).tolist()
    views = sum(images)
    rungs, counts = range(3), model.config.visual_token_counts
    logits = [model(**batch, visual_rungs=[rung] * views).logits for rung in rungs]
    router = model.model.router(model.model.extract_features(batch["pixel_values"])).logits.softmax(-1).split(images)
    total = torch.zeros(())
    for row, probabilities in enumerate(router):
        labels = batch["labels"][row, 1:]
        ce = [F.cross_entropy(logits[rung][row, :-1], labels) for rung in rungs]
        total = total + sum(ce) / 3
        for p in probabilities:
            costs = [ce[rung].detach() + price * counts[rung] / counts[-1] for rung in rungs]
            expected = sum(p[rung] * (costs[rung] + temperature * p[rung].log()) for rung in rungs)
            total = total + expected / len(probabilities)
    return total / len(images)


@pytest.mark.compat
def test_loss_and_gradients_equal_a_reference_written_row_by_row(tmp_path):
    model = warm_model()
    trainer = train(model, tmp_path, token_price=0.7, temperature=0.2, gradient_checkpointing=False)
    batch = trainer.data_collator(list(message_dataset(4)))  # rows with one, two, no and one image
    assert {name: value.shape[0] for name, value in batch.items()}["pixel_values"] == 4
    expected = reference_loss(model, batch, 0.7, 0.2)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = trainer.compute_loss(model.train(), dict(batch))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(named) == set(gradients)
    assert all(torch.allclose(named[n], gradients[n], atol=1e-5) for n in named)
    assert all(named[n].abs().max() > 1e-6 for n in named if "router" in n)
    assert any("router" in n for n in named) and not any("vision_tower" in n for n in named)


@pytest.mark.compat
def test_images_are_encoded_once_and_the_language_model_runs_once_per_count(tmp_path):
    model = warm_model()
    trainer = train(model, tmp_path, gradient_checkpointing=False)
    calls = []
    for name in ("vision_tower", "language_model"):
        part = getattr(model.model, name)
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    trainer.compute_loss(model.train(), trainer.data_collator(list(message_dataset(4))))
    assert calls == ["vision_tower"] + ["language_model"] * 3


def test_two_counts_are_trained_through_one_logit(tmp_path):
    model = tiny_model("dfmr", compressor={"type": "average_pool", "factors": [1, 6]}, router=CLASSIFIER)
    trainer = train(model, tmp_path)
    loss = trainer.compute_loss(model.train(), trainer.data_collator(list(message_dataset(4))))
    loss.backward()
    assert model.model.router.linear_2.weight.grad.abs().max() > 0 and model.model.router.linear_2.out_features == 1


def test_under_autocast_the_loss_is_finite_and_close(tmp_path):
    model = warm_model()
    trainer = train(model, tmp_path, gradient_checkpointing=False)
    batch = trainer.data_collator(list(message_dataset(4)))
    exact = trainer.compute_loss(model.train(), dict(batch))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = trainer.compute_loss(model, dict(batch))
    rounded.backward()
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_batch_without_images_leaves_the_router_alone(tmp_path):
    model = warm_model()
    trainer = train(model, tmp_path)
    batch = trainer.data_collator(list(message_dataset(4).select([2])))
    assert "pixel_values" not in batch
    loss = trainer.compute_loss(model.train(), dict(batch))
    loss.backward()
    expected = F.cross_entropy(model(**batch).logits[0, :-1], batch["labels"][0, 1:])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert all(not p.grad.any() for p in model.model.router.parameters())


@pytest.mark.parametrize(
    "tiling",
    [
        {"type": "anyres", "view_layout": "sequence"},
        {"type": "anyres", "view_layout": "spatial_unpad"},
        {"type": "mosaic"},
    ],
    ids=lambda tiling: tiling.get("view_layout", tiling["type"]),
)
def test_every_tile_of_an_image_is_routed_with_the_loss_of_its_row(tmp_path, tiling):
    model = warm_model(tiling=tiling)
    trainer = train(model, tmp_path, gradient_checkpointing=False)
    batch = trainer.data_collator(list(message_dataset(4)))
    outputs = model.train()(**batch, every_rung=True)
    views = model.model.extract_features(batch["pixel_values"], batch.get("image_sizes")).views_per_image
    images = (batch["input_ids"] == model.config.image_token_id).sum(1).tolist()
    owner = [row for row, count in enumerate(images) for _ in range(count)]
    assert outputs.row_of_view.tolist() == [row for row, tiles in zip(owner, views, strict=True) for _ in range(tiles)]
    for rung in range(3):
        logits = model(**batch, visual_rungs=[rung] * sum(views)).logits
        for row in range(4):
            expected = F.cross_entropy(logits[row, :-1], batch["labels"][row, 1:], reduction="sum")
            assert -outputs.log_probs[rung, row].sum().item() == pytest.approx(expected.item(), rel=1e-4)
    trainer.compute_loss(model, dict(batch)).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.model.router.named_parameters())


# ---- training


@pytest.mark.compat
@pytest.mark.parametrize("lora", [False, True])
def test_router_projector_and_language_model_move_and_the_tower_does_not(tmp_path, lora, caplog):
    model = warm_model()
    trainer = train(model, tmp_path, lora=lora)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    kept = ("original_module", "base_layer", "embed_tokens", "norm", "lm_head") if lora else ()
    for name in before:
        if name.endswith("k_proj.bias"):  # softmax does not see it
            continue
        frozen = "vision_tower" in name or any(word in name for word in kept) or (lora and name.endswith("proj.bias"))
        assert (name in moved) != frozen, name
    if lora:
        assert "model.router" in trainer.model.peft_config["default"].modules_to_save
    assert model.config.router_training["method"] == "joint_routing"
    assert "router was never trained" not in caplog.text


@pytest.mark.compat
def test_logs_say_what_was_lost_and_spent_and_evaluation_is_the_routers_choice(tmp_path):
    model = warm_model()
    rows = message_dataset(4)
    trainer = train(model, tmp_path, max_steps=1, rows=rows, eval_rows=rows, learning_rate=0.0)
    trainer.train()
    log = trainer.state.log_history[0]
    batch = trainer.data_collator(list(rows))
    model.eval()
    with torch.no_grad():
        routing = model.model.router(model.model.extract_features(batch["pixel_values"]))
        for rung, count in enumerate((4, 9, 36)):
            logits = model(**batch, visual_rungs=[rung] * 4).logits
            losses = [F.cross_entropy(logits[row, :-1], batch["labels"][row, 1:]).item() for row in range(4)]
            assert log[f"ce_{count}_tokens"] == pytest.approx(sum(losses) / 4, abs=1e-4)
            assert log[f"share_{count}_tokens"] == (routing.rungs == rung).float().mean()
        spent = model(**batch).num_visual_tokens.float().mean().item()
    assert log["mean_visual_tokens"] == pytest.approx(spent)
    p = routing.logits.softmax(-1)
    assert log["router_entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), abs=1e-5)

    metrics = trainer.evaluate()
    plain_model = warm_model()
    plain = build_trainer(
        plain_model, tiny_processor(plain_model), SFTConfig(str(tmp_path), bf16=False, use_cpu=True), rows, rows
    )
    assert metrics["eval_mean_visual_tokens"] == pytest.approx(spent)
    assert metrics["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)


@pytest.mark.compat
def test_micro_batches_change_nothing(tmp_path):
    weights = []
    for batch, accumulation in ((4, 1), (2, 2)):
        trainer = train(
            warm_model(), tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters()})
    assert all(torch.allclose(value, weights[1][name], atol=1e-5) for name, value in weights[0].items())


TWO_PROCESSES = """
import sys
from tests.test_joint_routing import in_order
in_order(sys.argv[1], int(sys.argv[2]))
"""


def in_order(folder, batch):
    """Three steps over rows in order; of each four rows, the first two show images and the others do not."""
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)}), "images": List(Image())})
    numbers = [(1, 2, 0, 0)[i % 4] for i in range(12)]
    rows = Dataset.from_dict(
        {
            "messages": [turns(ANSWERS[i % 4], images=n) for i, n in enumerate(numbers)],
            "images": [[picture(10 * i + k) for k in range(n)] for i, n in enumerate(numbers)],
        },
        features=features,
    )
    trainer = train(
        warm_model(), folder, rows=rows, per_device_train_batch_size=batch, max_steps=3, optim="sgd",
        learning_rate=0.1, ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )  # fmt: skip
    trainer._get_train_sampler = lambda *_: SequentialSampler(rows)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    if torch.distributed.is_initialized():
        leave_together()


def logged(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = ("ce_4_tokens", "ce_36_tokens", "mean_visual_tokens", "router_entropy")
    return [[log[name] for name in names] for log in history if "ce_4_tokens" in log]


@pytest.mark.compat
def test_two_processes_end_where_one_does(tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(tmp_path / "two"), "2"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    in_order(tmp_path / "one", 4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = warm_model().state_dict()
    assert set(one) == set(two)
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-5), name
    assert all(not torch.equal(two[name], start[name]) for name in two if "router" in name)
    for alone, together in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert alone == pytest.approx(together, abs=1e-4)


@pytest.mark.compat
def test_the_command_trains_merges_and_the_merged_model_routes_as_trained(tmp_path):
    base = save(tmp_path / "base", router=CLASSIFIER)
    message_dataset().to_parquet(str(tmp_path / "data" / "train-00000.parquet"))
    output = tmp_path / "out"
    trainer = main(
        ["--config", RECIPE, "--model_name_or_path", base, "--dataset_name", str(tmp_path / "data"), "--output_dir",
         str(output), "--use_cpu", "true", "--max_steps", "2", "--learning_rate", "1e-2", "--merge", "true",
         "--warmup_steps", "0", "--gradient_accumulation_steps", "1", "--token_price", "0.5"]
    )  # fmt: skip
    assert isinstance(trainer, JointRoutingTrainer) and trainer.args.token_price == 0.5
    assert AdaptiveLlavaForConditionalGeneration.from_pretrained(base).config.router_training is None
    merged = AdaptiveLlavaForConditionalGeneration.from_pretrained(output / "merged")
    assert merged.config.router_training == {"method": "joint_routing"}
    processor = AdaptiveLlavaProcessor.from_pretrained(output / "merged")
    assert (logits_of(merged, processor) - logits_of(trainer.model, processor)).abs().max() <= 1e-5
    pixels = inputs_of(processor)["pixel_values"]
    scores = [model.encode_images(pixels).scores for model in (merged, trainer.model.get_base_model())]
    assert (scores[0] - scores[1]).abs().max() <= 1e-5
    untrained = AdaptiveLlavaForConditionalGeneration.from_pretrained(base).encode_images(pixels).scores
    assert (scores[0] - untrained).abs().max() > 1e-4


# ---- what is refused


def test_models_that_have_nothing_to_learn_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`router.type='feature_std'` has nothing to learn.*Build the model with"):
        train(tiny_model("dfmr"), tmp_path)
    single = tiny_model("avg-pool", router=CLASSIFIER)
    with pytest.raises(ValueError, match="has a single token count, so a router has nothing to choose. Use one with"):
        train(single, tmp_path)


def test_a_cold_start_is_refused_unless_it_is_asked_for(tmp_path):
    model = warm_model(compressor_trained=False)
    with pytest.raises(ValueError, match="`compressor_trained=False`: joint routing needs a warm start.*budget 36 "):
        train(model, tmp_path)
    assert train(model, tmp_path, allow_cold_start=True)
    tiled = warm_model(compressor_trained=False, tiling={"type": "anyres"})
    with pytest.raises(ValueError, match=r"first \(`python -m adaptive_llava.training.sft \.\.\.`\)"):
        train(tiled, tmp_path)  # 36 tokens for an image would be its fewest


def test_a_frozen_router_is_refused(tmp_path):
    model = warm_model()
    with pytest.raises(ValueError, match=r"router's parameters are frozen. Call .*requires_grad_\(True\)"):
        JointRoutingTrainer(
            model, configuration(tmp_path), train_dataset=message_dataset(), processing_class=tiny_processor(model)
        )


def test_options_that_contradict_the_loss_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`token_price=-1.0` must be a number >= 0, in nats"):
        configuration(tmp_path, token_price=-1.0)
    with pytest.raises(ValueError, match="`temperature=nan` must be a number >= 0"):
        configuration(tmp_path, temperature=float("nan"))
    with pytest.raises(ValueError, match="`loss_type='dft'`.*Leave both at their defaults"):
        configuration(tmp_path, loss_type="dft")
    model = warm_model()
    with pytest.raises(ValueError, match="`visual_token_budget=9` fixes the token count"):
        build_joint_trainer(
            model, tiny_processor(model), configuration(tmp_path), message_dataset(), visual_token_budget=9
        )


# ---- the study


def test_shuffled_counts_keep_their_mean_and_lose_their_images():
    # two scenes right at any count, two pages right at 16 tokens only; the router knows
    images = [("scene", 1), ("scene", 1), ("document", 16), ("document", 16)]
    answers = {"auto": [], "1": [], "16": []}
    for index, (kind, chosen) in enumerate(images):
        for budget in answers:
            tokens = chosen if budget == "auto" else int(budget)
            right = kind == "scene" or tokens == 16
            answers[budget].append({"image": str(index), "kind": kind, "tokens": tokens, "right": right})
    shuffled = shuffled_choice(answers, 0)["shuffled"]
    assert shuffled["all"]["mean_tokens"] == pytest.approx((1 + 1 + 16 + 16) / 4)
    assert shuffled["scene"]["accuracy"] == 1
    assert shuffled["document"]["accuracy"] == pytest.approx(2 / 4, abs=0.06)  # two of four counts are 16


def cell(accuracy, tokens):
    return {"accuracy": accuracy, "mean_tokens": tokens, "questions": 100}


def test_all_cells_of_documents_are_asked_about(tmp_path):
    entries = write_images(render_images(60, seed=0), tmp_path)
    asked = {question for entry in entries if entry["kind"] == "document" for question, _ in entry["questions"]}
    assert len(asked) == 16
    assert all(len(entry["questions"]) == 2 and Path(entry["path"]).is_file() for entry in entries)


def test_the_summary_asks_every_seed_to_be_within_the_margin():
    kinds = ("scene", "collage", "document", "all")
    runs = [
        {
            "counts": [1, 16],
            "arms": {
                "joint": {
                    "auto": {kind: cell(routed, 16 if kind == "document" else 1) for kind in kinds},
                    "shuffled": {kind: cell(0.5, 8) for kind in kinds},
                },
                "largest_only": {"16": {kind: cell(1.0, 16) for kind in kinds}},
            },
        }
        for routed in (0.99, 0.97)
    ]
    summary = summarise(runs)
    assert summary["fewer_tokens_on_scenes_than_documents"]
    row = summary["kinds"]["scene"]
    assert row["difference_by_seed"] == [-0.01, -0.03] and row["difference"] == -0.02 and not row["within_margin"]
