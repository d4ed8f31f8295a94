"""`generate` against a loop without a cache over the aligned forward pass, whatever the way of decoding."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from tests.conftest import (
    EOS,
    IMAGE_TOKEN,
    MODELS_HERE,
    PAD,
    batch_rows,
    tiny_images,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)
from tests.test_convert import character_tokenizer


pytestmark = pytest.mark.compat

IMG = IMAGE_TOKEN
NEW = 6
ROWS = [[5, IMG, 6, 7], [8, IMG, 9, 10, IMG, 11, 12], [13, 14, 15], [IMG, 16, 17]]
IMAGES_OF_ROW = [[0], [1, 2], [], [3]]
every_preset = pytest.mark.parametrize("preset", MODELS_HERE)
ragged_presets = pytest.mark.parametrize("preset", ["dfmr", "pre-fusion"])


@torch.no_grad()
def gold(
    model, row: list[int], pixels, new: int = NEW, eos: int | None = None, instruction: int | None = None, **decision
) -> list[int]:
    """Greedy ids by a plain loop: the whole row through `forward` for every id."""
    ids = list(row)
    prompt = len(row) if instruction is None else instruction  # what pre-fusion sees
    for _ in range(new):
        images = {"pixel_values": pixels, **decision} if len(pixels) else {}
        images["instruction_mask"] = torch.arange(len(ids)).unsqueeze(0) < prompt
        logits = model(input_ids=torch.tensor([ids]), use_cache=False, **images).logits[0, -1]
        logits[IMG] = -float("inf")
        ids.append(logits.argmax().item())
        if ids[-1] == eos:
            break
    return ids[len(row) :]


def gold_rows(model, pixels, new: int = NEW) -> list[list[int]]:
    return [gold(model, row, pixels[images], new) for row, images in zip(ROWS, IMAGES_OF_ROW, strict=True)]


@torch.no_grad()
def check_logits(model, output, inputs: dict, instruction: int | None = None) -> None:
    """Every step's raw logits against `forward` on each whole row alone; a wrong slot or position shows here."""
    new, counts = len(output.logits), (inputs["input_ids"] == IMG).sum(1).tolist()
    images, first = inputs.get("pixel_values"), 0
    for row, mask in enumerate(inputs["attention_mask"]):
        attended = torch.cat([mask.bool(), torch.ones(output.sequences.shape[1] - len(mask), dtype=torch.bool)])
        ids = output.sequences[row][attended].unsqueeze(0)
        mine = slice(first, first + counts[row])
        first = mine.stop
        given = {"pixel_values": images[mine]} if counts[row] else {}
        prompt = int(mask.sum()) if instruction is None else instruction
        given["instruction_mask"] = torch.arange(ids.shape[1]).unsqueeze(0) < prompt
        expected = model(input_ids=ids, use_cache=False, **given).logits[0, -new - 1 : -1]
        found = torch.stack([step[row] for step in output.logits])
        assert (found - expected).abs().max() <= 1e-4


RAW = {"return_dict_in_generate": True, "output_logits": True}


def inputs_of(rows=None, images: int = 4, side: str = "left") -> dict:
    ids, mask = batch_rows(ROWS if rows is None else rows, side)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": tiny_images(images)}


def expanded(inputs: dict, lengths) -> dict:
    counts = iter(lengths)
    rows = [
        [slot for token in ids[mask.bool()].tolist() for slot in [token] * (next(counts) if token == IMG else 1)]
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    ids, mask = batch_rows(rows, "left")
    return inputs | {"input_ids": ids, "attention_mask": mask}


def answers(output: torch.Tensor, inputs: dict) -> list[list[int]]:
    length = inputs["input_ids"].shape[1]
    repeats = output.shape[0] // inputs["input_ids"].shape[0]
    assert torch.equal(output[:, :length], inputs["input_ids"].repeat_interleave(repeats, 0))
    return output[:, length:].tolist()


class Recorder(LogitsProcessor):
    """Keeps the ids that a logits processor is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores


@every_preset
def test_greedy_answers_of_ragged_rows_equal_a_loop_without_a_cache(preset):
    model, inputs = tiny_model(preset), inputs_of()
    output = model.generate(**inputs, max_new_tokens=NEW, **RAW)
    assert answers(output.sequences, inputs) == gold_rows(model, inputs["pixel_values"])
    check_logits(model, output, inputs)


@ragged_presets
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_of_a_single_row_cuts_anywhere(chunk, preset):
    model = tiny_model(preset)
    inputs = inputs_of(ROWS[1:2], images=2)
    output = model.generate(**inputs, max_new_tokens=NEW, prefill_chunk_size=chunk, **RAW)
    assert answers(output.sequences, inputs) == [gold(model, ROWS[1], inputs["pixel_values"])]
    check_logits(model, output, inputs)


@pytest.mark.parametrize("row", [0, 1])
@ragged_presets
def test_a_model_that_drafts_for_itself_gives_the_greedy_answer(row, preset):
    model, drafts = tiny_model(preset), tiny_model(preset)
    for one in (model, drafts):
        one.generation_config.eos_token_id = EOS
    inputs = inputs_of([ROWS[row]], images=len(IMAGES_OF_ROW[row]))
    output = model.generate(**inputs, max_new_tokens=10, assistant_model=drafts, **RAW)
    assert answers(output.sequences, inputs) == [gold(model, ROWS[row], inputs["pixel_values"], 10, EOS)]
    check_logits(model, output, inputs)


def test_a_prompt_without_padding_needs_no_mask():
    model, inputs = tiny_model("dfmr"), inputs_of([[5, IMG, 6], [7, 8, IMG]], images=2)
    del inputs["attention_mask"]
    pixels = inputs["pixel_values"]
    expected = [gold(model, [5, IMG, 6], pixels[:1]), gold(model, [7, 8, IMG], pixels[1:])]
    assert answers(model.generate(**inputs, max_new_tokens=NEW), inputs) == expected


def test_padding_is_recognised_where_no_mask_is_given():
    model, inputs = tiny_model("dfmr"), inputs_of()
    output = model.generate(**(inputs | {"attention_mask": None}), max_new_tokens=NEW, **RAW)
    check_logits(model, output, inputs)


@pytest.mark.parametrize("ids", [{}, {"pad_token_id": EOS, "eos_token_id": EOS}])
def test_an_id_that_is_no_padding_stays_where_no_mask_is_given(ids):
    # no padding id is known, or it is the end-of-sequence id: transformers then attends everything
    model = tiny_model("dfmr")
    model.generation_config.pad_token_id = None
    for token in (PAD, EOS):
        row = [5, token, IMG, 6]
        inputs = {"input_ids": torch.tensor([row]), "pixel_values": tiny_images(1)}
        output = model.generate(**inputs, max_new_tokens=2, **ids, **RAW)
        check_logits(model, output, inputs | {"attention_mask": torch.ones(1, 4)})


@every_preset
def test_expanded_prompts_give_the_same_answers_behind_expanded_ids(preset):
    model, inputs = tiny_model(preset), inputs_of()
    encoded = model.encode_images(inputs["pixel_values"])
    wide = expanded(inputs, encoded.lengths)
    output = model.generate(**wide, visual_rungs=encoded.rungs, max_new_tokens=NEW, **RAW)
    assert answers(output.sequences, wide) == gold_rows(model, inputs["pixel_values"])
    output.sequences = torch.cat([inputs["input_ids"], output.sequences[:, -NEW:]], dim=1)
    check_logits(model, output, inputs)
    assert output.num_visual_tokens.tolist() == list(encoded.lengths)


def test_an_expanded_prompt_of_other_counts_is_refused():
    model, inputs = tiny_model("avg-pool"), inputs_of(ROWS[:1], images=1)
    with pytest.raises(ValueError, match=r"has 8 image placeholders \(by row: \[8\]\), but there are 1 images with 9"):
        model.generate(**expanded(inputs, [8]), max_new_tokens=1)


def llava_and_ours() -> tuple[LlavaForConditionalGeneration, AdaptiveLlavaForConditionalGeneration]:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tiny_vision_config(),
        text_config=tiny_text_config(),
        image_token_index=IMG,
        image_seq_length=36,
        tie_word_embeddings=False,
    )
    stock = LlavaForConditionalGeneration(config).eval()
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    stock.generation_config.eos_token_id = None
    stock.generation_config.pad_token_id = PAD
    return stock, AdaptiveLlavaForConditionalGeneration.from_llava(stock)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3, "top_k": 20},
    "repetition penalty": {"repetition_penalty": 1.5},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [[0, 3], [0, 1]], ids=["one image each", "one and two images"])
def test_answers_equal_those_of_llava_with_the_same_weights(mode, rows):
    stock, model = llava_and_ours()
    inputs = inputs_of([ROWS[row] for row in rows], images=sum(len(IMAGES_OF_ROW[row]) for row in rows))
    wide = expanded(inputs, [36] * 3)
    length = wide["input_ids"].shape[1]
    if rows == [0, 1] and mode not in ("repetition penalty", "no repeated pairs"):
        # transformers 4 mixes up the images of a prompt with two where it repeats rows: give it the spliced rows
        features = stock.get_image_features(pixel_values=wide.pop("pixel_values"))
        features = torch.cat(list(getattr(features, "pooler_output", features)))
        ids = wide.pop("input_ids")
        embeds = stock.get_input_embeddings()(ids)
        wide["inputs_embeds"] = embeds.masked_scatter((ids == IMG).unsqueeze(-1), features)
        length = 0
    torch.manual_seed(5)
    expected = stock.generate(**wide, max_new_tokens=8, suppress_tokens=[IMG], **MODES[mode])[:, length:]
    torch.manual_seed(5)
    found = model.generate(**inputs, max_new_tokens=8, **MODES[mode])
    assert answers(found, inputs) == expected.tolist()


@ragged_presets
def test_sampled_sequences_differ_and_follow_the_seed(preset):
    model, inputs = tiny_model(preset), inputs_of()
    options = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": NEW}
    torch.manual_seed(0)
    first = model.generate(**inputs, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, **options), first)
    assert len({tuple(answer) for answer in answers(first, inputs)}) > 4


@ragged_presets
def test_sampled_ids_come_with_the_log_probability_that_forward_gives_them(preset):
    model, inputs = tiny_model(preset), inputs_of()
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_k=0, max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True
    )
    found = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, NEW, dtype=torch.long)], dim=1)
    with torch.no_grad():
        logits = model(
            input_ids=output.sequences,
            attention_mask=mask,
            pixel_values=inputs["pixel_values"],
            instruction_mask=(torch.arange(mask.shape[1]) < mask.shape[1] - NEW).expand_as(mask),
        ).logits[:, -NEW - 1 : -1]
    logits[..., IMG] = -float("inf")
    expected = logits.log_softmax(-1).gather(2, output.sequences[:, -NEW:].unsqueeze(2)).squeeze(2)
    assert (found - expected).abs().max() <= 1e-4


def test_a_returned_dict_has_compact_sequences_and_what_was_decided():
    model, inputs = tiny_model("dfmr"), inputs_of()
    output = model.generate(
        **inputs,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert answers(output.sequences, inputs) == gold_rows(model, inputs["pixel_values"])
    encoded = model.encode_images(inputs["pixel_values"])
    assert output.num_visual_tokens.tolist() == list(encoded.lengths)
    assert output.visual_rungs.tolist() == list(encoded.rungs)
    assert torch.equal(output.visual_router_scores, encoded.scores)
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == NEW
    assert output.past_key_values.get_seq_length() > inputs["input_ids"].shape[1] + NEW
    beams = model.generate(**inputs, num_beams=3, max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True)
    assert beams.sequences_scores.shape == (4,)
    scores = model.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices)
    assert (scores.sum(1) / NEW - beams.sequences_scores).abs().max() <= 1e-4
    for row, images in enumerate(IMAGES_OF_ROW):
        ids = torch.cat([torch.tensor(ROWS[row]), beams.sequences[row, -NEW:]]).unsqueeze(0)
        pixels = {"pixel_values": inputs["pixel_values"][images]} if images else {}
        with torch.no_grad():
            log_probs = model(input_ids=ids, **pixels).logits[0, -NEW - 1 : -1].log_softmax(-1)
        # transformers leaves out suppressed ids after the probabilities are made
        expected = log_probs.gather(1, ids[0, -NEW:, None]).mean()
        assert abs(expected - beams.sequences_scores[row]) <= 1e-4


@pytest.mark.parametrize(
    ("decision", "counts"),
    [
        ({"visual_token_budget": 9}, [9, 9, 9, 9]),
        ({"visual_token_budget": [4, 36, 9, 4]}, [4, 36, 9, 4]),
        ({"visual_rungs": [2, 0, 1, 0]}, [36, 4, 9, 4]),
        ({"visual_rungs": torch.tensor([2, 0, 1, 0])}, [36, 4, 9, 4]),
    ],
)
def test_a_budget_or_replay_decides_the_answers(decision, counts):
    model, inputs = tiny_model("dfmr"), inputs_of()
    output = model.generate(**inputs, **decision, max_new_tokens=NEW, return_dict_in_generate=True)
    assert output.num_visual_tokens.tolist() == counts
    rungs = [{4: 0, 9: 1, 36: 2}[count] for count in counts]
    expected = [
        gold(model, row, inputs["pixel_values"][images], visual_rungs=[rungs[image] for image in images])
        for row, images in zip(ROWS, IMAGES_OF_ROW, strict=True)
    ]
    assert answers(output.sequences, inputs) == expected


def test_a_ceiling_and_a_total_hold_in_generate():
    model, inputs = tiny_model("dfmr"), inputs_of()
    free = model.encode_images(inputs["pixel_values"]).lengths
    options = {"max_new_tokens": 1, "return_dict_in_generate": True}
    capped = model.generate(**inputs, visual_token_budget={"ceiling": 9}, **options)
    assert capped.num_visual_tokens.tolist() == [min(count, 9) for count in free]
    shared = model.generate(**inputs, visual_token_budget={"total": 18}, **options).num_visual_tokens.tolist()
    assert shared == [9, 9, 9, 9]


@ragged_presets
def test_encoded_images_take_the_place_of_pixels(preset):
    model, inputs = tiny_model(preset), inputs_of()
    pixels = inputs.pop("pixel_values")
    encoded = model.encode_images(pixels)
    output = model.generate(**inputs, encoded_images=encoded, max_new_tokens=NEW)
    assert answers(output, inputs) == gold_rows(model, pixels)


# with pre-fusion an image changes the text before it, so that whole rows say something else
WITH_NEW_IMAGES = [name for name in MODELS_HERE if not tiny_model(name).config.prefusion_layers]


@pytest.mark.parametrize(
    ("preset", "images_in_turn_two"),
    [*((name, False) for name in MODELS_HERE), *((name, True) for name in WITH_NEW_IMAGES)],
)
def test_a_conversation_continues_on_its_cache(preset, images_in_turn_two):
    model = tiny_model(preset)
    pixels = tiny_images(2)
    first = {"input_ids": torch.tensor([[5, IMG, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    turn = model.generate(**first, pixel_values=pixels[:1], max_new_tokens=4, return_dict_in_generate=True)
    question = [20, IMG, 21] if images_in_turn_two else [20, 21]
    ids = torch.cat([turn.sequences, torch.tensor([question])], dim=1)
    now = pixels if images_in_turn_two else pixels[:1]
    expected = gold(model, ids[0].tolist(), now, instruction=3)  # what came first stays fused, all else is raw
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": now}
    assert turn.past_key_values.get_seq_length() > 3
    output = model.generate(**inputs, past_key_values=turn.past_key_values, max_new_tokens=NEW, **RAW)
    assert output.sequences[0, ids.shape[1] :].tolist() == expected
    check_logits(model, output, inputs, instruction=3)


@pytest.mark.parametrize("wide", [False, True])
def test_images_after_a_cache_are_fused_among_themselves(wide):
    # `generate` gets the whole conversation, `forward` only what is new; both fuse only what is new
    model, pixels = tiny_model("pre-fusion"), tiny_images(2)
    ids = torch.tensor([[5, IMG, 6, 7, IMG, 8]])
    with torch.no_grad():
        first = model(input_ids=ids[:, :3], pixel_values=pixels[:1], use_cache=True)
        cache = copy.deepcopy(first.past_key_values)
        expected = model(input_ids=ids[:, 3:], pixel_values=pixels[1:], past_key_values=cache).logits[:, -1]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if wide:
        inputs = expanded(inputs, model.encode_images(pixels).lengths)
        inputs["visual_rungs"] = model.encode_images(pixels).rungs
    output = model.generate(**inputs, past_key_values=first.past_key_values, max_new_tokens=1, **RAW)
    assert (output.logits[0] - expected).abs().max() <= 1e-4


def test_only_the_marked_part_of_a_prompt_is_fused():
    model, inputs = tiny_model("pre-fusion"), inputs_of(ROWS[1:2], images=2)
    mask = torch.arange(7).unsqueeze(0) < 4
    output = model.generate(**inputs, instruction_mask=mask, max_new_tokens=NEW, **RAW)
    assert answers(output.sequences, inputs) == [gold(model, ROWS[1], inputs["pixel_values"], instruction=4)]
    check_logits(model, output, inputs, instruction=4)
    whole = model.generate(**inputs, max_new_tokens=1, **RAW)
    assert (whole.logits[0] - output.logits[0]).abs().max() > 1e-2


def test_ragged_conversations_continue_on_their_cache():
    model, inputs = tiny_model("dfmr"), inputs_of()
    turn = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    questions = torch.tensor([[20 + row, 30 + row] for row in range(4)])
    ids = torch.cat([turn.sequences, questions], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 6, dtype=torch.long)], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": mask}
    output = model.generate(**inputs, past_key_values=turn.past_key_values, max_new_tokens=NEW, **RAW)
    check_logits(model, output, inputs)


def test_a_cache_whose_rows_can_no_longer_be_padded_as_they_were_is_refused():
    # the new images differ in length
    model, pixels = tiny_model("dfmr"), tiny_images(4)
    first = torch.tensor([[5, IMG, 6], [7, IMG, 8]])
    turn = model.generate(input_ids=first, pixel_values=pixels[[0, 3]], max_new_tokens=3, return_dict_in_generate=True)
    ids = torch.cat([turn.sequences, torch.tensor([[20, IMG], [21, IMG]])], dim=1)
    with pytest.raises(ValueError, match=r"`past_key_values` holds rows of \d+ slots .* one by one"):
        model.generate(
            input_ids=ids,
            pixel_values=pixels[[0, 3, 3, 0]],
            past_key_values=turn.past_key_values,
            max_new_tokens=NEW,
        )


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(99)} | {"<image>": IMG}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w3")


class RecordingStreamer(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("wide", [False, True])
def test_a_streamer_gets_the_prompt_as_it_came_in_and_then_every_new_id(wide):
    model, inputs = tiny_model("dfmr"), inputs_of(ROWS[:1], images=1)
    expected = gold(model, ROWS[0], inputs["pixel_values"])
    if wide:
        inputs = expanded(inputs, model.encode_images(inputs["pixel_values"]).lengths)
    streamer = RecordingStreamer()
    model.generate(**inputs, max_new_tokens=NEW, streamer=streamer)
    assert streamer.values == [inputs["input_ids"][0].tolist(), *[[token] for token in expected]]
    assert streamer.ended


def test_text_streamers_show_the_compact_prompt_once(capsys):
    model, inputs, tokenizer = tiny_model("dfmr"), inputs_of(ROWS[:1], images=1), word_tokenizer()
    answer = tokenizer.decode(gold(model, ROWS[0], inputs["pixel_values"]))
    model.generate(**inputs, max_new_tokens=NEW, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.split() == ["w5", "<image>", "w6", "w7", *answer.split()]
    model.generate(**inputs, max_new_tokens=NEW, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == answer.split()


def test_an_iterator_streamer_yields_the_answer_from_another_thread():
    model, inputs, tokenizer = tiny_model("dfmr"), inputs_of(ROWS[:1], images=1), word_tokenizer()
    answer = tokenizer.decode(gold(model, ROWS[0], inputs["pixel_values"]))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": NEW, "streamer": streamer})
    thread.start()
    assert "".join(streamer).split() == answer.split()
    thread.join()


def test_stop_strings_take_a_tokenizer_or_a_processor():
    model, inputs = tiny_model("dfmr"), inputs_of(ROWS[:1], images=1)
    processor = AdaptiveLlavaProcessor.from_config(model.config, character_tokenizer())
    length = inputs["input_ids"].shape[1]
    answer = processor.decode(model.generate(**inputs, max_new_tokens=NEW)[0, length:])
    for speaker in (processor, processor.tokenizer):
        ids = model.generate(**inputs, max_new_tokens=NEW, stop_strings=[answer[:2]], tokenizer=speaker)
        assert processor.decode(ids[0, length:]) == answer[:2] != answer


class StopAfter(StoppingCriteria):
    """Stops rows at a length, and keeps the ids it is shown."""

    def __init__(self, length: int):
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_callers_processor_and_criterion_see_compact_ids(options, listed):
    model, inputs = tiny_model("dfmr"), inputs_of()
    length = inputs["input_ids"].shape[1]
    processor, criterion = Recorder(), StopAfter(length + 3)
    output = model.generate(
        **inputs,
        max_new_tokens=NEW,
        logits_processor=LogitsProcessorList([processor]) if listed else [processor],
        stopping_criteria=StoppingCriteriaList([criterion]) if listed else [criterion],
        **options,
    )
    assert output.shape[1] == length + 3
    for seen in (processor.seen, criterion.seen):
        assert len(seen) >= 3
        for step, ids in enumerate(seen):
            repeats = ids.shape[0] // 4  # beam search keeps more candidates than beams
            assert torch.equal(ids[:, :length], inputs["input_ids"].repeat_interleave(repeats, 0))
            assert ids.shape[1] == length + step + (seen is criterion.seen)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
)
def test_a_callers_prefix_function_sees_the_compact_ids_of_its_row(options):
    model, inputs, calls = tiny_model("dfmr"), inputs_of(), []
    prompts = inputs["input_ids"].tolist()
    each = options.get("num_return_sequences", 1) if "num_beams" not in options else 1

    def allowed(row, ids):
        calls.append(row)
        assert ids[:7].tolist() == prompts[row // each]
        return [40 + row // each, 50 + row // each]

    output = model.generate(**inputs, max_new_tokens=3, prefix_allowed_tokens_fn=allowed, **options)
    repeats = output.shape[0] // 4
    for row, answer in enumerate(answers(output, inputs)):
        assert set(answer) <= {40 + row // repeats, 50 + row // repeats}
    assert set(calls) == set(range(4 * each))


def drawn_to_placeholder(rows, images: int):
    """A model whose most likely id after these rows is the placeholder."""
    model = tiny_model("dfmr")
    inputs = inputs_of(rows, images=images)
    if not images:
        del inputs["pixel_values"]
    with torch.no_grad():
        states = model.model(**inputs).last_hidden_state[:, -1]
        model.lm_head.weight[IMG] = 100 * states.mean(0)
        assert (model(**inputs).logits[:, -1].argmax(-1) == IMG).all()
    return model, inputs


@pytest.mark.parametrize("images", [1, 0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 8},
        {"do_sample": True, "top_k": 5, "temperature": 5.0},
        {"suppress_tokens": [3]},
        {"generation_config": GenerationConfig(do_sample=True, max_new_tokens=4, pad_token_id=PAD)},
    ],
)
def test_the_placeholder_is_never_generated(images, options):
    model, inputs = drawn_to_placeholder([[5, IMG, 6]] if images else [[5, 6]], images)
    options = copy.deepcopy(options)
    torch.manual_seed(0)
    output = model.generate(**inputs, **({} if "generation_config" in options else {"max_new_tokens": 4}), **options)
    new = torch.tensor(answers(output, inputs))
    assert new.shape[1] == 4
    assert not (new == IMG).any()
    assert not (new == 3).any() or "suppress_tokens" not in options
    assert model.generation_config.suppress_tokens is None


def test_tokens_suppressed_by_the_models_own_configuration_stay_suppressed():
    model, inputs = tiny_model("dfmr"), inputs_of()
    usual = {token for answer in answers(model.generate(**inputs, max_new_tokens=NEW), inputs) for token in answer}
    model.generation_config.suppress_tokens = sorted(usual)
    output = answers(model.generate(**inputs, max_new_tokens=NEW), inputs)
    assert not usual & {token for answer in output for token in answer}


def new_ids(model, inputs, **options) -> int:
    return model.generate(**inputs, **options).shape[1] - inputs["input_ids"].shape[1]


@pytest.mark.parametrize("wide", [False, True])
def test_lengths_count_ids_as_they_come_in(wide):
    model, inputs = tiny_model("avg-pool"), inputs_of()
    if wide:
        inputs = expanded(inputs, [9] * 4)
    length = inputs["input_ids"].shape[1]
    assert new_ids(model, inputs, max_length=length + 4) == 4
    assert new_ids(model, inputs, generation_config=GenerationConfig(max_length=length + 3, pad_token_id=PAD)) == 3
    assert new_ids(model, inputs, generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=PAD)) == 2
    model.generation_config.max_length = length + 5
    assert new_ids(model, inputs) == 5
    assert new_ids(model, inputs, max_new_tokens=2) == 2
    assert model.generation_config.max_length == length + 5


def test_without_any_length_images_leave_the_default_number_of_new_ids():
    model, inputs = tiny_model("avg-pool"), inputs_of()
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert new_ids(model, inputs) == new_ids(model, text) == 20


def test_a_length_that_the_prompt_already_has_is_refused():
    model, inputs = tiny_model("avg-pool"), inputs_of()
    with pytest.raises(ValueError, match=r"[Ii]nput length"):
        model.generate(**inputs, max_length=inputs["input_ids"].shape[1])


def drawn_to_the_end():
    """A model that ends at once, if it may."""
    model, inputs = tiny_model("avg-pool"), inputs_of(ROWS[:1], images=1)
    with torch.no_grad():
        model.lm_head.weight[EOS] = 100 * model.model(**inputs).last_hidden_state[0, -1]
    model.generation_config.eos_token_id = EOS
    assert new_ids(model, inputs, max_new_tokens=8) == 1
    return model, inputs


def test_a_minimum_length_counts_ids_as_they_come_in():
    model, inputs = drawn_to_the_end()
    length = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, max_new_tokens=8, min_length=length + 3)
    assert EOS not in output[0, length : length + 3].tolist() and output.shape[1] > length + 3
    output = model.generate(**inputs, max_new_tokens=8, min_new_tokens=3)
    assert EOS not in output[0, length : length + 3].tolist() and output.shape[1] > length + 3


def test_a_finished_row_is_filled_with_padding():
    model, _ = drawn_to_the_end()
    rows = [ROWS[0], ROWS[2]]
    both = inputs_of(rows, images=1)
    output = answers(model.generate(**both, max_new_tokens=NEW), both)
    expected = [gold(model, row, both["pixel_values"][: row.count(IMG)], eos=EOS) for row in rows]
    width = max(map(len, expected))
    assert output == [answer + [PAD] * (width - len(answer)) for answer in expected]


@pytest.mark.parametrize("images", [True, False])
def test_the_expanded_length_is_bounded(images):
    model = tiny_model("avg-pool")
    inputs = inputs_of(ROWS[:1] if images else ROWS[2:3], images=1)
    slots = 12 if images else 3
    if not images:
        del inputs["pixel_values"]
    assert new_ids(model, inputs, max_expanded_length=slots + 2, max_new_tokens=8) == 2
    assert new_ids(model, inputs, max_expanded_length=slots + 2, max_length=50) == 2
    assert new_ids(model, inputs, max_expanded_length=slots + 2) == 2
    assert new_ids(model, inputs, max_expanded_length=100, max_new_tokens=3) == 3
    with pytest.raises(
        ValueError, match=rf"`max_expanded_length={slots}` leaves no room after a prompt of {slots} slots"
    ):
        model.generate(**inputs, max_expanded_length=slots)


def test_a_generation_config_is_not_changed_by_a_call():
    model, inputs = tiny_model("avg-pool"), inputs_of()
    config = GenerationConfig(max_length=30, pad_token_id=PAD, suppress_tokens=[4])
    before = config.to_dict()
    model.generate(**inputs, generation_config=config)
    assert config.to_dict() == before


def test_inputs_may_be_given_by_position_and_with_type_ids():
    model, inputs = tiny_model("dfmr"), inputs_of()
    ids = inputs.pop("input_ids")
    kinds = (ids == IMG).long()
    output = model.generate(ids, **inputs, mm_token_type_ids=kinds, max_new_tokens=NEW)
    assert output[:, ids.shape[1] :].tolist() == gold_rows(model, inputs["pixel_values"])


def test_images_without_a_prompt_or_with_a_mask_of_another_length_are_refused():
    model, inputs = tiny_model("dfmr"), inputs_of()
    with pytest.raises(ValueError, match="`input_ids` is missing: images need a prompt"):
        model.generate(pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(4, 9\) and `input_ids` \(4, 7\)"):
        model.generate(**(inputs | {"attention_mask": torch.ones(4, 9)}), max_new_tokens=1)


def test_placeholders_without_images_are_refused_by_row():
    inputs = inputs_of()
    del inputs["pixel_values"]
    with pytest.raises(
        ValueError, match=r"has 4 image placeholders \(by row: \[1, 2, 0, 1\]\), but there are no images"
    ):
        tiny_model("dfmr").generate(**inputs, max_new_tokens=1)


def test_a_model_with_untrained_parts_says_so_when_it_generates(caplog):
    warning_once = transformers.utils.logging.warning_once
    model, inputs = tiny_model("dfmr", compressor_trained=False), inputs_of()
    warning_once.cache_clear()
    model.generate(**inputs, max_new_tokens=1)
    assert "was never trained" in caplog.text
    caplog.clear()
    model.generate(**inputs, max_new_tokens=1)
    assert "was never trained" not in caplog.text
    warning_once.cache_clear()
    model.config.compressor_trained = True
    model.generate(**inputs, max_new_tokens=1)
    assert "was never trained" not in caplog.text


@pytest.mark.parametrize("preset", ["dfmr", "pre-fusion"])
def test_embeddings_of_a_prompt_with_images_generate_what_its_ids_do(preset):
    model, pixels = tiny_model(preset), tiny_images(4)
    ids, mask = batch_rows(ROWS, "left")
    inputs = {"attention_mask": mask, "pixel_values": pixels, "max_new_tokens": NEW}
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **inputs)
    assert torch.equal(model.generate(ids, inputs_embeds=embeds, **inputs), expected)
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs), expected[:, ids.shape[1] :])
    changed = model.generate(ids, inputs_embeds=embeds.flip(-1).where((ids != IMG).unsqueeze(-1), embeds), **inputs)
    assert not torch.equal(changed, expected)
    with pytest.raises(ValueError, match="`inputs_embeds` has shape .* With images, pass embeddings of exactly these"):
        model.generate(ids, inputs_embeds=embeds[:, 1:], **inputs)


def test_processors_see_new_ids_alone_where_a_prompt_is_embeddings():
    model, seen = tiny_model("dfmr"), []

    def look(ids, scores):
        seen.append(ids.clone())
        return scores

    ids = torch.tensor([[5, IMG, 6]])
    embeds = model.get_input_embeddings()(ids)
    options = {"pixel_values": tiny_images(1), "max_new_tokens": 3}
    output = model.generate(inputs_embeds=embeds, logits_processor=[look], **options)
    assert [row.shape[1] for row in seen] == [0, 1, 2]
    assert torch.equal(seen[-1], output[:, :2])
    # ids that nobody knows are no repetition
    assert torch.equal(
        model.generate(inputs_embeds=embeds, repetition_penalty=5.0, **(options | {"max_new_tokens": 1})),
        output[:, :1],
    )
