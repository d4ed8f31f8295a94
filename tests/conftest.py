"""Tiny real models for every test, and the real images where they are at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


torch.set_num_threads(1)

from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig  # noqa: E402

from adaptive_llava import AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration  # noqa: E402
from tests.loopback_hub.running import Client, RunningHub, running_hub  # noqa: E402


IMAGE_TOKEN, PAD, BOS, EOS = 99, 0, 1, 2

# One row per compressor and router that obeys the laws; adding a method adds a row.
TINY_COMPRESSORS: dict[str, dict] = {
    "identity": {"type": "identity"},
    "average_pool": {"type": "average_pool", "factors": [1, 2, 3]},
    "token_concat": {"type": "token_concat", "window": 2},
    "spatial_fusion": {"type": "spatial_fusion", "window": 2, "fused_tokens": 2},
    "query_resampler": {"type": "query_resampler", "counts": [1, 4], "num_heads": 2},
    "query_resampler_nested": {"type": "query_resampler", "counts": [1, 4], "num_heads": 2, "query_sets": "nested"},
}
TINY_ROUTERS: dict[str, dict] = {
    "fixed": {"type": "fixed"},
    "random": {"type": "random"},
    "feature_std": {"type": "feature_std"},
    "classifier": {"type": "classifier", "blocks": [1]},
    "pixel_std": {"type": "pixel_std"},
}
PRESETS_HERE = ["llava", "avg-pool", "random-pool", "token-concat", "dfmr", "mbtf", "stf", "stf-mbtf"]
PRESETS_HERE += ["llava-mini", "dynamic-resampler", "dynamic-resampler-multi"]
# Presets with other fields, by their own name or one more that `tiny_model` takes.
TINY_VARIANTS = {
    "pre-fusion": ("dfmr", {"prefusion_layers": 2}),
    "llava-mini": ("llava-mini", {"prefusion_layers": 2}),
    "dynamic-resampler": ("dynamic-resampler", {"compressor": {"type": "query_resampler", "counts": [1, 9]}}),
    "dynamic-resampler-multi": (
        "dynamic-resampler-multi",
        {"compressor": {"type": "query_resampler", "counts": [1, 4, 9]}},
    ),
}
MODELS_HERE = [*PRESETS_HERE, "pre-fusion"]


def tiny_vision_config(kind: str = "clip", image_size: int = 24, num_hidden_layers: int = 3):
    """A vision tower of three layers on 4-pixel patches: a 6x6 grid at 24 pixels."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": 4,
    }
    return CLIPVisionConfig(projection_dim=16, **shape) if kind == "clip" else SiglipVisionConfig(**shape)


def tiny_text_config(kind: str = "qwen2", **options):
    """A language model of two layers and 100 words."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    return (Qwen2Config if kind == "qwen2" else LlamaConfig)(**(shape | options))


def tiny_model(preset: str = "llava", *, vision: str = "clip", text: str = "qwen2", seed: int = 0, **fields):
    """A random model whose weights are large enough that every part matters to the logits."""
    torch.manual_seed(seed)
    preset, variant = TINY_VARIANTS.get(preset, (preset, {}))
    fields = variant | fields
    tied = fields.pop("tie_word_embeddings", False)
    text_options = fields.pop("text_options", {})
    config = AdaptiveLlavaConfig.from_preset(
        preset,
        vision_config=tiny_vision_config(vision),
        text_config=tiny_text_config(text, tie_word_embeddings=tied, **text_options),
        image_token_id=IMAGE_TOKEN,
        **fields,
    )
    if config.router["type"] == "feature_std" and "router" not in fields:
        # between the spreads of `tiny_images`, so that a batch of three gets three counts
        config.router["thresholds"] = [0.05, 0.15]
    if config.router["type"] == "pixel_std" and config.router["thresholds"] == [0.05, 0.05]:
        config.router["thresholds"] = [0.25, 0.75]
    model = AdaptiveLlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def tiny_images(count: int, seed: int = 1, image_size: int = 24) -> torch.Tensor:
    """Pixels `(count, 3, size, size)` from flat to noisy, so that a router has something to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, image_size, image_size, generator=generator)
    flat = torch.randn(count, 3, 1, 1, generator=generator)
    share = torch.linspace(0, 1, max(count, 2))[:count].view(-1, 1, 1, 1)
    return flat * (1 - share) + noise * share


def batch_rows(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of ragged rows, padded on one side."""
    width = max(map(len, rows))
    fills = [width - len(row) for row in rows]
    left = side == "left"
    padded = [[PAD] * fill + row if left else row + [PAD] * fill for row, fill in zip(rows, fills, strict=True)]
    mask = [[0] * fill + [1] * (width - fill) if left else [1] * (width - fill) + [0] * fill for fill in fills]
    return torch.tensor(padded), torch.tensor(mask)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real images, golden tensors and weights; tests that need it are skipped without it."""
    folder = Path(os.environ.get("ADAPTIVE_LLAVA_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip("no folder with golden tensors and real images (set ADAPTIVE_LLAVA_SHARED)")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[RunningHub]:
    """An empty Hub on 127.0.0.1, in a process of its own."""
    with running_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def client(hub: RunningHub, tmp_path_factory) -> Iterator[Client]:
    """A user of that Hub, with a write token and an empty cache."""
    with hub.client(tmp_path_factory.mktemp("client")) as started:
        yield started


def leave_together() -> None:
    """End this process of a distributed run, whose results are on the disk, when all have come to this line.

    They meet at the launcher's store: a process that ends while another is still in gloo's barrier may leave it there,
    and the end of gloo's threads may hang.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(f"leaves {torch.distributed.get_rank()}", "1")
    store.wait([f"leaves {rank}" for rank in range(torch.distributed.get_world_size())])
    os._exit(0)
