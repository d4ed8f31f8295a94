"""Processor of adaptive LLaVA models: images, text and chats to model inputs.

Shapes: B prompts with N images in all -> `input_ids (B, L)`, `attention_mask (B, L)`, `mm_token_type_ids (B, L)`
(1 at image placeholders), `pixel_values (N, 3, S, S)`, or of tiled images `(N, max_views, 3, S, S)`, and `image_sizes
(N, 2)` as (height, width) in pixels before any resizing. Other keys appear only when asked for: trainers pass every
key on to the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, TextKwargs
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_templates import CHAT_TEMPLATES, chosen_template
from .image_loading import load_images
from .prompt_encoding import (
    check_encodable,
    check_messages,
    control_token_pattern,
    encode_prompts,
    holds_video,
    normalise_messages,
    span_mask,
)
from .prompt_media import VIDEO_TOKEN, media_of_prompts
from .token_counting import TokenCountingMixin
from .tokenizer_setup import add_placeholder, is_one_token, make_tokenizer_config_portable
from .tower_image_processor import square_image_processor
from .video_frames import FrameSampling
from .view_tiling import cut_images, image_pixels, in_company


# In a checkpoint these two stand beside this file; in the installed package they do not.
try:
    from .code_files import auto_map, copy_code
    from .view_geometry import FRAME_SIZE, check_tiling
except ImportError:
    from adaptive_llava.modeling.code_files import auto_map, copy_code
    from adaptive_llava.modeling.view_geometry import FRAME_SIZE, check_tiling

if TYPE_CHECKING:  # never run: of a local folder, transformers 4.57 copies only the files that are named here itself
    from .count_prediction import rungs_known_beforehand  # noqa: F401
    from .pixel_statistics import pixel_routing  # noqa: F401
    from .visual_token_geometry import ImageCost  # noqa: F401


LAYOUTS = ("compact", "expanded")
INPUT_NAMES = ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_sizes"]

# Options of a call that are ours though transformers also names some, and the group they may be nested in.
_OWN_OPTIONS = {
    "layout": "text_kwargs",
    "return_mm_token_type_ids": "text_kwargs",
    "return_text_replacement_offsets": "text_kwargs",
    "num_frames": "videos_kwargs",
    "fps": "videos_kwargs",
}
_CALL_OPTIONS = {
    "visual_token_budget",
    "visual_rungs",
    "allow_urls",
    "videos",
}
_PROCESSOR_KWARGS = (
    _CALL_OPTIONS
    | set(_OWN_OPTIONS)
    | {"text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs", "audio"}
    | set(TextKwargs.__annotations__)
    | set(ImagesKwargs.__annotations__)
)


class AdaptiveLlavaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg, unused-ignore]
    """Call options of the tokenizer and the image processor, with our defaults."""

    _defaults = {"text_kwargs": {"padding": False}}  # noqa: RUF012, a TypedDict takes no ClassVar


class AdaptiveLlavaProcessor(TokenCountingMixin, ProcessorMixin):
    """Turns images, text and chats into inputs of an adaptive LLaVA model.

    Args:
        image_processor: Resizes and normalises 8-bit RGB images; any of transformers' for square inputs.
        tokenizer: Knows `image_token` as one token.
        chat_template: Jinja source, or `"vicuna"` or `"chatml"`.
        image_token: Placeholder of an image in text.
        layout: `"compact"`: one placeholder per image; `"expanded"`: one per visual token, for serving engines and
            packing, wherever the count is known before the model runs.
        compressor: The model's compressor options, `{"type": ..., ...}`: from these and `grid` come the counts.
        router: The model's router options.
        grid: Patches per side of one input of the tower, `[height, width]`.
        tiling: How images are cut into views, as in the model's config, complete; `None`: not at all.
        code_repository: Hub id of a repository that holds the remote code; `None` writes it beside the files.

    Raises:
        ValueError: The tokenizer does not know `image_token`, `layout` is unknown, or an option is no model's.
    """

    valid_processor_kwargs = AdaptiveLlavaProcessorKwargs

    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers 4; 5 reads the signature of __init__
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        layout: str = "compact",
        compressor: Mapping[str, Any] | None = None,
        router: Mapping[str, Any] | None = None,
        grid: Sequence[int] | None = None,
        tiling: Mapping[str, Any] | None = None,
        code_repository: str | None = None,
    ):
        for name, value in (("compressor", compressor), ("router", router), ("tiling", tiling)):
            if value is not None and not (isinstance(value, Mapping) and isinstance(value.get("type"), str)):
                raise ValueError(
                    f"`{name}={value!r}` must be the complete options of the model's config, with a 'type'."
                )
        if grid is not None:
            _check_grid(grid)
        if not isinstance(image_token, str) or not image_token:
            raise ValueError(f"`image_token={image_token!r}` must be a token of the tokenizer, like '<image>'.")
        if isinstance(chat_template, str):
            chat_template = CHAT_TEMPLATES.get(chat_template, chat_template)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.layout = _check_layout(layout)
        self.compressor = None if compressor is None else dict(compressor)
        self.router = None if router is None else dict(router)
        self.grid = None if grid is None else list(grid)
        tile = (tiling or {}).get("tile_size")
        self.tiling = check_tiling(tiling, tower_size=tile if isinstance(tile, int) else None, num_rungs=1)
        self.code_repository = code_repository
        if not is_one_token(tokenizer, image_token):
            raise ValueError(
                f"`image_token={image_token!r}` is not one token of this tokenizer. Use "
                "`AdaptiveLlavaProcessor.from_config(config, tokenizer)`, which adds it."
            )

    @classmethod
    def from_config(
        cls,
        config: Any,
        tokenizer: Any,
        image_processor: Any = None,
        chat_template: str | None = "vicuna",
        **options: Any,
    ) -> AdaptiveLlavaProcessor:
        """Processor of a model: adds `<image>` (and a padding token) to the tokenizer where missing.

        Args:
            config: The model's `AdaptiveLlavaConfig`.
            tokenizer: The language model's; changed in place.
            image_processor: By default a plain resize to the tower's square input with the tower's normalisation.
            chat_template: `"vicuna"`, `"chatml"` or Jinja source.
            options: Further constructor arguments, such as `layout`.

        Raises:
            ValueError: `config.image_token_id` is another token of the tokenizer, or the tower does not tell its
                input size and no `image_processor` is given.
        """
        add_placeholder(tokenizer, options.get("image_token", "<image>"), config.image_token_id)
        return cls(
            image_processor if image_processor is not None else square_image_processor(config.vision_config),
            tokenizer,
            chat_template=chat_template,
            compressor=config.compressor,
            router=config.router,
            grid=config.vision_grid,
            tiling=config.tiling,
            code_repository=getattr(config, "code_repository", None),
            **options,
        )

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder token."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def model_input_names(self) -> list[str]:
        """Keys that a call returns unless more are asked for."""
        return list(INPUT_NAMES)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        visual_token_budget: int | Sequence[int] | Mapping[str, int] | str | None = None,
        visual_rungs: Sequence[int] | None = None,
        allow_urls: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for prompts with any number of images each.

        Args:
            images: PIL images, arrays, tensors, paths or bytes: one, a flat list that is dealt out in the order of
                the placeholders, or a list with one list (or `None`) per prompt.
            text: A prompt or a list of prompts; each literal `<image>` is the placeholder of one image, and where
                videos are given each `<video>` that of one video.
            videos: Video files, folders of images, arrays `(frames, height, width, 3)` or lists of images: one, a flat
                list, or a list per prompt. Every frame becomes an image of its own: `<video>` becomes one `<image>`
                per frame, and budgets and rungs count frames as images.
            visual_token_budget: Handed on to the model: tokens per image, a list with one number per image, or
                `{"ceiling": n}`. With the expanded layout it becomes the `visual_rungs` it stands for.
            visual_rungs: Exact replay of counts, one rung per view (without AnyRes: per image), for the model.
            allow_urls: Fetch images given as `http(s)` addresses.
            kwargs: Options of the tokenizer (`padding`, `padding_side`, `truncation`, ...), of the image processor,
                and `return_tensors`; flat, or in `text_kwargs`, `images_kwargs` and `videos_kwargs`. And of ours:
                `layout`: `"compact"` or `"expanded"` for this call.
                `num_frames`: Frames per video, the middles of equal segments; by default 8 of a file, and all of a
                list, array or folder. `fps`: Frames per second of a video file, in place of `num_frames`.
                `return_mm_token_type_ids=False`: Leave out `mm_token_type_ids`.
                `return_text_replacement_offsets`: Add `text_replacement_offsets`, as transformers 5 does: per row and
                image where its placeholder stood (`"span"`, in characters) and where what replaced it stands
                (`"new_span"`).

        Raises:
            ValueError: Images and placeholders of a row disagree, truncation would cut placeholders, an image is
                unreadable, or the expanded layout is asked for while only the router knows the count.
        """
        if kwargs.pop("audio", None) is not None:
            raise ValueError("`audio` was given, but this model reads images and videos only. Leave it out.")
        if images is None and text is None and videos is None:
            raise ValueError("`images` and `text` are both missing. Pass at least one of them.")
        own = _own_options(kwargs)
        options = self._merge_kwargs(
            AdaptiveLlavaProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        text_kwargs, images_kwargs = options["text_kwargs"], options["images_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None) or images_kwargs.pop("return_tensors", None)

        texts = None if text is None else _check_texts(text)
        media = media_of_prompts(texts, self.image_token, images, videos, FrameSampling(own["num_frames"], own["fps"]))
        sources, rows = media.sources, media.per_prompt
        data_format = images_kwargs.pop("input_data_format", None)
        loaded = load_images(sources, allow_urls=bool(allow_urls), input_data_format=data_format)
        sizes = [
            FRAME_SIZE if frame and self.tiling["type"] == "anyres" else (image.height, image.width)
            for image, frame in zip(loaded, media.frames, strict=True)
        ]
        cuts = cut_images(self.tiling, sizes, in_company(self.tiling, rows))
        expanded = _check_layout(own["layout"] or self.layout) == "expanded"
        decision = (visual_token_budget, visual_rungs, rows)
        counts, rungs = self._counts_known_beforehand(cuts, *decision)
        undecided = expanded and bool(sources) and counts is None
        if undecided and texts is not None and not self._routes_by_pixels:
            raise ValueError(
                f"`layout='expanded'` needs every image's token count before the model runs, but the "
                f"{(self.router or {}).get('type')!r} router decides inside it (`visual_token_budget="
                f"{visual_token_budget!r}`). Pass `visual_rungs`, a whole-number budget, or `layout='compact'`."
            )
        seen: dict[str, Any] = {}
        if sources:
            pixels = image_pixels(self.image_processor, loaded, cuts, self.tiling, images_kwargs, return_tensors)
            # sizes are tuples: TRL's GRPO takes a list of lists for a per-token key and pads it
            seen = {"pixel_values": pixels, "image_sizes": sizes}
        if undecided and self._routes_by_pixels:
            counts, rungs = self._counts_known_beforehand(cuts, *decision, seen["pixel_values"])
        data: dict[str, Any] = {}
        if texts is not None:
            placeholders = counts if expanded else None
            data |= encode_prompts(self.tokenizer, texts, media, placeholders, self.image_token, text_kwargs)
            if own["return_mm_token_type_ids"] is not False:
                data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        offsets = data.pop("text_replacement_offsets", None)
        data |= seen
        chosen_here = undecided or (expanded and visual_token_budget not in (None, "auto"))
        if sources and rungs is not None and (visual_rungs is not None or chosen_here):
            data["visual_rungs"] = rungs
        output = BatchFeature(data, tensor_type=return_tensors)
        if sources and visual_token_budget is not None and "visual_rungs" not in output:
            output["visual_token_budget"] = visual_token_budget
        if own["return_text_replacement_offsets"] and offsets is not None:
            output["text_replacement_offsets"] = offsets
        return output

    def create_mm_token_type_ids(self, input_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """1 at image placeholders, 0 elsewhere, `(batch, length)`."""
        image_token_id = self.image_token_id
        return [[int(token == image_token_id) for token in row] for row in input_ids]

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs: Any,
    ) -> Any:
        """A chat (or a batch of chats) as prompt text, or as model inputs with its images.

        Args:
            conversation: A list of messages, or a list of such lists. Content is a string or a list of text and
                image parts; an image stands where its part stands.
            chat_template: Name or Jinja source, in place of the processor's own.
            tokenize: Return model inputs (all of them with `return_dict=True`, else the ids).
            return_assistant_tokens_mask: Add `assistant_masks (B, L)`, 1 on what the assistant says.
            processor_kwargs: Options of `__call__`; they may also be given directly, as in transformers 4.
            sanitize_control_tokens: Write `<image>`, `</s>` and other control tokens found in text parts as ordinary
                text. In the returned prompt an invisible mark (U+FDD0) keeps them apart; a call of the processor
                on that prompt takes it out again. Pass false only for text you wrote yourself.
            kwargs: Variables of the template.
        """
        template = chosen_template(self.chat_template, chat_template)
        call_options = {**{key: kwargs.pop(key) for key in list(kwargs) if key in _PROCESSOR_KWARGS}}
        call_options |= processor_kwargs or {}
        first = conversation[0] if isinstance(conversation, Sequence) and len(conversation) else None
        batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        chats = [getattr(chat, "messages", chat) for chat in (conversation if batched else [conversation])]
        for chat in chats or [None]:
            check_messages(chat)
        control_tokens = control_token_pattern(self._control_tokens(chats)) if sanitize_control_tokens else None
        normalised = [normalise_messages(chat, control_tokens) for chat in chats]

        placeholders = {"image_token": self.image_token, "video_token": VIDEO_TOKEN}
        prompts, assistant_spans = render_jinja_template(
            conversations=[messages for messages, _, _ in normalised],
            tools=tools,
            documents=documents,
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{**self.tokenizer.special_tokens_map, **placeholders, **kwargs},
        )
        if not tokenize:
            return prompts if batched else prompts[0]
        bos_token = self.tokenizer.bos_token
        if bos_token is not None and prompts[0].startswith(bos_token):
            call_options["add_special_tokens"] = False
        tensor_type = call_options.pop("return_tensors", None) if return_tensors in (None, "auto") else return_tensors
        if return_assistant_tokens_mask:
            call_options["return_offsets_mapping"] = True
        images = call_options.pop("images", None) or [chat_images for _, chat_images, _ in normalised]
        videos = call_options.pop("videos", None) or [chat_videos for _, _, chat_videos in normalised]
        output = self(images=images, text=prompts, videos=videos, **call_options, return_tensors=tensor_type)
        if return_assistant_tokens_mask:
            offsets = output.pop("offset_mapping")
            masks = [span_mask(row, spans) for row, spans in zip(offsets, assistant_spans, strict=True)]
            output["assistant_masks"] = BatchFeature({"masks": masks}, tensor_type=tensor_type)["masks"]
        return output if return_dict else output["input_ids"]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write the processor, the tokenizer and the remote code, so that transformers 4.57 and 5 can load them."""
        hub_options = {key: kwargs.pop(key) for key in ("repo_id", "commit_message") if key in kwargs}
        files = super().save_pretrained(str(save_directory), **kwargs)
        make_tokenizer_config_portable(Path(save_directory) / "tokenizer_config.json")
        if self.code_repository is None:
            copy_code(save_directory)
        if push_to_hub:  # only now: what is uploaded must have the two steps above
            self.push_to_hub(hub_options.pop("repo_id", Path(save_directory).name), **hub_options, **kwargs)
        return files

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Options for `processor_config.json`, with the reference to the remote code."""
        output = super().to_dict(*args, **kwargs)
        return output | {"auto_map": {"AutoProcessor": auto_map(self.code_repository)["AutoProcessor"]}}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Nothing to do: `save_pretrained` writes the code itself."""

    def _control_tokens(self, chats: Sequence[Any]) -> set[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | {self.image_token}
        if any(holds_video(message) for chat in chats for message in chat):
            special.add(VIDEO_TOKEN)  # elsewhere it is a word like any other
        return special | set(self.tokenizer.all_special_tokens)


def _own_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    # taken out of a call's options, given flat or nested; `None` where they are not given
    found = {}
    for name, group in _OWN_OPTIONS.items():
        nested = kwargs.get(group)
        if nested and name in nested:
            kwargs[group] = {key: value for key, value in nested.items() if key != name}
            found[name] = nested[name]
        found[name] = kwargs.pop(name, found.get(name))
    return found


def _check_grid(grid: Any) -> None:
    listed = isinstance(grid, (list, tuple)) and len(grid) == 2
    if not listed or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in grid):
        raise ValueError(
            f"`grid={grid!r}` must be patches per side of an image, [height, width] in whole numbers >= 1."
        )


def _check_layout(layout: str) -> str:
    if layout not in LAYOUTS:
        raise ValueError(f"`layout={layout!r}` is unknown. Pass one of: {', '.join(LAYOUTS)}.")
    return layout


def _check_texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Sequence) else []
    if not texts or not all(isinstance(prompt, str) for prompt in texts):
        raise ValueError(f"`text` must be a string or a non-empty list of strings, got {text!r:.80}.")
    for row, prompt in enumerate(texts):
        check_encodable(prompt, f"Row {row} of `text`")
    return texts
