"""Padding and speed of training on images of 576, 144 and 64 tokens: padded, grouped by length, packed.

    python -m adaptive_llava.training.padding_study
    python -m adaptive_llava.training.padding_study --device cuda --attention flash_attention_2 --shape 0.5b

Each way trains for whole epochs with `training.sft`'s own trainer, in turn (padded, grouped, packed, padded, ...), on
the same rows and the same random weights. A speed-up is the ratio of median times against padded batches, with a 95 %
interval from resampling rounds. On a CPU the time is that of the process, in one thread, so that a neighbour on the
machine does not count. What packing can gain is 1 / (1 - padding); with an attention that computes what it
masks (`sdpa` and `eager` on packed rows) it gains less, or loses.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, Image, List
from PIL import Image as Pictures
from transformers import CLIPVisionConfig, CLIPVisionModel, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.benchmark import provenance
from adaptive_llava.training.dense_batches import GROUP_BY_LENGTH
from adaptive_llava.training.paired_timing import ratio_of_medians, wait_for
from adaptive_llava.training.rendered_images import vocabulary
from adaptive_llava.training.sft import build_trainer
from adaptive_llava.training.tiny_model import build_tokenizer


WAYS: dict[str, dict[str, Any]] = {
    "padded": {},
    "grouped by length": {"training": GROUP_BY_LENGTH},
    "packed": {"pack_batches": True},
}
SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 768},
    "0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
}
IMAGE_SIZE = 96  # pixels; 24 x 24 patches
TEXT_TOKENS = (10, 70)
# Spread of an image's pixels, from 0 to 1, by the count that the router then gives it.
_SPREADS = {64: 0.0, 144: 0.15, 576: 0.5}
_THRESHOLDS = (0.1, 1.2)  # of normalised pixels


def build_study_model(shape: str, attention: str, device: str) -> tuple[Any, AdaptiveLlavaProcessor]:
    """A model of random weights with a small tower, pooling factors 1, 2, 3 and a router that reads pixels."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(vocabulary())
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
        image_size=IMAGE_SIZE, patch_size=4,
    )  # fmt: skip
    text = Qwen2Config(**SHAPES[shape], num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=False)
    model = AdaptiveLlavaForConditionalGeneration.from_backbones(
        CLIPVisionModel(vision),
        Qwen2ForCausalLM(text),
        preset="dfmr",
        tokenizer=tokenizer,
        compressor={"type": "average_pool", "factors": [1, 2, 3]},
        router={"type": "pixel_std", "thresholds": list(_THRESHOLDS)},
    )
    model.model.language_model.set_attn_implementation(attention)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return model.to(device, dtype), AdaptiveLlavaProcessor.from_config(model.config, tokenizer)


def mixed_rows(count: int, seed: int = 0) -> Dataset:
    """Prompts with one image each, a third of them at each token count, and texts of 10 to 70 words."""
    rng, words = np.random.default_rng(seed), vocabulary()
    spreads = [list(_SPREADS.values())[index % 3] for index in range(count)]
    lengths = rng.integers(*TEXT_TOKENS, count)
    said = [" ".join(rng.choice(words, length)) for length in lengths]
    rows = {
        "prompt": [[{"role": "user", "content": text}] for text in said],
        "completion": [[{"role": "assistant", "content": " ".join(rng.choice(words, 5))}] for _ in said],
        "images": [[_picture(spread, rng)] for spread in spreads],
    }
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


def _picture(spread: float, rng: np.random.Generator) -> Pictures.Image:
    signs = rng.choice([-1.0, 1.0], (IMAGE_SIZE, IMAGE_SIZE, 1))
    return Pictures.fromarray(np.uint8(255 * (0.5 + spread * np.repeat(signs, 3, axis=2))))


def train_once(way: str, model: Any, processor: Any, rows: Dataset, *, seed: int, batch_size: int) -> dict[str, float]:
    """An epoch of training in one way; `seconds` and `padding_share`."""
    options = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        training = SFTConfig(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-6,
            seed=seed,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=model.device.type == "cpu",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            **options.get("training", {}),
        )
        trainer = build_trainer(model, processor, training, rows, pack_batches=options.get("pack_batches", False))
        trainer.remove_callback(PrinterCallback)
        clock = time.process_time if training.use_cpu else time.perf_counter
        started = clock()
        found = trainer.train().metrics
        wait_for(model.device.type)
        seconds = clock() - started
    return {"seconds": seconds, "padding_share": found["train_padding_share"]}


def summarise(rounds: list[dict[str, dict[str, float]]], rows: int) -> dict[str, dict[str, Any]]:
    """Per way: mean padding share, samples per second (median), and the speed-up over padded batches."""
    found: dict[str, dict[str, Any]] = {}
    for way in rounds[0]:
        pairs = [(each["padded"]["seconds"], each[way]["seconds"]) for each in rounds]
        speed_up = ratio_of_medians(pairs)
        found[way] = {
            "padding_share": float(np.mean([each[way]["padding_share"] for each in rounds])),
            "samples_per_second": rows / speed_up.peer_median,
            "speed_up": {"ratio": speed_up.ratio, "low": speed_up.low, "high": speed_up.high},
            "seconds": [each[way]["seconds"] for each in rounds],
        }
    return found


def main(arguments: list[str] | None = None) -> int:
    """Train in all ways, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m adaptive_llava.training.padding_study", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--attention", default="sdpa", help="of the language model, as transformers names it")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="timed epochs of each way, after one that is not")
    parser.add_argument("--output", type=Path, default=Path("results/padding.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    model, processor = build_study_model(options.shape, options.attention, options.device)
    rows = mixed_rows(options.rows)
    few = rows.select(range(min(len(rows), options.batch_size)))
    for way in WAYS:  # untimed
        train_once(way, model, processor, few, seed=0, batch_size=options.batch_size)
    rounds = []
    for seed in range(options.rounds):
        rounds.append(
            {way: train_once(way, model, processor, rows, seed=seed, batch_size=options.batch_size) for way in WAYS}
        )
    found = summarise(rounds, len(rows))
    print(f"{'padding':>8} {'samples/s':>10} {'speed-up':>9}  95 % interval")
    for way, row in found.items():
        gain = row["speed_up"]
        print(
            f"{row['padding_share']:>8.1%} {row['samples_per_second']:>10.2f} {gain['ratio']:>9.2f}  "
            f"{gain['low']:.2f} - {gain['high']:.2f}  {way}"
        )
    command = "python -m adaptive_llava.training.padding_study " + " ".join(
        sys.argv[1:] if arguments is None else arguments
    )
    report = provenance(command.strip(), device=options.device, threads=1)
    report |= {name: getattr(options, name) for name in ("device", "attention", "shape", "rows", "batch_size")}
    report |= {
        "counts": sorted(_SPREADS), "text_tokens": TEXT_TOKENS, "ways": found,
        "took_s": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['took_s']:.0f} s in all; written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
