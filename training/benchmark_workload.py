"""Models of a benchmark with the shapes of real ones, sharing their random weights, and the inputs of its rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, EncodedImages, VisionFeatures
from adaptive_llava.training.benchmark_shapes import SHAPES
from adaptive_llava.training.flop_counts import FlopCounts, count_flops
from adaptive_llava.training.paired_timing import Pairs, ratio_of_medians, timed_pairs, wait_for


TEXT_TOKENS = 40


class Workload:
    """Models of one shape that share their weights, and the inputs that all rows use.

    Args:
        shape: Name in `SHAPES`.
        device: `"cpu"` or `"cuda"`.
        dtype: `"float32"` or `"bfloat16"`.
        pairs: Timed pairs per row.
        seconds: Of a row that does not insist on all its pairs; it measures two at least.
        progress: Called with the number of pairs done.
        clock: As in `timed_pairs`.
    """

    def __init__(
        self,
        shape: str,
        device: str = "cpu",
        dtype: str = "float32",
        pairs: int = 30,
        seconds: float = 20.0,
        progress: Callable[[int], None] = lambda done: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.name, self.shape, self.device, self.dtype = shape, SHAPES[shape], device, dtype
        self.pairs, self.seconds, self.progress, self.clock = pairs, seconds, progress, clock
        self.batch = 8 if device == "cuda" else 1
        self.vision, self.text = self.shape.vision(), self.shape.text()
        self.patches = (self.vision.image_size // self.vision.patch_size) ** 2
        self.image_token = self.text.vocab_size - 1
        self._tower_seconds: dict[int, float] = {}

    @cached_property
    def stock(self) -> LlavaForConditionalGeneration:
        """The peer, with random weights."""
        torch.manual_seed(0)
        config = LlavaConfig(
            vision_config=self.vision,
            text_config=self.text,
            image_token_index=self.image_token,
            vision_feature_select_strategy="default" if self.vision.model_type == "clip_vision_model" else "full",
            tie_word_embeddings=True,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.dtype))  # no second copy of the weights in another dtype
        try:
            with torch.device(self.device):
                model = LlavaForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
        model.generation_config.eos_token_id = None  # random weights must not stop early
        return model.eval()

    @cached_property
    def identity(self) -> AdaptiveLlavaForConditionalGeneration:
        """Our model that keeps all tokens."""
        return AdaptiveLlavaForConditionalGeneration.from_llava(self.stock)

    @cached_property
    def dfmr(self) -> AdaptiveLlavaForConditionalGeneration:
        """Our model with pooling factors 1, 2, 3 and the router of DFMR."""
        return AdaptiveLlavaForConditionalGeneration.from_llava(self.stock, "dfmr")

    def pixels(self, images: int) -> Tensor:
        """Random images, `(images, 3, size, size)`."""
        size = self.vision.image_size
        pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))
        return pixels.to(self.device, getattr(torch, self.dtype))

    def prompt(self, rows: int = 1, placeholders: int = 1) -> dict[str, Tensor]:
        """Prompts of `TEXT_TOKENS` text ids around placeholders, as `input_ids` and `attention_mask`."""
        half = TEXT_TOKENS // 2
        ids = torch.tensor([[5] * half + [self.image_token] * placeholders + [7] * half] * rows, device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def encoded(self, *lengths: int, values: Tensor | None = None) -> EncodedImages:
        """Images of so many visual tokens each, as `encode_images` gives them; without `values`, random ones."""
        if values is None:
            values = torch.randn(sum(lengths), self.text.hidden_size, generator=torch.Generator().manual_seed(2))
            values = values.to(self.device, getattr(torch, self.dtype))
        scores = torch.zeros(len(lengths), device=self.device)
        return EncodedImages(values, lengths, (0,) * len(lengths), scores, (1,) * len(lengths))

    def model(self, preset: str, **fields: Any) -> AdaptiveLlavaForConditionalGeneration:
        """Our model of a preset, on the same backbones; what is new in it has random weights."""
        model = AdaptiveLlavaForConditionalGeneration.from_llava(self.stock, preset, **fields)
        return model.to(self.device, getattr(torch, self.dtype)).eval()

    def counts(self, model: AdaptiveLlavaForConditionalGeneration, rung: int) -> FlopCounts:
        """FLOPs of a prompt of `TEXT_TOKENS` text ids with one image at a rung."""
        return count_flops(model.config, model.config.visual_token_counts[rung], TEXT_TOKENS)

    def features(self, images: int) -> VisionFeatures:
        """Random patches of so many images, as the tower gives them."""
        shape = (images, self.patches, self.vision.hidden_size)
        patches = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        patches = patches.to(self.device, getattr(torch, self.dtype))
        grid = self.identity.config.vision_grid
        return VisionFeatures(
            patches, grid, patches[:, 0], self.pixels(images), (1,) * images, layer_cls=patches[:, 0]
        )

    def time(
        self, ours: Callable[[], object], peer: Callable[[], object], *, all_pairs: bool = False, share: float = 1.0
    ) -> Pairs:
        """Seconds of both sides in interleaved pairs: all of them, or as many as this share of the seconds allows."""
        return timed_pairs(
            ours,
            peer,
            pairs=self.pairs,
            warm_up=2 if all_pairs else 1,
            seconds=float("inf") if all_pairs else share * self.seconds,
            device=self.device,
            progress=self.progress,
            clock=self.clock,
        )

    def tower_seconds(self, images: int) -> float:
        """Median seconds of the vision tower alone on so many images, measured once."""
        if images not in self._tower_seconds:
            pixels = self.pixels(images)
            pairs = self.time(lambda: self.identity.model.vision_tower(pixels), lambda: None, share=1 / 3)
            self._tower_seconds[images] = ratio_of_medians(pairs).median
        return self._tower_seconds[images]

    @cached_property
    def generation_pairs(self) -> tuple[Pairs, Pairs]:
        """Seconds to the first token and seconds per later token, from one run of `generate` pairs."""
        first: list[float] = []  # fills in the order ours, peer, ours, peer; warm-up comes first
        pairs = self.time(
            lambda: self._generate(self.identity, 1, first),
            lambda: self._generate(self.stock, self.patches, first),
            all_pairs=True,
        )
        first = first[-2 * len(pairs) :]
        return list(zip(first[::2], first[1::2], strict=True)), pairs

    def _generate(self, model: Any, placeholders: int, first: list[float]) -> float:
        # Seconds per token after the first; those of the first go into `first`. The head runs once per step, so its
        # first call ends the prefill, on both sides alike.
        marks: list[float] = []

        def mark(*_: object) -> None:
            if not marks:
                wait_for(self.device)
                marks.append(self.clock())

        pixels = self.pixels(1)
        hook = model.get_output_embeddings().register_forward_hook(mark)
        start = self.clock()
        model.generate(
            **self.prompt(1, placeholders),
            pixel_values=pixels,
            max_new_tokens=self.shape.new_tokens,
            do_sample=False,
        )
        wait_for(self.device)
        end = self.clock()
        hook.remove()
        first.append(marks[0] - start)
        return (end - marks[0]) / (self.shape.new_tokens - 1)
