"""Does memory grow, or do files stay open, over a long training and many answers?

    python -m tests.long_runs [--steps 500] [--generations 2000]

TRL's own `SFTTrainer` fine-tunes the shipped model with LoRA, then the model answers about pictures of changing size,
number and budget, in batches of changing length. Resident memory and open files are read at every tenth step. What
they grew is the median of the last tenth less that of the tenth after the first fifth, by which time allocators have
what they need.
Writes `results/long_runs.json`; exits with 1 if either grew.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from adaptive_llava.training.benchmark import provenance
from adaptive_llava.training.study.families import Picture, render
from adaptive_llava.training.study.ship import load_shipped


MOST_GROWTH_MIB = 8.0
_EVERY = 10  # collecting garbage takes longer than a step
BUDGETS = (None, 1, 9, 36, {"ceiling": 9}, {"total": 60})


class Watch:
    """Resident memory and open files of this process, read after every tenth step."""

    def __init__(self) -> None:
        self.steps, self.memory, self.files = 0, [], []
        self.began = time.perf_counter()

    def step(self) -> None:
        self.steps += 1
        if self.steps % _EVERY:
            return
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.files.append(len(os.listdir("/proc/self/fd")))

    def summary(self) -> dict[str, Any]:
        """Steps, seconds, memory in MiB and open files at the start and at the end, and how much they grew."""
        memory, files = (growth(values) for values in (self.memory, self.files))
        return {
            "steps": self.steps,
            "seconds": round(time.perf_counter() - self.began, 1),
            "memory_mib": memory,
            "open_files": files,
            "steady": memory["growth"] <= MOST_GROWTH_MIB and files["growth"] <= 0,
        }


def growth(values: Sequence[float]) -> dict[str, float]:
    """Medians of the tenth after the first fifth and of the last tenth of the values, and their difference."""
    tenth = max(1, len(values) // 10)
    early, late = values[2 * tenth : 3 * tenth], values[-tenth:]
    first, last = (round(float(np.median(part)), 2) for part in (early, late))
    return {"early": first, "late": last, "growth": round(last - first, 2)}


def fine_tune(steps: int) -> dict[str, Any]:
    """`steps` steps of TRL's trainer with LoRA."""
    from datasets import Dataset, List
    from datasets import Image as ImageColumn
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    watch = Watch()

    class Reader(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.step()

    model, processor = load_shipped()
    rows = [
        {"images": [picture.image], "prompt": chat(picture.questions[0][0]), "completion": said(picture)}
        for picture in render(64, seed=31)
    ]
    data = Dataset.from_list(rows).cast_column("images", List(ImageColumn()))
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            max_length=None,
            use_cpu=True,
            seed=0,
        )
        lora = LoraConfig(r=8, target_modules=r".*language_model.*(q_proj|v_proj|gate_proj|down_proj)")
        SFTTrainer(
            model=model,
            args=settings,
            train_dataset=data,
            processing_class=processor,
            peft_config=lora,
            callbacks=[Reader()],
        ).train()
    return watch.summary()


def generate(times: int) -> dict[str, Any]:
    """`times` answers to batches of one to four prompts with one or two images each."""
    model, processor = load_shipped()
    rng, pictures, watch = np.random.default_rng(0), render(64, seed=32), Watch()
    for number in tqdm(range(times), unit="answer", desc="generate"):
        shown, prompts = [], []
        for picture in (pictures[place] for place in rng.integers(len(pictures), size=rng.integers(1, 5))):
            images = int(rng.integers(1, 3))
            shown += [picture.image.resize((int(side), int(side))) for side in rng.integers(30, 90, size=images)]
            message = chat(picture.questions[0][0], images)
            prompts.append(processor.apply_chat_template(message, add_generation_prompt=True))
        inputs = processor(images=shown, text=prompts, return_tensors="pt", padding=True)
        model.generate(**inputs, visual_token_budget=BUDGETS[number % len(BUDGETS)], max_new_tokens=3)
        watch.step()
    return watch.summary()


def chat(question: str, images: int = 1) -> list[dict[str, Any]]:
    """A user's message about so many images."""
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]


def said(picture: Picture) -> list[dict[str, Any]]:
    """The assistant's right answer."""
    return [{"role": "assistant", "content": [{"type": "text", "text": picture.questions[0][1]}]}]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.long_runs", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="of training (%(default)s)")
    parser.add_argument("--generations", type=int, default=2000, help="batches to answer (%(default)s)")
    parser.add_argument("--output", default="results/long_runs.json", help="file to write (%(default)s)")
    options = parser.parse_args(arguments)
    command = f"python -m tests.long_runs --steps {options.steps} --generations {options.generations}"
    result = provenance(command, device="cpu", threads=1)
    result["runs"] = {"fine_tune": fine_tune(options.steps), "generate": generate(options.generations)}
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["runs"], indent=1))
    return int(not all(run["steady"] for run in result["runs"].values()))


if __name__ == "__main__":
    sys.exit(main())
