"""What `generate` can do: every mode with every family of models, and LLaVA of transformers beside them.

A cell of the table is one test. A mode works if its answers are those of the same model without a cache; elsewhere the
error is tested that says why not. `python -m tests.generation_modes` writes the outcomes of both supported releases of
transformers to `results/generation_modes.json`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from adaptive_llava.training.quantised_loading import NOT_QUANTISED
from tests.conftest import (
    EOS,
    IMAGE_TOKEN,
    PAD,
    TINY_COMPRESSORS,
    batch_rows,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)
from tests.test_anyres_models import pixels_of
from tests.test_placeholder_generation import IMAGES_OF_ROW, ROWS, expanded, inputs_of, word_tokenizer


pytestmark = pytest.mark.compat

IMG = IMAGE_TOKEN
NEW = 5
STOCK = "LLaVA of transformers"
IS_5 = int(transformers.__version__.split(".")[0]) >= 5
SEQUENCE = {"type": "anyres", "view_layout": "sequence"}
# By what happens to an image; pooling is routed.
FAMILIES: dict[str, dict | None] = {
    STOCK: None,
    "identity": {"preset": "llava"},
    "pooling": {"preset": "dfmr"},
    "fused windows": {"preset": "stf-mbtf"},
    "resampler": {"preset": "dynamic-resampler"},
    "pre-fusion": {"preset": "pre-fusion"},
    "tiles": {"compressor": TINY_COMPRESSORS["average_pool"], "tiling": SEQUENCE},
}
OURS = [name for name in FAMILIES if name != STOCK]


@cache
def model_of(name: str, seed: int = 0, width: int = 32):
    """A model that stops at `EOS`, which `Family` keeps it from writing."""
    if name == STOCK:
        config = LlavaConfig(
            vision_config=tiny_vision_config(),
            text_config=tiny_text_config(hidden_size=width),
            image_token_index=IMG,
            image_seq_length=36,
            tie_word_embeddings=False,
        )
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
    else:
        model = tiny_model(seed=seed, text_options={"hidden_size": width}, **FAMILIES[name])
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model


@dataclass
class Family:
    """A model with four prompts of none, one and two images.

    Attributes:
        single: Only the prompt with two images, whose words come back so that a lookup finds something.
    """

    name: str
    model: Any
    single: bool = False

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [ROWS[1] + ROWS[1][-2:] * 2] if self.single else ROWS

    @cached_property
    def images_of_prompt(self) -> list[list[int]]:
        return IMAGES_OF_ROW[1:2] if self.single else IMAGES_OF_ROW

    @cached_property
    def images(self) -> dict[str, torch.Tensor]:
        if self.name != "tiles":
            return {"pixel_values": inputs_of()["pixel_values"]}
        pixels, sizes, _ = pixels_of(self.model.config.tiling, [(50, 37), (20, 80), (24, 24), (90, 31)])
        return {"pixel_values": pixels, "image_sizes": sizes}

    def inputs(self, prompts: list[int] | None = None) -> dict[str, torch.Tensor]:
        """Arguments of some prompts, by index; stock LLaVA wants a placeholder for each of 36 tokens."""
        prompts = list(range(len(self.prompts))) if prompts is None else prompts
        ids, mask = batch_rows([self.prompts[prompt] for prompt in prompts], "left")
        inputs = {"input_ids": ids, "attention_mask": mask}
        chosen = [image for prompt in prompts for image in self.images_of_prompt[prompt]]
        if chosen:
            inputs |= {name: value[chosen] for name, value in self.images.items()}
        return expanded(inputs, [36] * len(chosen)) if self.name == STOCK else inputs

    def generate(self, prompts: list[int] | None = None, **options: Any) -> list[list[int]]:
        inputs = self.inputs(prompts)
        written = [EOS, IMG] if self.name == STOCK else [EOS]
        output = self.model.generate(**inputs, max_new_tokens=NEW, suppress_tokens=written, **options)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    @torch.no_grad()
    def greedy(self, _: Mapping[str, Any] | None = None) -> list[list[int]]:
        """Answers, whatever the options, by a plain loop: the whole row through `forward` for every id."""
        answers = []
        for prompt in range(len(self.prompts)):
            inputs = self.inputs([prompt])
            length = inputs["input_ids"].shape[1]
            for new in range(NEW):
                instruction = torch.arange(length + new).unsqueeze(0) < length
                more = {} if self.name == STOCK else {"instruction_mask": instruction}
                logits = self.model(**inputs, **more, use_cache=False).logits[0, -1]
                logits[[EOS, IMG]] = -float("inf")
                inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax().view(1, 1)], dim=1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            answers.append(inputs["input_ids"][0, length:].tolist())
        return answers

    def rows_without_cache(self, options: Mapping[str, Any]) -> list[list[int]]:
        """Answers of each prompt alone with the same options, without a cache."""
        options = {name: value for name, value in options.items() if name != "cache_implementation"}
        alone = [self.generate([prompt], use_cache=False, **options) for prompt in range(len(self.prompts))]
        return [answer for answers in alone for answer in answers]

    def batch_without_cache(self, options: Mapping[str, Any]) -> list[list[int]]:
        """Answers of all prompts together with the same options and draws, without a cache."""
        torch.manual_seed(0)
        return self.generate(use_cache=False, **options)


@cache
def greedy_of_the_whole_model(name: str, single: bool) -> list[list[int]]:
    """Answers of a family as it is built, by `Family.greedy`."""
    return Family(name, model_of.__wrapped__(name), single).greedy()


@dataclass
class Mode:
    """One way to generate.

    Attributes:
        options: Of `generate`; a function makes those that need the family.
        against: A method of `Family` that gives the answers without a cache, if those of the whole model are others.
        attention: Attention implementation.
        width: Of the language model; layers of four bits are no narrower than 64.
        load: Loads the saved model in another way, from `(class, folder)`.
        needs: What this machine must have, and a test of it.
    """

    options: Mapping[str, Any] | Callable[[str], Mapping[str, Any]] = field(default_factory=dict)
    against: str | None = None
    width: int = 32
    single: bool = False
    attention: str | None = None
    load: Callable[[Any, Any], Any] | None = None
    needs: tuple[str, Callable[[], bool]] | None = None


def package(name: str, module: str | None = None) -> tuple[str, Callable[[], bool]]:
    return f"{name} is not installed", lambda: importlib.util.find_spec(module or name) is not None


ACCELERATOR = ("no accelerator", torch.cuda.is_available)


def text_model(words: int = 100):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_text_config(vocab_size=words)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The words of `word_tokenizer` under other ids, of which there are more."""
    words = {f"w{index}": (index * 7 + 5) % 110 for index in range(110)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w3")


def quantised(**bits: Any) -> Callable[[Any, Any], Any]:
    def load(kind: Any, folder: Any) -> Any:
        config = BitsAndBytesConfig(**bits, llm_int8_skip_modules=[*NOT_QUANTISED, "lm_head"])
        model = kind.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        assert any("bit" in type(part).__name__ for part in model.modules())
        return model

    return load


def half_on_disk(kind: Any, folder: Any) -> Any:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    model = kind.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=str(folder / "offload")
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    return model


NO_REMOTE = r"requires `trust_remote_code=True`"
BITSANDBYTES = package("bitsandbytes")
MODES: dict[str, Mode] = {
    "greedy": Mode(),
    "no cache": Mode({"use_cache": False}),
    "static cache": Mode({"cache_implementation": "static"}),
    "offloaded cache": Mode({"cache_implementation": "offloaded"}, needs=ACCELERATOR),
    "offloaded static cache": Mode({"cache_implementation": "offloaded_static"}, needs=ACCELERATOR),
    "cache quantised by quanto": Mode(
        {"cache_implementation": "quantized"}, needs=package("optimum-quanto", "optimum")
    ),
    "cache quantised by hqq": Mode(
        {"cache_implementation": "quantized", "cache_config": {"backend": "hqq"}}, needs=package("hqq")
    ),
    "chunked prefill": Mode({"prefill_chunk_size": 4}),
    "chunked prefill into a static cache": Mode({"prefill_chunk_size": 4, "cache_implementation": "static"}),
    "beams": Mode({"num_beams": 3}, against="rows_without_cache"),
    "beams on a static cache": Mode({"num_beams": 3, "cache_implementation": "static"}, against="rows_without_cache"),
    "beams, several returned": Mode({"num_beams": 4, "num_return_sequences": 3}, against="rows_without_cache"),
    "sampling, several returned": Mode(
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2}, against="batch_without_cache"
    ),
    "beam sampling": Mode({"do_sample": True, "num_beams": 3, "top_k": 20}, against="batch_without_cache"),
    "guidance": Mode({"guidance_scale": 1.5}, against="rows_without_cache"),
    "prompt lookup": Mode({"prompt_lookup_num_tokens": 3}, single=True),
    "prompt lookup of several prompts": Mode({"prompt_lookup_num_tokens": 3}),
    "prompt lookup on a static cache": Mode(
        {"prompt_lookup_num_tokens": 3, "cache_implementation": "static"}, single=True
    ),
    "assistant of the same class": Mode(lambda name: {"assistant_model": model_of(name, 3)}, single=True),
    "assistant that reads text": Mode(lambda _: {"assistant_model": text_model()}, single=True),
    "assistant with another tokenizer": Mode(
        lambda _: {
            "assistant_model": text_model(110),
            "tokenizer": word_tokenizer(),
            "assistant_tokenizer": other_tokenizer(),
        },
        single=True,
    ),
    "assistant of its own first layers": Mode({"assistant_early_exit": 1}, single=True),
    "group beams": Mode({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}),
    "contrastive search": Mode({"penalty_alpha": 0.6, "top_k": 4}),
    "DoLa": Mode({"dola_layers": "high"}),
    "constrained beams": Mode({"force_words_ids": [[5]], "num_beams": 3}),
    "continuous batching": Mode({"cache_implementation": "paged"}),
    "eager attention": Mode(attention="eager"),
    "flex attention": Mode(attention="flex_attention"),
    "flex attention on a static cache": Mode({"cache_implementation": "static"}, attention="flex_attention"),
    "flash attention 2": Mode(attention="flash_attention_2", needs=package("flash-attn", "flash_attn")),
    "flash attention 3": Mode(attention="flash_attention_3", needs=package("flash-attn-3", "flash_attn_interface")),
    "loaded in 4 bits": Mode(against="greedy", width=64, load=quantised(load_in_4bit=True), needs=BITSANDBYTES),
    "loaded in 8 bits": Mode(against="greedy", load=quantised(load_in_8bit=True), needs=BITSANDBYTES),
    "half of the weights on the disk": Mode(load=half_on_disk),
}
Refusals = dict[str, tuple[type[Exception], str]]
REFUSED: Refusals = {
    "prompt lookup of several prompts": (ValueError, "only supported for batch_size = 1"),
    "assistant of its own first layers": (ValueError, r"`assistant_early_exit=1` leaves the layers of a model early"),
    "group beams": (ValueError, NO_REMOTE),
    "contrastive search": (ValueError, NO_REMOTE),
    "DoLa": (ValueError, NO_REMOTE),
    "constrained beams": (ValueError, NO_REMOTE),
}
REFUSED_BY_4: Refusals = {"continuous batching": (ValueError, r"Invalid `cache_implementation` \(paged\)")}
REFUSED_BY_5: Refusals = {
    "continuous batching": (ValueError, r"Rows \[0, 1, 3\] of `inputs` have image placeholders.*Use `generate`"),
    "prompt lookup on a static cache": (ValueError, "not supported with Static cache"),
    "flex attention on a static cache": (AttributeError, "'BlockMask' object has no attribute 'contiguous'"),
}
REFUSED_BY_STOCK: Refusals = {"assistant of its own first layers": (AttributeError, "object has no attribute")}
REFUSED_BY_STOCK_4: Refusals = {
    "chunked prefill": (ValueError, "Image features and image tokens do not match"),
    "chunked prefill into a static cache": (ValueError, "Image features and image tokens do not match"),
    "assistant that reads text": (ValueError, r"`model_kwargs` are not used by the model: \['pixel_values'\]"),
    "assistant with another tokenizer": (ValueError, r"`model_kwargs` are not used by the model: \['pixel_values'\]"),
}
# The stock model of transformers 4 mixes up the images of a prompt with two where it repeats rows.
WRONG_IN_STOCK_4 = ("beams, several returned",)


def refusal(mode: str, name: str) -> tuple[type[Exception], str] | None:
    tables = [REFUSED, REFUSED_BY_5 if IS_5 else REFUSED_BY_4]
    if name == STOCK:
        tables += [REFUSED_BY_STOCK] + [REFUSED_BY_STOCK_4] * (not IS_5)
    return {mode: entry for table in tables for mode, entry in table.items()}.get(mode)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str, int], Any]:
    """Folder of a family's saved model."""

    @cache
    def save(name: str, width: int) -> Any:
        folder = tmp_path_factory.mktemp("saved")
        model_of(name, width=width).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def family(name: str, mode: str, saved) -> Any:
    """The family as a mode wants it; its attention is SDPA again afterwards."""
    wanted = MODES[mode]
    if wanted.needs and not wanted.needs[1]():
        pytest.skip(wanted.needs[0])
    if (mode, name, IS_5) == ("continuous batching", STOCK, True):
        pytest.skip("not tried: half a minute, and its images are not handed over")
    model = model_of(name, width=wanted.width)
    if wanted.load:
        model = wanted.load(type(model), saved(name, wanted.width)).eval()
    if not wanted.attention:
        yield Family(name, model, wanted.single)
        return
    model.set_attn_implementation(wanted.attention)
    # flex kernels are tried uncompiled: what torch 2.13 compiles for a CPU fails, under stock models too
    with torch.compiler.set_stance("force_eager"):
        yield Family(name, model, wanted.single)
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_answers_as_without_a_cache_or_says_why_not(mode, name, family, record_property):
    options = MODES[mode].options
    options = options(name) if callable(options) else options
    torch.manual_seed(0)
    if refused := refusal(mode, name):
        with pytest.raises(refused[0], match=refused[1]) as caught:
            family.generate(**options)
        record_property("outcome", f"refused: {type(caught.value).__name__}: {caught.value}")
        return
    found = family.generate(**options)
    against = MODES[mode].against
    expected = getattr(family, against)(options) if against else greedy_of_the_whole_model(name, family.single)
    wrong = name == STOCK and not IS_5 and mode in WRONG_IN_STOCK_4
    assert (found == expected) is not wrong, f"{found} and without a cache {expected}"
    record_property("outcome", "other answers than without a cache" if wrong else "works")


def test_only_known_modes_are_refused():
    for table in (REFUSED, REFUSED_BY_4, REFUSED_BY_5, REFUSED_BY_STOCK, REFUSED_BY_STOCK_4):
        assert set(table) <= set(MODES)


def test_the_written_table_has_a_cell_for_every_mode_and_family():
    told = json.loads((Path(__file__).parents[1] / "results" / "generation_modes.json").read_text())
    assert [release["versions"].split(".")[0] for release in told["releases"]] == ["transformers 5", "transformers 4"]
    for release in told["releases"]:
        assert {mode: list(cells) for mode, cells in release["modes"].items()} == {
            mode: list(FAMILIES) for mode in MODES
        }


def test_a_table_is_made_of_what_the_tests_said_and_of_no_failure(tmp_path):
    from tests.generation_modes import CELL, outcomes  # which imports this file

    report = tmp_path / "report.xml"
    case = '<testcase name="{}[one pre-mode-{}]">{}</testcase>'
    said = '<properties><property name="outcome" value="works"/></properties>'
    cells = [case.format(CELL, "pre-fusion", said), case.format(CELL, "tiles", '<skipped message="no moon"/>')]
    report.write_text(f"<testsuite>{''.join(cells)}</testsuite>")
    assert outcomes(report) == {"one pre-mode": {"pre-fusion": "works", "tiles": "not here: no moon"}}
    report.write_text(f"<testsuite>{case.format(CELL, 'tiles', said + '<failure/>')}</testsuite>")
    with pytest.raises(ValueError, match=r"one pre-mode-tiles\]` failed"):
        outcomes(report)
    report.write_text("<testsuite/>")
    with pytest.raises(ValueError, match=r"`report.xml` has no test of test_generation_modes.py"):
        outcomes(report)


@pytest.mark.skipif(IS_5, reason="transformers 5 batches text continuously")
def test_continuous_batching_says_that_it_needs_transformers_5():
    with pytest.raises(ValueError, match="needs transformers 5"):
        model_of("identity").generate_batch([[5, 6, 7]])


# ---- a model holds no state of a call


def turned(name: str, shift: int) -> Family:
    """The family with other images in its prompts."""
    family = Family(name, model_of(name))
    family.images = {part: value.roll(shift, 0) for part, value in family.images.items()}
    return family


def calls_of(name: str) -> list[Callable[[], tuple[list[list[int]], torch.Tensor]]]:
    """Four calls of one model with other images, budgets and ways; each gives new ids, and logits of the first."""
    model, images = model_of(name), turned(name, 0).images
    views = sum(model.encode_images(**images).views_per_image)
    least = max(model.encode_images(**images, visual_rungs=[0] * views).lengths)
    ways = [
        {"visual_token_budget": "auto"},
        {"visual_token_budget": {"ceiling": least}, "use_cache": False},
        {"visual_token_budget": {"total": 2 * least + 20}, "num_beams": 2},
        {"visual_token_budget": {"ceiling": least + 20}, "prefill_chunk_size": 4},
    ]
    told = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}

    def call(number: int) -> tuple[list[list[int]], torch.Tensor]:
        output = model.generate(**turned(name, number).inputs(), **told, **ways[number])
        return output.sequences[:, -NEW:].tolist(), output.logits[0]

    return [partial(call, number) for number in range(len(ways))]


@pytest.mark.parametrize("name", OURS)
def test_threads_that_generate_at_once_get_the_answers_of_one_after_the_other(name):
    calls = calls_of(name)
    alone = [call() for call in calls]
    for first, second in ((0, 1), (0, 3), (1, 3)):  # the images and budgets matter
        assert (alone[first][1] - alone[second][1]).abs().max() > 1e-2
    with ThreadPoolExecutor(len(calls)) as pool:
        together = list(pool.map(lambda call: call(), calls * 3))
    for number, (ids, logits) in enumerate(together):
        expected = alone[number % len(calls)]
        assert ids == expected[0]
        assert (logits - expected[1]).abs().max() <= 1e-4


def state_of(model) -> dict[str, Any]:
    """Every attribute of every module by identity, the bits of its tensors by their version, and both configs."""
    state: dict[str, Any] = {"config": model.config.to_json_string(), "generation": str(model.generation_config)}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            members = value.items() if isinstance(value, dict) else [("", value)]
            for key, member in members:
                version = member._version if isinstance(member, torch.Tensor) else None
                plain = isinstance(member, (bool, int, float, str, type(None)))
                state[f"{name}.{attribute}.{key}"] = (member if plain else id(member), version)
    return state


@pytest.mark.parametrize("name", OURS)
def test_forward_and_generate_leave_nothing_on_a_module(name):
    family = turned(name, 0)
    family.model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=1)  # transformers 5 hooks up outputs, once
    family.model(**family.inputs(), output_hidden_states=True)
    with torch.no_grad():
        # what depends on the count alone is computed once
        for count in family.model.config.visual_token_counts if name != "tiles" else ():
            family.model(**family.inputs(), visual_token_budget=count)
    before = state_of(family.model)
    for call in calls_of(name):
        call()
    with torch.no_grad():
        family.model(**turned(name, 1).inputs(), output_hidden_states=True)
    after = state_of(family.model)
    assert {key for key in before | after if before.get(key) != after.get(key)} == set()
