"""Learning rates of parts: which parameters each group holds, and what is refused."""

import pytest
import torch
from torch import nn
from trl import ModelConfig

from adaptive_llava.training.joint_routing import build_joint_trainer
from adaptive_llava.training.part_learning_rates import PARTS, PartRatesTrainer, part_of, split_groups
from adaptive_llava.training.sft import build_trainer, parse_arguments
from tests.conftest import tiny_model
from tests.test_joint_routing import configuration as joint_configuration
from tests.test_joint_routing import warm_model
from tests.test_sft import FULL, LORA, command, configuration, message_dataset, save, tiny_processor


def trainer_with(model, folder, rates, *, lora=False, tower=False, **training):
    arguments = ModelConfig(use_peft=lora, lora_r=4, lora_target_modules=["all-linear"])
    return build_trainer(
        model,
        tiny_processor(model),
        configuration(folder, weight_decay=0.1, **training),
        message_dataset(),
        model_arguments=arguments,
        train_vision_tower=tower,
        learning_rates=rates,
    )


def groups_of(trainer):
    """Names of the parameters by `(rate, weight decay)`; each stands in one group."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = {}
    for group in trainer.create_optimizer().param_groups:
        members = groups.setdefault((group["lr"], group["weight_decay"]), [])
        members += [names[id(parameter)] for parameter in group["params"]]
    listed = [name for members in groups.values() for name in members]
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert len(listed) == len(set(listed)) and set(listed) == trained
    return groups


@pytest.mark.compat
def test_the_names_in_every_group(tmp_path):
    model = tiny_model("stf-mbtf", text_options={"num_hidden_layers": 1})
    groups = groups_of(trainer_with(model, tmp_path, {"fusion": 1e-3, "compressor": 1e-4}))
    fusion, compressor = [f"model.multi_block_fusion.linear_{i}" for i in (1, 2)], "model.compressor."
    layer = "model.language_model.layers.0."
    matrices = [f"{layer}self_attn.{name}_proj" for name in "qkvo"]
    matrices += [f"{layer}mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert {key: sorted(names) for key, names in groups.items() if key[0] != 1e-4} == {
        (1e-3, 0.1): [f"{name}.weight" for name in fusion],
        (1e-3, 0.0): [f"{name}.bias" for name in fusion],
        (1e-2, 0.1): sorted(
            ["lm_head.weight", "model.language_model.embed_tokens.weight", *(f"{name}.weight" for name in matrices)]
        ),
        (1e-2, 0.0): sorted(
            [
                *(f"{name}.bias" for name in matrices[:3]),
                *(f"{layer}{name}_layernorm.weight" for name in ("input", "post_attention")),
                "model.language_model.norm.weight",
            ]
        ),
    }
    for decay, end in ((0.1, "weight"), (0.0, "bias")):
        names = groups[1e-4, decay]
        assert len(names) == 2 and all(name.startswith(compressor) and name.endswith(end) for name in names)


@pytest.mark.compat
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("preset", ["dfmr", "pre-fusion", "dynamic-resampler", "stf-mbtf"])
def test_each_rate_applies_to_exactly_the_part_it_names(tmp_path, preset, lora):
    model = tiny_model(preset)
    trainer = trainer_with(model, tmp_path, {}, lora=lora, tower=True)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    base = "base_model.model." if lora else ""
    parts = [part for part, module in PARTS.items() if any(f"{base}model.{module}." in name for name in trained)]
    assert {"vision_tower"} < set(parts)
    trainer.learning_rates = {part: 1e-5 * (index + 1) for index, part in enumerate(parts)}
    groups = groups_of(trainer)
    for part, rate in trainer.learning_rates.items():
        named = {name for (lr, _), members in groups.items() if lr == rate for name in members}
        assert named == {name for name in trained if name.startswith(f"{base}model.{PARTS[part]}.")}, part
    rest = {name for (lr, _), members in groups.items() if lr == 1e-2 for name in members}
    assert rest and all("language_model" in name or "lm_head" in name for name in rest)


@pytest.mark.compat
def test_rates_follow_the_schedule_and_the_log_shows_the_main_one(tmp_path):
    trainer = trainer_with(
        tiny_model("dfmr"), tmp_path, {"projector": 1e-3}, max_steps=4, lr_scheduler_type="linear", warmup_steps=0
    )
    trainer.train()
    logged = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert logged == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    peaks = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert peaks == {1e-2, 1e-3} and all(group["lr"] == 0 for group in trainer.optimizer.param_groups)


@pytest.mark.compat
def test_a_tiny_rate_leaves_its_part_almost_where_it_was(tmp_path):
    trainer = trainer_with(tiny_model("dfmr"), tmp_path, {"projector": 1e-9})
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name: (value - before[name]).abs().max().item() for name, value in trainer.model.named_parameters()}
    assert max(step for name, step in moved.items() if "projector" in name) < 1e-6
    assert moved["lm_head.weight"] > 1e-3


@pytest.mark.compat
@pytest.mark.parametrize("recipe", [LORA, FULL])
def test_a_resumed_run_keeps_the_rates_of_its_parts(tmp_path, recipe):
    base = save(tmp_path / "base")
    message_dataset().to_parquet(str(tmp_path / "rows.parquet"))
    rest = ["--projector_learning_rate", "1e-4", "--save_steps", 2, "--max_steps", 4, "--lr_scheduler_type", "linear"]
    data = str(tmp_path / "rows.parquet")
    unbroken = command(base, data, tmp_path / "a", *rest, recipe=recipe)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "b" / "checkpoint-2")
    resumed = command(base, data, tmp_path / "b", *rest, "--resume_from_checkpoint", "last", recipe=recipe)
    assert {group["initial_lr"] for group in resumed.optimizer.param_groups} == {1e-2, 1e-4}
    expected = dict(unbroken.model.named_parameters())
    assert all(torch.allclose(v, expected[n], atol=1e-6) for n, v in resumed.model.named_parameters())


def test_joint_training_gives_the_router_a_rate_of_its_own(tmp_path):
    model = warm_model()
    trainer = build_joint_trainer(
        model, tiny_processor(model), joint_configuration(tmp_path), message_dataset(), learning_rates={"router": 1e-4}
    )
    named = {name for (rate, _), members in groups_of(trainer).items() if rate == 1e-4 for name in members}
    assert named == {name for name, _ in model.named_parameters() if name.startswith("model.router.")}


def test_the_first_module_on_the_path_tells_the_part():
    assert part_of("model.language_model.layers.0.mlp.router.weight") is None
    assert part_of("base_model.model.model.router.modules_to_save.default.linear_1.weight") == "router"
    assert part_of("model.modality_prefusion.layers.0.mlp.gate_proj.weight") == "prefusion"
    assert part_of("model.view_arrangement.image_newline") is None


def test_rates_on_the_command_line_reach_their_parts(tmp_path):
    options = ["--output_dir", str(tmp_path), "--projector_learning_rate", "2e-5", "--router_learning_rate", "1e-6"]
    assert parse_arguments(options)[0].learning_rates == {"projector": 2e-5, "router": 1e-6}


def test_a_rate_that_nothing_would_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`vision_tower_learning_rate=1e-05` would be used by nothing.*frozen"):
        trainer_with(tiny_model("dfmr"), tmp_path, {"vision_tower": 1e-5})
    with pytest.raises(ValueError, match="no `multi_modal_projector` that learns.*there may be: .*compressor_learn"):
        trainer_with(tiny_model("stf-mbtf"), tmp_path, {"projector": 1e-5})
    with pytest.raises(ValueError, match="`projector_learning_rate=0.0` must be a positive number"):
        trainer_with(tiny_model("dfmr"), tmp_path, {"projector": 0.0})
    with pytest.raises(ValueError, match="names 'head'. Known parts: vision_tower, fusion, compressor"):
        PartRatesTrainer(learning_rates={"head": 1.0})
    strange = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(
        ValueError, match="SGD does not hold the model's parameters themselves.*Choose another `optim`"
    ):
        split_groups(strange, tiny_model(), {"projector": 1.0})
