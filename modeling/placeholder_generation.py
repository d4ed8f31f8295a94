"""Generation over expanded rows, with compact rows outside.

`generate` encodes the images once, writes one placeholder per visual token into the prompt, hands the visual tokens to
the ordinary loop as `prefix_embeds` with absolute `prefix_positions`, and gives back prompt + new ids as they came in.
Because positions are absolute, beams, static caches, chunked prefill, assisted and prompt-lookup decoding need nothing
of their own. With modality pre-fusion the text of a prompt is no longer what its ids say: then the prefix is the whole
prompt, and new ids are embedded as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMixin

from .placeholder_layout import PlaceholderLayout, build_layout
from .visual_tokens import check_no_images


class CompactRows:
    """Shows a caller's own processor, criterion, streamer or callback the rows as they know them.

    Args:
        prompt: Prompt ids as they were given, `(B, L)`; of a prompt of embeddings alone, `(B, 0)`.
        expanded_length: Length of the expanded prompt, in slots.
    """

    def __init__(self, prompt: Tensor, expanded_length: int):
        self.prompt = prompt
        self.expanded_length = expanded_length

    def rows(self, sequences: Tensor) -> Tensor:
        """Expanded sequences `(B * n, T)` -> prompt + new ids `(B * n, L + new)`."""
        repeats = sequences.shape[0] // self.prompt.shape[0]
        prompt = self.prompt.to(sequences.device).repeat_interleave(repeats, dim=0)
        return torch.cat([prompt, sequences[:, self.expanded_length :]], dim=1)

    def wrap_prefix_function(self, function: Callable, repeats: int) -> Callable:
        """A `prefix_allowed_tokens_fn` that gets compact ids; `repeats` rows are counted for each prompt."""
        return lambda row, ids: function(
            row, torch.cat([self.prompt[row // repeats].to(ids.device), ids[self.expanded_length :]])
        )


class CompactStreamer:
    """Passes a streamer the compact prompt, then every new token.

    Args:
        streamer: The caller's streamer.
        rows: The rows of this generation.
    """

    def __init__(self, streamer: Any, rows: CompactRows):
        self.streamer = streamer
        self.rows = rows
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        self.streamer.put(value if self.prompt_seen else self.rows.prompt.cpu())
        self.prompt_seen = True

    def end(self) -> None:
        self.streamer.end()


class PlaceholderGenerationMixin(GenerationMixin):
    """`generate` for models whose forward takes `prefix_embeds` and `prefix_positions`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        encoded_images: Any = None,
        inputs_embeds: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        visual_token_budget: Any = None,
        visual_rungs: Any = None,
        max_expanded_length: int | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate from text and images; same arguments and results as every `transformers` model, and:

        Args:
            input_ids: `(B, L)`, compact (one placeholder per image) or expanded (one per visual token).
            pixel_values: `(num_images, 3, height, width)`; with tiling `(num_images, views, 3, height, width)`.
            image_sizes: Original heights and widths, `(num_images, 2)`; only AnyRes needs them.
            encoded_images: Result of `encode_images` in place of `pixel_values`.
            inputs_embeds: Embeddings of the prompt, `(B, L, text_dim)`, those of the placeholders included. Without
                `input_ids` only the new ids come back.
            instruction_mask: Text that pre-fusion takes in, `(B, L)`; the whole prompt by default.
            visual_token_budget: `None`/`"auto"`, tokens per image, a list, `{"ceiling": n}` or `{"total": n}`.
            visual_rungs: One rung per view (without AnyRes: per image), replayed exactly.
            max_expanded_length: Bound on the cache in slots; `max_length` counts ids as they come in and go out.
                Alone, it also stands in for the default of 20 new ids.

        Returns:
            Prompt + new ids, `(B * num_return_sequences, L + new)`. With `return_dict_in_generate`, the output also
            carries `num_visual_tokens`, `visual_rungs` and `visual_router_scores`; its cache, attentions and hidden
            states are those of the expanded rows.

        Raises:
            ValueError: Images and placeholders disagree, a budget or length does not fit, or `assistant_early_exit`.
        """
        input_ids = inputs if input_ids is None else input_ids
        if kwargs.get("assistant_early_exit") is not None:
            raise ValueError(
                f"`assistant_early_exit={kwargs['assistant_early_exit']!r}` leaves the layers of a model early, which "
                "transformers cannot do where the language model is a part of it. Pass `assistant_model` or "
                "`prompt_lookup_num_tokens`."
            )
        config = generation_config if generation_config is not None else self.generation_config
        kwargs.pop("mm_token_type_ids", None)
        if "tokenizer" in kwargs:  # for stop strings; `transformers serve` hands the processor over
            kwargs["tokenizer"] = getattr(kwargs["tokenizer"], "tokenizer", kwargs["tokenizer"])
        # the model never writes a placeholder
        suppressed = kwargs.get("suppress_tokens", config.suppress_tokens) or []
        kwargs["suppress_tokens"] = sorted({*suppressed, self.config.image_token_id})
        if pixel_values is not None and len(pixel_values) == 0:
            pixel_values = None
        if pixel_values is None and encoded_images is None:
            check_no_images(visual_token_budget, visual_rungs)
            if input_ids is not None and not config.is_assistant:
                _check_no_placeholders(input_ids, self.config.image_token_id)
            if max_expanded_length is not None:
                given = input_ids if input_ids is not None else inputs_embeds
                kwargs |= _expanded_lengths(config, kwargs, given.shape[1], 0, max_expanded_length)
            if inputs_embeds is not None:
                kwargs["inputs_embeds"] = inputs_embeds
            return super().generate(
                input_ids,
                generation_config=generation_config,
                attention_mask=attention_mask,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                streamer=streamer,
                **kwargs,
            )
        if input_ids is None and inputs_embeds is None:
            raise ValueError("`input_ids` is missing: images need a prompt. Pass one with their placeholders.")
        prompt = input_ids if input_ids is not None else torch.zeros(len(inputs_embeds), 0, dtype=torch.long)
        if input_ids is None:
            input_ids = self.model.ids_of_embeddings(inputs_embeds)
        elif inputs_embeds is not None and inputs_embeds.shape[:2] != input_ids.shape:
            raise ValueError(
                f"`inputs_embeds` has shape {tuple(inputs_embeds.shape)} and `input_ids` {tuple(input_ids.shape)}. "
                "With images, pass embeddings of exactly these ids, or leave `input_ids` out."
            )

        pad_token_id = kwargs.get("pad_token_id", config.pad_token_id)
        if attention_mask is None:
            attention_mask = _infer_mask(input_ids, pad_token_id, kwargs.get("eos_token_id", config.eos_token_id))
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)} and `input_ids` {tuple(input_ids.shape)}. "
                "To continue from a cache, pass the whole conversation with all its images and a mask of its length."
            )
        batch = self.model.encode_batch(
            input_ids,
            attention_mask,
            None,
            pixel_values,
            image_sizes,
            encoded_images=encoded_images,
            instruction_mask=instruction_mask,
            visual_token_budget=visual_token_budget,
            visual_rungs=visual_rungs,
        )
        encoded, compact = batch.encoded, batch.compact
        expanded, mask = batch.input_ids, batch.attention_mask
        # an expanded row is its own layout: every slot stays where it is, padding too
        lengths, layout_mask = (encoded.lengths, mask) if compact else ((1,) * len(encoded.values), None)
        layout = build_layout(expanded, layout_mask, None, lengths, self.config.image_token_id)
        cache = kwargs.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        if compact:
            _check_cached_rows(layout, cached)
            filling = _first_id(pad_token_id, config.eos_token_id)
            expanded = layout.expand_ids(expanded, self.config.image_token_id, filling)
            mask = layout.attention_mask if layout.attention_mask is not None else torch.ones_like(expanded)
        if self.config.prefusion_layers or inputs_embeds is not None:
            text = inputs_embeds if inputs_embeds is not None else self.get_input_embeddings()(input_ids)
            embeds, positions = layout.whole_prefix(
                *self.model.fuse_modalities(text, batch, cached=cached, slots=layout.aligned)
            )
        else:
            embeds, positions = layout.prefix(encoded.values)
        surplus = expanded.shape[1] - input_ids.shape[1]
        rows, differs = CompactRows(prompt, expanded.shape[1]), compact
        if prompt is not input_ids:  # nobody knows the ids: placeholders, which no processor can make the model write
            expanded, differs = torch.full_like(expanded, self.config.image_token_id), True
        if prefix_allowed_tokens_fn is not None and differs:
            beams, repeats = (
                kwargs.get(name) or getattr(config, name) or 1 for name in ("num_beams", "num_return_sequences")
            )
            prefix_allowed_tokens_fn = rows.wrap_prefix_function(
                prefix_allowed_tokens_fn, repeats if beams == 1 else 1
            )
        output = super().generate(
            expanded.to(input_ids.device, non_blocking=True),
            generation_config=generation_config,
            attention_mask=mask.to(input_ids.device, non_blocking=True),
            prefix_embeds=embeds,
            prefix_positions=positions,
            prefix_length=expanded.shape[1],
            logits_processor=_wrapped(LogitsProcessorList, logits_processor, rows, differs),
            stopping_criteria=_wrapped(StoppingCriteriaList, stopping_criteria, rows, differs),
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            streamer=CompactStreamer(streamer, rows) if streamer is not None and differs else streamer,
            **(kwargs | _expanded_lengths(config, kwargs, expanded.shape[1], surplus, max_expanded_length)),
        )
        if isinstance(output, Tensor):
            return rows.rows(output) if differs else output
        if differs:
            output.sequences = rows.rows(output.sequences)
        for name, value in encoded.counts().items():
            output[name] = value
        return output

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Continuous batching of prompts without images; arguments and results as in transformers 5.

        Raises:
            ValueError: A prompt has placeholders, or transformers is older.
        """
        rows = [row for row, ids in enumerate(inputs) if self.config.image_token_id in ids]
        if rows:
            raise ValueError(
                f"Rows {rows} of `inputs` have image placeholders, and continuous batching (`generate_batch`, or "
                "`cache_implementation='paged'`) hands over ids alone: the images would be missing. Use `generate`."
            )
        if "continuous_batching_config" not in inspect.signature(super().generate_batch).parameters:
            raise ValueError(
                "Continuous batching of a model that holds a language model needs transformers 5. Use `generate`."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        prefix_embeds: Tensor | None = None,
        prefix_positions: Tensor | None = None,
        prefix_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if prefix_embeds is not None and not hasattr(GenerationMixin, "_prepare_position_ids_for_generation"):
            # chunked prefill of 4.57 counts padding too; without these, positions are counted from the mask
            kwargs.pop("position_ids", None)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, *args, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if prefix_embeds is not None and cached < prefix_length:
            model_inputs |= {"prefix_embeds": prefix_embeds, "prefix_positions": prefix_positions}
        return model_inputs

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        # an assistant has its own widths: it drafts from the placeholders' embeddings, the model verifies
        if kwargs.get("assistant_model") is not None and kwargs.get("model_kwargs") is not None:
            kwargs["model_kwargs"] = {
                name: value for name, value in kwargs["model_kwargs"].items() if not name.startswith("prefix_")
            }
        return super()._get_candidate_generator(*args, **kwargs)


def _wrapped(kind: type, functions: Any, rows: CompactRows, differs: bool) -> Any:
    if functions is None or not differs:
        return functions
    functions = functions if isinstance(functions, list) else [functions]
    return kind([_Wrapped(function, rows) for function in functions])


class _Wrapped:
    # keeps the attributes of a processor or criterion, since generate looks at some of them
    def __init__(self, function: Callable, rows: CompactRows):
        self.function = function
        self.rows = rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # two parameters: transformers reads this signature, and takes more than two for arguments it must be given
        sequences, *rest = args
        return self.function(self.rows.rows(sequences), *rest, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)


def _expanded_lengths(
    config: GenerationConfig, kwargs: dict[str, Any], prompt: int, surplus: int, max_expanded_length: int | None
) -> dict[str, Any]:
    # `max_length` and `min_length` count ids outside; the loop counts slots
    lengths = {}
    for name in ("max_length", "min_length"):
        value = kwargs.get(name)
        if value is None and not _is_default(config, name):
            value = getattr(config, name)
        if value:
            lengths[name] = value + surplus
    new_tokens = kwargs.get("max_new_tokens", config.max_new_tokens)
    if new_tokens is not None:
        lengths.pop("max_length", None)
    if max_expanded_length is not None:
        if max_expanded_length <= prompt:
            raise ValueError(
                f"`max_expanded_length={max_expanded_length}` leaves no room after a prompt of {prompt} slots (text "
                "and visual tokens). Raise it, or lower `visual_token_budget`."
            )
        if new_tokens is not None:
            lengths["max_new_tokens"] = min(new_tokens, max_expanded_length - prompt)
        else:
            lengths["max_length"] = min(lengths.get("max_length", max_expanded_length), max_expanded_length)
    return lengths


def _is_default(config: GenerationConfig, name: str) -> bool:
    return getattr(config, name) == getattr(GenerationConfig(), name)


def _check_no_placeholders(input_ids: Tensor, image_token_id: int) -> None:
    per_row = (input_ids == image_token_id).sum(1).tolist()
    if any(per_row):
        raise ValueError(
            f"`input_ids` has {sum(per_row)} image placeholders (by row: {per_row}), but there are no images. Pass "
            "`pixel_values` or `encoded_images`, or take the placeholders out of the prompt."
        )


def _check_cached_rows(layout: PlaceholderLayout, cached: int) -> None:
    # all cached rows end at one id, and the whole rows must have it in the same slot
    if cached and not bool((layout.aligned == cached - 1).all(dim=0).any()):
        raise ValueError(
            f"`past_key_values` holds rows of {cached} slots that were padded otherwise than the whole conversation "
            "is now: its new images differ in visual tokens. Send the rows one by one, or without "
            "`past_key_values`."
        )


def _first_id(*candidates: Any) -> int:
    for candidate in candidates:
        if candidate is not None:
            return candidate[0] if isinstance(candidate, (list, tuple)) else int(candidate)
    return 0


def _infer_mask(input_ids: Tensor, pad_token_id: int | None, eos_token_id: Any) -> Tensor:
    # as transformers infers it: padding tells itself apart only if it is no end-of-sequence id
    ends = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    if pad_token_id is None or pad_token_id in ends:
        return torch.ones_like(input_ids)
    return (input_ids != pad_token_id).long()
