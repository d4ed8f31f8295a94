"""`generate` of any vision-language model, in the spirit of Hugging Face's own mixin, which is not distributed.

What is compared is what users rely on: every strategy, cache and form of input gives the ids that a plain loop over
`forward` gives. The names are those of Hugging Face's tests where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, set_seed

from tests.conftest import PAD
from tests.suites.generation_reference import (
    NEW,
    Collector,
    SeenByCriterion,
    SeenByProcessor,
    build_generator,
    first_row,
    greedy_by_forward,
    mean_log_probability,
    sampled,
)


class GenerationTesterMixin:
    """Tests of `generate`; the test case brings `model_tester` and `all_generative_model_classes`."""

    model_tester: Any
    all_generative_model_classes: Any
    has_attentions: bool

    def _models(self) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = build_generator(model_class, config)
            yield model, inputs

    def _text_models(self) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
        for model, inputs in self._models():
            words = slice(self.model_tester.placeholders, None)
            yield model, {name: inputs[name][:, words] for name in ("input_ids", "attention_mask")}

    def test_inherits_generation_mixin(self):
        for model, _ in self._models():
            assert isinstance(model, GenerationMixin)
            assert model.can_generate()

    # ---- strategies

    def test_greedy_generate(self):
        for model, inputs in self._models():
            output = model.generate(**inputs, max_new_tokens=NEW)
            assert torch.equal(output, greedy_by_forward(model, inputs))

    def test_greedy_generate_without_cache(self):
        for model, inputs in self._models():
            output = model.generate(**inputs, max_new_tokens=NEW, use_cache=False)
            assert torch.equal(output, greedy_by_forward(model, inputs))

    def test_greedy_generate_dict_outputs(self):
        self._check_dict_outputs(use_cache=False)

    def test_greedy_generate_dict_outputs_use_cache(self):
        self._check_dict_outputs(use_cache=True)

    def test_sample_generate(self):
        for model, inputs in self._models():
            first, second = (sampled(model, inputs, seed=seed) for seed in (0, 0))
            assert torch.equal(first, second)
            assert any(not torch.equal(first, sampled(model, inputs, seed=seed)) for seed in range(1, 5))
            nearest = sampled(model, inputs, seed=0, top_k=1)
            assert torch.equal(nearest, model.generate(**inputs, max_new_tokens=NEW))

    def test_sample_generate_dict_output(self):
        self._check_dict_outputs(use_cache=True, do_sample=True)

    def test_beam_search_generate(self):
        for model, inputs in self._models():
            output = model.generate(
                **inputs, max_new_tokens=NEW, num_beams=3, return_dict_in_generate=True, output_scores=True
            )
            expected = mean_log_probability(model, inputs, output.sequences)
            torch.testing.assert_close(output.sequences_scores, expected, atol=1e-3, rtol=1e-3)
            greedy = mean_log_probability(model, inputs, model.generate(**inputs, max_new_tokens=NEW))
            # beams may lose the greedy path, but not on average
            assert output.sequences_scores.mean() >= greedy.mean() - 1e-3

    def test_beam_search_generate_dict_output(self):
        self._check_dict_outputs(use_cache=False, num_beams=2)

    def test_beam_search_generate_dict_outputs_use_cache(self):
        self._check_dict_outputs(use_cache=True, num_beams=2)

    def test_beam_sample_generate(self):
        for model, inputs in self._models():
            output = sampled(model, inputs, seed=0, num_beams=2)
            assert output.shape == (len(inputs["input_ids"]), inputs["input_ids"].shape[1] + NEW)
            assert torch.equal(output[:, :-NEW], inputs["input_ids"])
            assert torch.equal(output, sampled(model, inputs, seed=0, num_beams=2))

    def test_beam_sample_generate_dict_output(self):
        self._check_dict_outputs(use_cache=True, num_beams=2, do_sample=True)

    def test_generate_num_return_sequences(self):
        for model, inputs in self._models():
            output = model.generate(**inputs, max_new_tokens=NEW, num_beams=3, num_return_sequences=3)
            best = model.generate(**inputs, max_new_tokens=NEW, num_beams=3)
            assert torch.equal(output[::3], best)
            set_seed(0)
            several = model.generate(**inputs, max_new_tokens=NEW, do_sample=True, num_return_sequences=2)
            assert torch.equal(several[:, :-NEW], inputs["input_ids"].repeat_interleave(2, dim=0))

    def test_assisted_decoding_matches_greedy_search(self):
        for model, inputs in self._models():
            rows = first_row(inputs)
            greedy = model.generate(**rows, max_new_tokens=NEW)
            model.generation_config.num_assistant_tokens = 2
            for seed in (0, 1):  # an assistant of the same weights, and one whose drafts are mostly refused
                config = self.model_tester.get_config()
                assistant = build_generator(type(model), config, seed=seed)
                assistant.generation_config.num_assistant_tokens = 2
                output = model.generate(**rows, max_new_tokens=NEW, assistant_model=assistant)
                assert torch.equal(output, greedy)

    def test_assisted_decoding_sample(self):
        for model, inputs in self._models():
            rows = first_row(inputs)
            assistant = build_generator(type(model), self.model_tester.get_config(), seed=1)
            output = sampled(model, rows, seed=0, assistant_model=assistant)
            assert output.shape[1] == rows["input_ids"].shape[1] + NEW
            assert torch.equal(output[:, :-NEW], rows["input_ids"])

    def test_prompt_lookup_decoding_matches_greedy_search(self):
        for model, inputs in self._models():
            rows = first_row(inputs)
            words = slice(self.model_tester.placeholders, None)
            # said twice, so that there is something to look up
            rows = {
                name: torch.cat([value, value[:, words]], dim=1) if value.dim() == 2 else value
                for name, value in rows.items()
            }
            never = model.config.image_token_id  # transformers 4 looks for an end in what it finds
            greedy = model.generate(**rows, max_new_tokens=NEW)
            output = model.generate(**rows, max_new_tokens=NEW, prompt_lookup_num_tokens=2, eos_token_id=never)
            assert torch.equal(output, greedy)

    # ---- rows

    def test_generate_rows_do_not_depend_on_batch(self):
        for model, inputs in self._models():
            together = model.generate(**inputs, max_new_tokens=NEW)
            for row in range(len(together)):
                alone = model.generate(
                    **{name: value[row : row + 1] for name, value in inputs.items()}, max_new_tokens=NEW
                )
                assert torch.equal(alone[0], together[row])

    def test_left_padding_compatibility(self):
        for model, inputs in self._models():
            padded = {
                "input_ids": torch.nn.functional.pad(inputs["input_ids"], (4, 0), value=PAD),
                "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (4, 0)),
            }
            with torch.no_grad():
                logits = model(**inputs).logits[:, -1]
                padded_logits = model(**(inputs | padded)).logits[:, -1]
            torch.testing.assert_close(padded_logits, logits, atol=1e-4, rtol=1e-4)
            output = model.generate(**inputs, max_new_tokens=NEW)
            assert torch.equal(model.generate(**(inputs | padded), max_new_tokens=NEW)[:, 4:], output)

    def test_generate_without_attention_mask(self):
        for model, inputs in self._models():
            without = {name: value for name, value in inputs.items() if name != "attention_mask"}
            expected = model.generate(**inputs, max_new_tokens=NEW)
            assert torch.equal(model.generate(**without, max_new_tokens=NEW), expected)

    def test_generate_without_images(self):
        for model, inputs in self._text_models():
            output = model.generate(**inputs, max_new_tokens=NEW)
            assert torch.equal(output, greedy_by_forward(model, inputs))

    def test_generate_without_input_ids(self):
        for model, _ in self._models():
            model.generation_config.bos_token_id = 1
            output = model.generate(max_new_tokens=NEW)
            assert output.shape == (1, 1 + NEW)
            assert torch.equal(output, model.generate(torch.tensor([[1]]), max_new_tokens=NEW))

    # ---- embeddings

    def test_generate_from_inputs_embeds_1_greedy(self):
        self._check_inputs_embeds(num_beams=1)

    def test_generate_from_inputs_embeds_2_beam_search(self):
        self._check_inputs_embeds(num_beams=2)

    def test_generate_from_random_inputs_embeds(self):
        for model, inputs in self._text_models():
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            noise = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
            first, second = (
                model.generate(inputs_embeds=rows, max_new_tokens=NEW) for rows in (embeds, embeds + noise)
            )
            assert first.shape == second.shape == (len(embeds), NEW)
            assert not torch.equal(first, second)

    def test_generate_from_inputs_embeds_with_images(self):
        for model, inputs in self._models():
            ids = inputs.pop("input_ids")
            embeds = model.get_input_embeddings()(ids)
            expected = model.generate(input_ids=ids, **inputs, max_new_tokens=NEW)
            both = model.generate(input_ids=ids, inputs_embeds=embeds, **inputs, max_new_tokens=NEW)
            assert torch.equal(both, expected)
            alone = model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=NEW)
            assert torch.equal(alone, expected[:, ids.shape[1] :])

    def test_generate_continue_from_inputs_embeds(self):
        for model, inputs in self._text_models():
            ids = inputs["input_ids"]
            embeds = model.get_input_embeddings()(ids)
            expected = model.generate(**inputs, max_new_tokens=4)[:, ids.shape[1] :]
            options = {"max_new_tokens": 2, "return_dict_in_generate": True}
            first = model.generate(inputs_embeds=embeds, **options)
            grown = torch.cat([embeds, model.get_input_embeddings()(first.sequences)], dim=1)
            second = model.generate(inputs_embeds=grown, past_key_values=first.past_key_values, **options)
            assert torch.equal(torch.cat([first.sequences, second.sequences], dim=1), expected)

    # ---- caches

    def test_past_key_values_format(self):
        for model, inputs in self._models():
            with torch.no_grad():
                cache = model(**inputs, use_cache=True).past_key_values
            text = model.config.get_text_config()
            heads, width = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
            assert cache.get_seq_length() >= inputs["input_ids"].shape[1]
            assert len(cache.layers) == text.num_hidden_layers
            shape = (len(inputs["input_ids"]), heads, cache.get_seq_length(), width)
            for layer in cache.layers:
                assert layer.keys.shape == layer.values.shape == shape

    def test_generate_continue_from_past_key_values(self):
        for model, inputs in self._models():
            expected = model.generate(**inputs, max_new_tokens=4)
            first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
            grown = inputs | {
                "input_ids": first.sequences,
                "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1),
            }
            if not self.model_tester.continues_with_images:
                del grown["pixel_values"]
            second = model.generate(
                **grown, past_key_values=first.past_key_values, max_new_tokens=2, return_dict_in_generate=True
            )
            assert torch.equal(second.sequences, expected)

    def test_generate_with_static_cache(self):
        for model, inputs in self._models():
            expected = model.generate(**inputs, max_new_tokens=NEW)
            output = model.generate(**inputs, max_new_tokens=NEW, cache_implementation="static", disable_compile=True)
            assert torch.equal(output, expected)

    def test_generate_with_given_cache(self):
        for model, inputs in self._models():
            expected = model.generate(**inputs, max_new_tokens=NEW)
            output = model.generate(**inputs, max_new_tokens=NEW, past_key_values=DynamicCache())
            assert torch.equal(output, expected)

    def test_generate_with_prefill_chunk_size(self):
        for model, inputs in self._models():
            expected = model.generate(**inputs, max_new_tokens=NEW)
            output = model.generate(**inputs, max_new_tokens=NEW, prefill_chunk_size=4)
            assert torch.equal(output, expected)

    def test_generate_methods_with_logits_to_keep(self):
        for model, inputs in self._models():
            expected = model.generate(**inputs, max_new_tokens=NEW)
            assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, logits_to_keep=0), expected)
            assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, logits_to_keep=1), expected)

    def test_eager_matches_sdpa_generate(self):
        for model, inputs in self._models():
            outputs = []
            for attention in ("eager", "sdpa"):
                model.set_attn_implementation(attention)
                outputs.append(model.generate(**inputs, max_new_tokens=NEW))
            assert torch.equal(*outputs)

    # ---- a caller's own parts

    def test_generate_streams_prompt_and_new_ids(self):
        for model, inputs in self._models():
            rows, streamer = first_row(inputs), Collector()
            output = model.generate(**rows, max_new_tokens=NEW, streamer=streamer)
            assert streamer.ended
            assert torch.equal(torch.cat(streamer.pieces), output[0])

    def test_generate_shows_prompt_and_new_ids_to_callers_parts(self):
        for model, inputs in self._models():
            processor, criterion, prompt = SeenByProcessor(), SeenByCriterion(), inputs["input_ids"]
            output = model.generate(
                **inputs, max_new_tokens=NEW, logits_processor=[processor], stopping_criteria=[criterion]
            )
            for step, ids in enumerate(processor.seen):
                assert torch.equal(ids, output[:, : prompt.shape[1] + step])
            for step, ids in enumerate(criterion.seen, start=1):
                assert torch.equal(ids, output[:, : prompt.shape[1] + step])

    def test_generate_with_prefix_allowed_tokens(self):
        for model, inputs in self._models():
            output = model.generate(**inputs, max_new_tokens=NEW, prefix_allowed_tokens_fn=lambda row, ids: [7 + row])
            rows = torch.arange(len(output)).unsqueeze(1)
            assert torch.equal(output[:, -NEW:], (7 + rows).expand(-1, NEW))

    def test_generate_stops_at_eos_and_pads(self):
        for model, inputs in self._models():
            free = model.generate(**inputs, max_new_tokens=NEW)[:, -NEW:]
            eos = int(free[0, 1])
            output = model.generate(**inputs, max_new_tokens=NEW, eos_token_id=eos)
            output = output[:, inputs["input_ids"].shape[1] :]
            for row, ids in zip(output.tolist(), free.tolist(), strict=True):
                end = ids.index(eos) + 1 if eos in ids else NEW
                assert row[:end] == ids[:end]
                assert set(row[end:]) <= {PAD}

    def test_generate_max_length_counts_prompt_and_new_ids(self):
        for model, inputs in self._models():
            length = inputs["input_ids"].shape[1] + 3
            output = model.generate(**inputs, max_length=length)
            assert torch.equal(output, model.generate(**inputs, max_new_tokens=3))

    # ---- shared

    def _check_inputs_embeds(self, num_beams: int) -> None:
        for model, inputs in self._text_models():
            ids = inputs["input_ids"]
            embeds = model.get_input_embeddings()(ids)
            options = {"max_new_tokens": NEW, "num_beams": num_beams}
            expected = model.generate(**inputs, **options)
            assert torch.equal(model.generate(**inputs, inputs_embeds=embeds, **options), expected)
            alone = model.generate(inputs_embeds=embeds, **options)
            assert torch.equal(alone, expected[:, ids.shape[1] :])

    def _check_dict_outputs(self, *, use_cache: bool, num_beams: int = 1, do_sample: bool = False) -> None:
        for model, inputs in self._models():
            if self.has_attentions:
                model.set_attn_implementation("eager")
            set_seed(0)
            output = model.generate(
                **inputs, max_new_tokens=NEW, use_cache=use_cache, num_beams=num_beams, do_sample=do_sample,
                return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True,
                output_attentions=True,
            )  # fmt: skip
            text, rows = model.config.get_text_config(), len(inputs["input_ids"]) * num_beams
            assert torch.equal(output.sequences[:, :-NEW], inputs["input_ids"])
            for values in (output.scores, output.logits):
                assert len(values) == NEW
                assert all(step.shape == (rows, text.vocab_size) for step in values)
            for values, per_step in (
                (output.attentions, text.num_hidden_layers),
                (output.hidden_states, text.num_hidden_layers + 1),
            ):
                assert len(values) == NEW
                assert all(len(step) == per_step for step in values)
                assert all(len(layer) == rows for step in values for layer in step)
            slots = output.attentions[0][0].shape[-1]
            assert slots >= inputs["input_ids"].shape[1]
            for step, layers in enumerate(output.attentions):
                queries = 1 if use_cache and step else slots + step
                assert all(layer.shape[-2:] == (queries, slots + step) for layer in layers)
            assert (getattr(output, "past_key_values", None) is not None) == use_cache
            if not do_sample and num_beams == 1:
                best = torch.stack([step.argmax(-1) for step in output.scores], dim=1)
                assert torch.equal(best, output.sequences[:, -NEW:])
