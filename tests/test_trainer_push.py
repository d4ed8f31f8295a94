"""A training on a model of the Hub pushes its adapter as our command does."""

from __future__ import annotations

from adaptive_llava.hub_cards.card_text import is_as_rendered, pinned_revision


SAVE_BASE = """
import os
from tests.test_sft import message_dataset, save
save("base", compressor_trained=False)
os.mkdir("data")
message_dataset().to_parquet("data/train-00000.parquet")
"""
TRAIN = """
from tests.test_sft import command
hub = ["--push_to_hub", "true", "--hub_model_id", "ada/trained", "--save_strategy", "no"]
command({base!r}, "data", "trained", *hub)
"""


def test_a_trained_adapter_is_pushed_without_what_only_trainers_read(hub, tmp_path):
    with hub.client(tmp_path / "trainer") as trainer:
        made = trainer.code(SAVE_BASE)
        assert made.status == 0, made.err
        local = trainer.code(TRAIN.format(base="base"))
        assert local.status == 1 and "would push an adapter of base, a base that nobody else has" in local.err
        assert trainer.command("push", "base", "ada/base", "--untrained").status == 0
        trained = trainer.code(TRAIN.format(base="ada/base"))
        assert trained.status == 0, trained.err
        verified = trainer.command("verify", "ada/trained")
    card = hub.read("ada/trained", "README.md").decode()
    assert is_as_rendered(card) and pinned_revision(card) == hub.commits("ada/trained")[1]["id"]
    assert f'base, base_revision = "ada/base", "{hub.commits("ada/base")[0]["id"]}"' in card
    assert "Its base was pushed with parts that were never trained" in card and "\n* data\n" in card
    there = set(hub.files("ada/trained"))
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json", "train_results.json"} < there
    assert not any(name.endswith((".bin", ".pt")) for name in there)
    assert verified.status == 0 and "loading it loads ada/base too" in verified.out, verified.out
