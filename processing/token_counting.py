"""What images cost in visual tokens before the model runs: for callers, for prompts and for serving engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.processing_utils import MultiModalData

from .count_prediction import most_tokens, routing_known_beforehand, rungs_known_beforehand
from .image_loading import flatten_images, image_size, load_images
from .video_frames import FrameSampling, flatten_videos, load_frames
from .view_tiling import before_padding, cut_images, image_pixels, in_company, routed_views


# In a checkpoint these two stand beside this file; in the installed package they do not.
try:
    from .view_geometry import FRAME_SIZE, ImageViews, image_costs, view_grid
    from .visual_token_geometry import ImageCost
except ImportError:
    from adaptive_llava.modeling.view_geometry import FRAME_SIZE, ImageViews, image_costs, view_grid
    from adaptive_llava.modeling.visual_token_geometry import ImageCost


class TokenCountingMixin:
    """Counts of a processor that knows its model's compressor, router, grid and tiling."""

    image_token: str
    layout: str
    compressor: dict[str, Any] | None
    router: dict[str, Any] | None
    grid: list[int] | None
    tiling: dict[str, Any]
    image_processor: Any

    def count_tokens(
        self,
        images: Any = None,
        *,
        videos: Any = None,
        num_frames: int | None = None,
        fps: float | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        images_per_prompt: Sequence[int] | None = None,
        visual_token_budget: Any = None,
        visual_rungs: Sequence[int] | None = None,
        allow_urls: bool = False,
        **images_kwargs: Any,
    ) -> list[int]:
        """Visual tokens each image, and each frame of a video, will cost.

        Args:
            images: Images in any form that a call takes, one list per prompt where a prompt has several; or, without
                AnyRes, just their number. Pixels are read only where the `pixel_std` router decides.
            videos: Videos in any form that a call takes, of the same single prompt as `images`.
            num_frames: As in a call.
            fps: As in a call.
            image_sizes: Height and width of each image in pixels, in place of `images`; (0, 0) for a frame.
            images_per_prompt: Images of each prompt, beside `image_sizes`.
            visual_token_budget: As in a call; `{"total": n}` is shared by each inner list of `images`.
            visual_rungs: As in a call.
            allow_urls: Fetch images given as `http(s)` addresses.
            images_kwargs: Options of the image processor, as in a call.

        Returns:
            Tokens per image, newlines included, then per frame of each video. Exact for the `fixed` router, a
            whole-number budget, `visual_rungs`, and the `pixel_std` router given images; otherwise the most that the
            router may choose.

        Raises:
            ValueError: What is given does not tell the counts, a budget does not fit, or `videos` beside several
                prompts.
        """
        reading = {"allow_urls": allow_urls, "input_data_format": images_kwargs.pop("input_data_format", None)}
        sources, rows = (None, None) if isinstance(images, int) else flatten_images(images)
        first_frame = len(sources or ())
        if videos is not None:
            several = isinstance(images, int) or images_per_prompt is not None or image_sizes is not None
            frames = _frames_of_one_prompt(videos, FrameSampling(num_frames, fps), several or len(rows or ()) > 1)
            sources = [*(sources or ()), *frames]
            rows = [len(sources)]
        if rows is None and images_per_prompt is not None:
            rows = list(images_per_prompt)
        if image_sizes is not None:
            cuts = cut_images(self.tiling, image_sizes, in_company(self.tiling, rows))
        elif sources is not None:
            tiled = self.tiling["type"] == "anyres"
            sizes = [
                image_size(source, index=index, **reading) if tiled and index < first_frame else FRAME_SIZE
                for index, source in enumerate(sources)
            ]
            cuts = cut_images(self.tiling, sizes, in_company(self.tiling, rows))
        elif self.tiling["type"] != "anyres":
            cuts = [ImageViews()] * images
        else:
            raise ValueError(
                f"`images={images}` does not tell the tiles, which follow from the size of each image. Pass the "
                "images themselves, or `image_sizes=[(height, width), ...]`."
            )
        decision = (visual_token_budget, visual_rungs, rows)
        counts, _ = self._counts_known_beforehand(cuts, *decision)
        if counts is None and self._routes_by_pixels and sources:
            loaded = load_images(sources, **reading)
            pixels = image_pixels(self.image_processor, loaded, cuts, self.tiling, images_kwargs)
            counts, _ = self._counts_known_beforehand(cuts, *decision, pixels)
        return self._most_tokens(cuts, visual_token_budget) if counts is None else counts

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What stands in a prompt for one image: the hook that transformers 5 and serving engines call.

        Args:
            image_inputs: What the image processor gave for all images; with the `pixel_std` router its
                `pixel_values` decide.
            image_idx: Which image.
            kwargs: `visual_token_budget` or `visual_rungs` of the call.

        Returns:
            One placeholder per visual token; where only the model can tell, as many as the router may choose.
        """
        if self.layout == "compact":
            return self.image_token
        decision = _only_counts(kwargs)
        budget, rungs = decision.get("visual_token_budget"), decision.get("visual_rungs")
        pixels = image_inputs.get("pixel_values")
        sizes = image_inputs.get("image_sizes")
        if sizes is not None:
            whole = before_padding(self.tiling, pixels)
            cuts = cut_images(self.tiling, [[int(side) for side in size] for size in sizes], whole)
        else:
            cuts = [ImageViews()] * (image_idx + 1 if pixels is None else len(pixels))
        if not self._routes_by_pixels:
            pixels = None
        elif pixels is not None and not decision:  # alone: a router never looks across images
            pixels, cuts, image_idx = pixels[image_idx : image_idx + 1], cuts[image_idx : image_idx + 1], 0
        counts, _ = self._counts_known_beforehand(cuts, budget, rungs, None, pixels)
        return self.image_token * (self._most_tokens(cuts, budget) if counts is None else counts)[image_idx]

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        # vLLM's hook. Sizes tell no more than the most that a router may choose: right for reserving memory. Spans
        # of a prompt are found in the prompt, or this is exact: after `freeze-budget`, or given a budget or rungs
        if image_sizes is None:
            return MultiModalData()
        counts = self.count_tokens(image_sizes=image_sizes, **_only_counts(kwargs))
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    def _costs(self, cuts: Sequence[ImageViews]) -> list[ImageCost]:
        if self.compressor is None or self.grid is None:
            raise ValueError(
                "This processor does not know the model's token counts: `compressor` and `grid` are missing. Build "
                "it with `AdaptiveLlavaProcessor.from_config(config, tokenizer)`."
            )
        return image_costs(self.tiling, self.compressor, view_grid(self.tiling, self.grid), cuts)

    @property
    def _routes_by_pixels(self) -> bool:
        return (self.router or {}).get("type") == "pixel_std"

    def _counts_known_beforehand(
        self,
        cuts: Sequence[ImageViews],
        budget: Any,
        rungs: Sequence[int] | None,
        images_per_prompt: Sequence[int] | None = None,
        pixels: Any = None,
    ) -> tuple[list[int] | None, list[int] | None]:
        """Tokens of each image and rung of each view, or (None, None) if only the router can tell."""
        if self.compressor is None and budget is None and rungs is None:
            return None, None
        costs, grid = self._costs(cuts), view_grid(self.tiling, self.grid or ())
        seen = None if pixels is None else routed_views(self.tiling, cuts, pixels)
        routed = routing_known_beforehand(self.router or {}, costs, grid=grid, pixels=seen)
        chosen = rungs_known_beforehand(routed, costs, budget, rungs, images_per_prompt)
        if chosen is None:
            return None, None
        remaining = iter(chosen)
        return [cost.tokens([next(remaining) for _ in range(cost.views)]) for cost in costs], chosen

    def _most_tokens(self, cuts: Sequence[ImageViews], budget: Any) -> list[int]:
        return [most_tokens(cost, budget) for cost in self._costs(cuts)]


def _frames_of_one_prompt(videos: Any, sampling: FrameSampling, several: bool) -> list[Any]:
    clips, rows = flatten_videos(videos)
    if several or len(rows or ()) > 1:
        raise ValueError(
            "`videos` are counted for one prompt at a time. Pass its images and videos, each as a flat list, without "
            "`image_sizes` and `images_per_prompt`."
        )
    return [frame for index, clip in enumerate(clips) for frame in load_frames(clip, sampling, index=index)]


def _only_counts(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in ("visual_token_budget", "visual_rungs") if key in kwargs}
