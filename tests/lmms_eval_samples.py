"""A few samples of DocVQA, ChartQA and POPE in their own columns, and a tiny model that knows what to say to each.

What it was taught is right for some samples, nearly right for others and wrong for the rest, so that every metric has
something to tell apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image as Pictures
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptive_llava import AdaptiveLlavaProcessor
from adaptive_llava.training.metrics.relaxed_accuracy.relaxed_accuracy import as_number
from tests.conftest import IMAGE_TOKEN, tiny_model


COUNT = 7  # samples of a benchmark: odd, so that two processes have unlike shares
STEPS = 100
_PHRASE, _WORD = "\nAnswer the question using a single word or phrase.", "\nAnswer the question with a single word."
AFTER_QUESTION = {"docvqa": _PHRASE, "chartqa": _WORD, "pope": _PHRASE}  # as lmms-eval's tasks write it
_WRONG = (2, 5, 6)  # of POPE: two that are yes, one that is no
_FOLDERS = {"docvqa": "documents", "chartqa": "charts", "pope": "photos"}


@dataclass(frozen=True)
class Sample:
    """A question about an image, its answer, and what the model was taught to say."""

    image: Path
    question: str
    answer: str
    taught: str

    def prompt(self, benchmark: str) -> str:
        """The question as the benchmark's task asks it."""
        return self.question + AFTER_QUESTION[benchmark]


def benchmark_samples(shared: Path) -> dict[str, list[Sample]]:
    """Samples by benchmark; no two of one benchmark ask the same."""
    return {name: list(_samples(shared / "data" / folder, name)) for name, folder in _FOLDERS.items()}


def _samples(folder: Path, benchmark: str):
    asked: set[str] = set()
    for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        fresh = [pair for pair in row["qa"] if pair["question"] not in asked]
        if benchmark == "pope":  # yes and no in turn
            fresh = [pair for pair in fresh if pair["answer"] == ("yes", "no")[len(asked) % 2]]
        if not fresh:
            continue
        question, answer = fresh[0]["question"], " ".join(fresh[0]["answer"].split())
        yield Sample(folder / row["file"], question, answer, _taught(benchmark, answer, len(asked)))
        asked.add(question)
        if len(asked) == COUNT:
            return


def _taught(benchmark: str, answer: str, index: int) -> str:
    if benchmark == "pope":
        return {"yes": "no", "no": "yes"}[answer] if index in _WRONG else answer
    if index % 3 == 0:
        return answer
    if index % 3 == 2:
        return "unreadable"
    number = as_number(answer) if benchmark == "chartqa" else None
    return answer[:-1] + "~" if number is None else str(number * 1.04)


def save_taught_model(folder: Path, samples: dict[str, list[Sample]]) -> None:
    """A model of the `dfmr` preset with 36, 9 or 4 visual tokens that has learned its answers, and its processor."""
    rows = [(sample, sample.prompt(name)) for name, given in samples.items() for sample in given]
    model = tiny_model("dfmr", text_options={"vocab_size": 512})
    processor = AdaptiveLlavaProcessor.from_config(
        model.config, _tokenizer([text for sample, prompt in rows for text in (prompt, sample.taught)])
    )
    inputs = processor.apply_chat_template(
        [chat(sample.image, prompt, sample.taught) for sample, prompt in rows],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
    )
    labels = inputs["input_ids"].masked_fill(inputs.pop("assistant_masks") == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        rungs = [(step + row) % 3 for row in range(len(rows))]
        loss = model(**inputs, labels=labels, visual_rungs=rungs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def chat(image: Path | Pictures.Image, prompt: str, answer: str | None = None) -> list[dict]:
    """A question with its image, and the answer if there is one."""
    picture = Pictures.open(image).convert("RGB") if isinstance(image, Path) else image
    asked = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return [asked] if answer is None else [asked, said]


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    template = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    template += "detailed, and polite answers to the user's questions. USER: ASSISTANT:"
    words = sorted({word for text in [template, *texts] for word in text.split()})
    ids = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE_TOKEN}
    free = (index for index in range(4, 512) if index != IMAGE_TOKEN)
    ids |= {word: next(free) for word in words}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
