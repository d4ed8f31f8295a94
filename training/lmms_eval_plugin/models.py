"""Adaptive LLaVA models as lmms-eval 0.7 asks them: chat tasks by default, `--force_simple` for the others.

Both classes write prompts with the checkpoint's own processor and chat template, answer in batches, and say for each
sample how many visual tokens it cost.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.lmms_eval_plugin.model_arguments import (
    generation_arguments,
    parse_batch_size,
    parse_budget,
    until_stop,
)


_IMAGE = "<image>"  # where a task's text wants an image


@dataclass
class VisualTokenCounts(TokenCounts):
    """Cost of a sample, `token_counts` in lmms-eval's log of samples.

    `input_tokens` is what the language model reads, visual tokens included; `visual_tokens` those of all images.
    """

    visual_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        """The counts for the log."""
        return {**super().to_dict(), "visual_tokens": self.visual_tokens}


@dataclass
class Spent:
    """What a process has answered so far, rows that only fill up its share left out."""

    requests: int = 0
    images: int = 0
    visual_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0


class AdaptiveLlavaRequests(lmms):
    """What the two kinds of tasks share.

    Args:
        pretrained: Folder or Hub id of an adaptive LLaVA model.
        budget: `auto`, a number of tokens per image, `full`, or JSON: `{"ceiling": 144}`, `{"total": 700}`.
        dtype: Of the weights, by its name in torch; `auto` is that of the checkpoint.
        attn_implementation: Of transformers, such as `flash_attention_2`.
        chat_template: In place of the checkpoint's: `vicuna`, `chatml` or Jinja source.
        batch_size: Samples per step.
        max_batch_size: Is not used: batches do not adapt.
        device: Where one process runs; several run where `accelerate launch` puts them.

    Raises:
        ValueError: A budget or a batch size that is none.
    """

    def __init__(
        self,
        pretrained: str,
        budget: str | int = "auto",
        dtype: str = "auto",
        attn_implementation: str | None = None,
        chat_template: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        self.budget = parse_budget(budget)
        self.batch_size = parse_batch_size(batch_size)
        self.chat_template = chat_template
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self.world_size == 1
        self.device = torch.device(device) if device and alone else self.accelerator.device
        self.model = AdaptiveLlavaForConditionalGeneration.from_pretrained(
            str(pretrained), dtype=dtype, attn_implementation=attn_implementation
        )
        self.model.to(self.device).eval()
        self.processor = AdaptiveLlavaProcessor.from_pretrained(str(pretrained))
        self.processor.layout = "compact"  # the model says the counts
        self.spent = Spent()

    @abstractmethod
    def messages(self, request: Instance) -> list[dict[str, Any]]:
        """The chat that a request stands for, up to where the model speaks."""

    @abstractmethod
    def options(self, request: Instance) -> dict[str, Any]:
        """The task's generation options."""

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; batches share their generation options."""
        return self._in_batches(requests, self.options, self._generate)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Mean cross-entropy of what the assistant would say, its end included, and whether it is what it does say.

        lmms-eval 0.7.3 takes the least loss for the choice, and turns a pair into text unless it comes inside a
        `GenerationResult`.
        """
        return self._in_batches(requests, lambda request: {}, self._score)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Is not there."""
        raise NotImplementedError("`adaptive_llava` answers tasks of one round; choose a task without rounds.")

    def clean(self) -> None:
        """Report tokens and speed of all processes, then drop the model.

        lmms-eval calls this in every process once all requests are answered. `generate_until` may be left out in one
        whose answers are all in its cache, so processes cannot meet there.
        """
        shares = gather_object([self.spent])
        self.spent = Spent()
        seconds = max(share.seconds for share in shares)
        totals = {name: sum(getattr(share, name) for share in shares) for name in ("requests", "images")}
        new_tokens = sum(share.new_tokens for share in shares)
        visual_tokens = sum(share.visual_tokens for share in shares)
        if self.rank == 0 and totals["requests"]:
            mean = {"visual_tokens_per_image": visual_tokens / totals["images"]} if totals["images"] else {}
            log_metrics(
                total_elapsed_time=seconds,
                total_gen_tokens=new_tokens,
                avg_speed=new_tokens / seconds,
                additional_metrics={"total_requests": totals["requests"], **mean},
            )
        super().clean()

    @torch.inference_mode()
    def _in_batches(
        self,
        requests: Sequence[Instance],
        options: Callable[[Instance], dict[str, Any]],
        answer: Callable[[Sequence[Instance]], list[GenerationResult]],
    ) -> list[GenerationResult]:
        ordered = Collator(list(requests), lambda request: -len(request.args[0]), group_fn=options, grouping=True)
        results: list[GenerationResult] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for batch in ordered.get_batched(n=self.batch_size):
                results += answer(batch)
                bar.update(len(batch))
        return ordered.get_original(results)

    def _generate(self, batch: Sequence[Instance]) -> list[GenerationResult]:
        chats = [self.messages(request) for request in batch]
        options = self.options(batch[0])
        inputs = self._inputs(chats, add_generation_prompt=True)
        start = time.perf_counter()
        output = self.model.generate(
            **inputs, visual_token_budget=self.budget, return_dict_in_generate=True, **generation_arguments(options)
        )
        new_ids = output.sequences[:, inputs["input_ids"].shape[1] :].cpu()
        seconds = time.perf_counter() - start
        texts = self.processor.batch_decode(new_ids, skip_special_tokens=True)
        lengths = self._new_lengths(new_ids)
        counts = self._counts(batch, inputs, output, lengths, seconds)
        return [
            GenerationResult(until_stop(text, options.get("until")), count)
            for text, count in zip(texts, counts, strict=True)
        ]

    def _score(self, batch: Sequence[Instance]) -> list[GenerationResult]:
        chats = [[*self.messages(request), _assistant(self._continuation(request))] for request in batch]
        inputs = self._inputs(chats, return_assistant_tokens_mask=True)
        said = inputs.pop("assistant_masks").bool()
        if not said.any(dim=1).all():
            raise ValueError(
                "`chat_template` does not mark what the assistant says, so choices cannot be scored. Pass one with "
                "{% generation %}, such as `chat_template=vicuna`."
            )
        labels = inputs["input_ids"].masked_fill(~said, -100)
        start = time.perf_counter()
        output = self.model(**inputs, labels=labels, visual_token_budget=self.budget)
        # (B, L, vocabulary) at L - 1 positions against the id that follows each
        logits, following = output.logits[:, :-1].float(), labels[:, 1:]
        kept = following != -100
        losses = F.cross_entropy(logits.transpose(1, 2), following, ignore_index=-100, reduction="none").sum(1)
        means = (losses / kept.sum(1)).tolist()
        greedy = ((logits.argmax(-1) == following) | ~kept).all(1).tolist()
        seconds = time.perf_counter() - start
        counts = self._counts(batch, inputs, output, [0] * len(batch), seconds)
        return [GenerationResult(pair, count) for *pair, count in zip(means, greedy, counts, strict=True)]

    def _continuation(self, request: Instance) -> str:
        continuation = request.args[1]
        return (continuation(self._document(request)) if callable(continuation) else continuation).strip()

    def _document(self, request: Instance) -> dict[str, Any]:
        *_, document, task, split = request.args
        return self.task_dict[task][split][document]

    def _inputs(self, chats: Sequence[Sequence[dict[str, Any]]], **options: Any) -> Any:
        inputs = self.processor.apply_chat_template(
            chats,
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
            **options,
        )
        return inputs.to(self.device)

    def _new_lengths(self, new_ids: Tensor) -> list[int]:
        """New ids of each row, its end included, `(B, new)`."""
        ends = self.model.generation_config.eos_token_id
        ended = torch.isin(new_ids, torch.tensor([] if ends is None else ends, dtype=new_ids.dtype))
        before = (ended.cumsum(1) - ended.long()) == 0
        return before.sum(1).tolist()

    def _counts(
        self, batch: Sequence[Instance], inputs: Any, output: Any, new_tokens: Sequence[int], seconds: float
    ) -> list[VisualTokenCounts]:
        """Cost of each row, added to what is spent."""
        per_image = output.num_visual_tokens.tolist() if "pixel_values" in inputs else []
        images = (inputs["input_ids"] == self.processor.image_token_id).sum(1).tolist()
        read = inputs["attention_mask"].sum(1).tolist()
        remaining = iter(per_image)
        counts = []
        for request, shown, ids, new in zip(batch, images, read, new_tokens, strict=True):
            visual = sum(next(remaining) for _ in range(shown))
            counts.append(VisualTokenCounts(ids - shown + visual, new, visual_tokens=visual))
            if not request.metadata.get("__padding_only__"):
                self.spent.requests += 1
                self.spent.images += shown
                self.spent.visual_tokens += visual
                self.spent.new_tokens += new
        self.spent.seconds += seconds
        return counts


class AdaptiveLlavaChat(AdaptiveLlavaRequests):
    """For tasks as chats: images and text in the order of the task."""

    is_simple = False

    def messages(self, request: Instance) -> list[dict[str, Any]]:
        """The task's chat."""
        chat = request.args[1](self._document(request))
        return ChatMessages(messages=chat).to_hf_messages()

    def options(self, request: Instance) -> dict[str, Any]:
        """The task's generation options."""
        return request.args[2]


class AdaptiveLlavaSimple(AdaptiveLlavaRequests):
    """For tasks as a text and a list of images; multiple choice by likelihood exists only here."""

    is_simple = True

    def messages(self, request: Instance) -> list[dict[str, Any]]:
        """One message: each image at its `<image>` in the text, or all before it.

        Raises:
            ValueError: Something to see that is no image.
        """
        text, _, doc_to_visual, *_ = request.args
        seen = (doc_to_visual(self._document(request)) or []) if doc_to_visual else []
        for image in seen:
            if not isinstance(image, Image):
                raise ValueError(
                    f"The task shows {type(image).__name__}, but `--force_simple` reads PIL images alone. Run the "
                    "task without it."
                )
        pieces = text.split(_IMAGE)
        if len(pieces) != len(seen) + 1:
            pieces = [""] * len(seen) + [text]
        content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for image, piece in zip(seen, pieces[1:], strict=True):
            content += [{"type": "image", "image": image}, *([{"type": "text", "text": piece}] if piece else [])]
        return [{"role": "user", "content": content}]

    def options(self, request: Instance) -> dict[str, Any]:
        """The task's generation options."""
        return request.args[1]


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
