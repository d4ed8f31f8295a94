"""Every way a checkpoint is loaded, in a fresh process that really lacks (or really has) the package."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    Dinov2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MobileNetV2Config,
    PreTrainedTokenizerFast,
    ResNetConfig,
    pipeline,
)
from transformers.utils import is_torchvision_available

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.modeling.code_files import AUTO_MAP, MANIFEST_NAME, code_files, copy_code
from tests.conftest import (
    EOS,
    IMAGE_TOKEN,
    PAD,
    PRESETS_HERE,
    tiny_images,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)
from tests.fresh_process import run_without_package


pytestmark = pytest.mark.compat

IMG = IMAGE_TOKEN
ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[5, IMG, 6, 7, IMG, 8]])
IS_5 = int(transformers.__version__.split(".")[0]) >= 5
OTHER_PYTHON = os.environ.get("ADAPTIVE_LLAVA_OTHER_PYTHON")
with_the_other_transformers = pytest.mark.skipif(
    not OTHER_PYTHON, reason="set ADAPTIVE_LLAVA_OTHER_PYTHON to an interpreter with the other transformers release"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(99)} | {"<image>": IMG}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def picture(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def save_checkpoint(folder: Path, **options) -> Path:
    """A model and its processor, and beside them what they must still give after loading."""
    model = tiny_model(**({"preset": "dfmr"} | options))
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    processor = AdaptiveLlavaProcessor.from_config(model.config, word_tokenizer())
    processor.save_pretrained(folder)
    pixels = tiny_images(2)
    with torch.no_grad():
        logits = model(input_ids=IDS, pixel_values=pixels).logits
        states = model.model(input_ids=IDS, pixel_values=pixels).last_hidden_state
    answer = model.generate(input_ids=IDS, pixel_values=pixels, max_new_tokens=8)
    inputs = processor(images=picture(), text="w5 <image> w6", return_tensors="pt")
    save_file(
        {
            "ids": IDS,
            "pixels": pixels,
            "logits": logits,
            "states": states,
            "answer": answer,
            "processed_ids": inputs["input_ids"],
            "processed_pixels": inputs["pixel_values"],
        },
        folder / "expected.tensors",
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


# What runs in the fresh process: loads a folder through one Auto class and compares with what was kept beside it.
LOADER = r"""
import importlib.util, json, sys, warnings
warnings.filterwarnings("ignore")
folder, name, package, trust, resave = sys.argv[1:6]
if package == "present":
    import adaptive_llava
import torch, transformers
from safetensors.torch import load_file
torch.set_num_threads(1)
if name == "AutoModelForVision2Seq" and package == "present":
    auto = transformers.AutoModelForVision2Seq
else:
    auto = getattr(transformers, name)
options = {"trust_remote_code": True} if trust == "trust" else {}
loaded = auto.from_pretrained(folder, **options)
expected = load_file(folder + "/expected.tensors")
inputs = {"input_ids": expected["ids"], "pixel_values": expected["pixels"]}
report = {"class": type(loaded).__name__, "module": type(loaded).__module__, "version": transformers.__version__}
if name == "AutoConfig":
    report["counts"] = list(loaded.visual_token_counts)
elif name == "AutoProcessor":
    from PIL import Image
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8, generator=generator)
    found = loaded(images=Image.fromarray(pixels.numpy()), text="w5 <image> w6", return_tensors="pt")
    report["error"] = (found["pixel_values"] - expected["processed_pixels"]).abs().max().item()
    report["equal"] = found["input_ids"].tolist() == expected["processed_ids"].tolist()
else:
    with torch.no_grad():
        output = loaded(**inputs)
    key = "states" if name == "AutoModel" else "logits"
    found = output.last_hidden_state if name == "AutoModel" else output.logits
    report["error"] = (found - expected[key]).abs().max().item()
    report["equal"] = True
    if name != "AutoModel":
        answer = loaded.generate(**inputs, max_new_tokens=8)
        report["equal"] = answer.tolist() == expected["answer"].tolist()
if resave != "no":
    loaded.save_pretrained(resave)
print("REPORT " + json.dumps(report))
"""


def load_afresh(
    folder: Path,
    auto_class: str,
    cache: Path,
    *,
    package: str = "absent",
    trust: bool = True,
    python: str = sys.executable,
    resave: Path | None = None,
) -> dict:
    """Run `LOADER` in a new interpreter with an empty module cache."""
    arguments = [folder, auto_class, package, "trust" if trust else "no", resave or "no"]
    if package == "absent":
        output = run_without_package(LOADER, *arguments, folder=cache, python=python)
    else:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(cache)}
        command = [python, "-c", LOADER, *map(str, arguments)]
        output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("REPORT ")]
    return json.loads(line.removeprefix("REPORT "))


def check_report(report: dict, auto_class: str, error: float = 1e-5) -> None:
    assert report["class"] == AUTO_MAP[auto_class].split(".")[1]
    if auto_class == "AutoConfig":
        assert report["counts"] == [4, 9, 36]
    else:
        assert report["error"] <= error
        assert report["equal"]


def auto_classes_here() -> list[str]:
    missing = {"AutoModelForVision2Seq"} if IS_5 else {"AutoModelForMultimodalLM"}
    return [name for name in AUTO_MAP if name not in missing]


@pytest.mark.parametrize("auto_class", auto_classes_here())
def test_a_checkpoint_loads_as_remote_code_where_the_package_is_absent(auto_class, checkpoint, tmp_path):
    report = load_afresh(checkpoint, auto_class, tmp_path)
    check_report(report, auto_class)
    assert report["module"].startswith("transformers_modules.")


def test_pre_fusion_loads_as_remote_code_where_the_package_is_absent(tmp_path):
    folder = save_checkpoint(tmp_path / "tiny", preset="pre-fusion")
    check_report(load_afresh(folder, "AutoModelForImageTextToText", tmp_path), "AutoModelForImageTextToText")


@pytest.mark.parametrize("auto_class", [*auto_classes_here(), *(["AutoModelForVision2Seq"] if IS_5 else [])])
def test_an_installed_package_needs_no_trust(auto_class, checkpoint, tmp_path):
    report = load_afresh(checkpoint, auto_class, tmp_path, package="present", trust=False)
    check_report(report, auto_class)
    assert report["module"].startswith("adaptive_llava.")


@pytest.mark.parametrize("auto_class", ["AutoModelForImageTextToText", "AutoProcessor"])
def test_code_may_stand_in_a_repository_of_its_own(auto_class, tmp_path):
    code = tmp_path / "code"
    copy_code(code)
    folder = tmp_path / "weights"
    model = tiny_model("dfmr", code_repository=str(code))
    model.generation_config.eos_token_id = EOS
    save_checkpoint_with(model, folder)
    assert not list(folder.glob("*.py"))
    report = load_afresh(folder, auto_class, tmp_path)
    check_report(report, auto_class)
    assert report["module"].startswith("transformers_modules.code.") or ".code" in report["module"]


def save_checkpoint_with(model, folder: Path) -> None:
    # the weights of `tiny_model` depend on the seed alone, so what is expected is that of the same model without
    save_checkpoint(folder)
    for file in folder.iterdir():
        if file.name != "expected.tensors":
            file.unlink()
    model.save_pretrained(folder)
    AdaptiveLlavaProcessor.from_config(model.config, word_tokenizer()).save_pretrained(folder)


@with_the_other_transformers
@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoConfig"])
def test_the_other_transformers_release_gives_the_same_numbers(auto_class, checkpoint, tmp_path):
    report = load_afresh(checkpoint, auto_class, tmp_path, python=OTHER_PYTHON)
    # only one of the two environments has torchvision, whose resize differs from PIL's by a few of 255 levels
    other_reader = auto_class == "AutoProcessor" and is_torchvision_available()
    check_report(report, auto_class, 0.1 if other_reader else 1e-5)
    assert report["version"].split(".")[0] != transformers.__version__.split(".")[0]


# far from the default of 10000, and named as this release names it
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}} if IS_5 else {"rope_theta": 50.0}
LINEAR = {"rope_type": "linear", "factor": 3.0}
SCALED = {"rope_parameters": {"rope_theta": 50.0, **LINEAR}} if IS_5 else {"rope_theta": 50.0, "rope_scaling": LINEAR}


@with_the_other_transformers
@pytest.mark.parametrize(
    "options",
    [
        {"text": "llama", "vision": "siglip", "tie_word_embeddings": True},
        {"text": "qwen2", "tie_word_embeddings": True, "vision_feature_layer": [-2, -1]},
        {"text": "llama", "text_options": ROPE},
        {"text": "qwen2", "text_options": SCALED},
    ],
    ids=["siglip and tied llama", "tied qwen2 and two layers", "another rope base", "scaled rope"],
)
def test_tied_heads_and_rotary_bases_survive_the_other_transformers_release(options, tmp_path):
    folder = save_checkpoint(tmp_path / "tiny", **options)
    check_report(
        load_afresh(folder, "AutoModelForImageTextToText", tmp_path, python=OTHER_PYTHON),
        "AutoModelForImageTextToText",
    )


def test_a_model_loaded_as_remote_code_saves_its_code_and_map_again(checkpoint, tmp_path):
    again = tmp_path / "again"
    load_afresh(checkpoint, "AutoModelForImageTextToText", tmp_path, resave=again)
    load_afresh(checkpoint, "AutoProcessor", tmp_path, resave=again)
    names = {path.name for path in code_files()}
    assert {path.name for path in again.glob("*.py")} == names
    for name in names:
        assert (again / name).read_bytes() == (checkpoint / name).read_bytes()
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, again))
    assert first["auto_map"] == second["auto_map"] == AUTO_MAP
    assert json.loads((again / MANIFEST_NAME).read_text()) == json.loads((checkpoint / MANIFEST_NAME).read_text())
    (again / "expected.tensors").write_bytes((checkpoint / "expected.tensors").read_bytes())
    for auto_class in ("AutoModelForImageTextToText", "AutoProcessor"):
        check_report(load_afresh(again, auto_class, tmp_path), auto_class)


PIPELINE = r"""
import importlib.util, json, sys, warnings
warnings.filterwarnings("ignore")
import torch
from PIL import Image
from transformers import pipeline
torch.set_num_threads(1)
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
image = Image.fromarray(torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8, generator=generator).numpy())
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "w5 w6"}]}]
options = {"visual_token_budget": 9, "max_new_tokens": 4, "min_new_tokens": 4}
answers = pipe(text=chat, generate_kwargs=options, return_full_text=False)
print("REPORT " + json.dumps([answer["generated_text"] for answer in answers]))
"""


def chat_of(*parts) -> list[dict]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def piped(checkpoint):
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(checkpoint)
    processor = AdaptiveLlavaProcessor.from_pretrained(checkpoint)
    return pipeline("image-text-to-text", model=model, processor=processor)


def answer_directly(pipe, chat, **options) -> str:
    inputs = pipe.processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    output = pipe.model.generate(**inputs, **options)
    return pipe.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


LENGTHS = {"max_new_tokens": 4, "min_new_tokens": 4}


@pytest.mark.parametrize("budget", [None, 4, 9, 36, {"ceiling": 9}])
def test_the_pipeline_answers_a_chat_at_a_budget(piped, budget):
    chat = chat_of(picture(), "w5 w6")
    options = LENGTHS | ({} if budget is None else {"visual_token_budget": budget})
    (answer,) = piped(text=chat, generate_kwargs=options, return_full_text=False)
    assert answer["generated_text"].strip() == answer_directly(piped, chat, **options)


def test_the_pipeline_hands_a_budget_on_to_the_model(piped):
    with pytest.raises(ValueError, match=r"`visual_token_budget=3` is below the smallest count"):
        piped(text=chat_of(picture(), "w5"), generate_kwargs=LENGTHS | {"visual_token_budget": 3})


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_pipeline_answers_a_batch_of_chats_one_by_one_and_together(piped, batch_size):
    chats = [chat_of(picture(0), "w5 w6"), chat_of("w9", picture(1), "w7 w8 w9 w10"), chat_of(picture(2), "w5")]
    options = LENGTHS | {"visual_token_budget": 9}
    found = piped(text=chats, generate_kwargs=options, return_full_text=False, batch_size=batch_size)
    texts = [(answer[0] if isinstance(answer, list) else answer)["generated_text"].strip() for answer in found]
    assert texts == [answer_directly(piped, chat, **options) for chat in chats]


def test_the_pipeline_answers_text_alone(piped):
    chat = chat_of("w5 w6 w7")
    options = LENGTHS | {"visual_token_budget": 9}
    (answer,) = piped(text=chat, generate_kwargs=options, return_full_text=False)
    assert answer["generated_text"].strip() == answer_directly(piped, chat, **options)


def test_the_pipeline_runs_as_remote_code_where_the_package_is_absent(checkpoint, piped, tmp_path):
    output = run_without_package(PIPELINE, checkpoint, folder=tmp_path)
    (line,) = [line for line in output.splitlines() if line.startswith("REPORT ")]
    expected = answer_directly(piped, chat_of(picture(), "w5 w6"), visual_token_budget=9, **LENGTHS)
    assert [text.strip() for text in json.loads(line.removeprefix("REPORT "))] == [expected]


def uploaded_files() -> dict[str, Path]:
    files = [path for folder in ("modeling", "processing") for path in (ROOT / folder).glob("*.py")]
    return {path.stem: path for path in files if path.name != "__init__.py"}


def imports_of(path: Path) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements of a file, each with whether it stands in the handler of an ImportError."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(node)
        for handler in ast.walk(tree)
        if isinstance(handler, ast.ExceptHandler) and getattr(handler.type, "id", None) == "ImportError"
        for node in ast.walk(handler)
    }
    return [(node, id(node) in guarded) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_names_of_uploaded_files_are_unique_across_both_folders():
    found = [path.name for folder in ("modeling", "processing") for path in (ROOT / folder).glob("*.py")]
    found = [name for name in found if name != "__init__.py"]
    assert len(found) == len(set(found))
    assert sorted(found) == [path.name for path in code_files()]


@pytest.mark.parametrize("name", sorted(uploaded_files()))
def test_an_uploaded_file_names_only_its_flat_neighbours_and_its_dependencies(name):
    known = set(uploaded_files())
    allowed = {"torch", "transformers", "PIL", "numpy", "safetensors", "huggingface_hub"} | sys.stdlib_module_names
    for node, guarded in imports_of(uploaded_files()[name]):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} - allowed <= {"av"}
        elif node.level:
            assert node.level == 1 and node.module in known, f"line {node.lineno}: write `from .name import X`"
            assert "*" not in {alias.name for alias in node.names}
        elif node.module == "adaptive_llava.hub_cards.pushed_card":
            assert name == "pretrained_base"  # what only the package can do, left out where it is absent
        elif node.module.split(".")[0] == "adaptive_llava":
            # the one place where an uploaded file may name the package: what a checkpoint has beside it
            assert guarded and node.module.removeprefix("adaptive_llava.modeling.") in known
        else:
            assert node.module.split(".")[0] in allowed


# All that uploaded files take from transformers. Public and documented:
DOCUMENTED = {
    "transformers": {
        "AddedToken", "AutoConfig", "AutoModel", "AutoModelForCausalLM", "GenerationConfig", "LlamaForCausalLM",
        "LogitsProcessorList", "PreTrainedModel", "PretrainedConfig", "StoppingCriteriaList",
    },
    "transformers.feature_extraction_utils": {"BatchFeature"},
    "transformers.generation": {"GenerationMixin"},
    "transformers.modeling_outputs": {
        "BaseModelOutputWithPast", "BaseModelOutputWithPooling", "CausalLMOutputWithPast",
    },
    "transformers.processing_utils": {"ImagesKwargs", "ProcessingKwargs", "ProcessorMixin", "TextKwargs"},
    "transformers.utils": {"logging"},
}  # fmt: skip
# Public names that the documentation does not explain.
UNEXPLAINED = {
    "transformers.activations": {"ACT2FN", "GELUActivation"},  # activations by their names in a config
    "transformers.models.auto": {"modeling_auto"},  # the table by which `transformers serve` finds the class
    "transformers.processing_utils": {"MultiModalData"},  # what `_get_num_multimodal_tokens` returns to an engine
    "transformers.utils": {"is_torchvision_available"},  # decides there, too, what reads an image
    "transformers.utils.chat_template_utils": {"render_jinja_template"},  # with the spans of answers
}


def test_uploaded_files_take_public_names_alone_from_transformers():
    found: dict[str, set[str]] = {}
    for path in uploaded_files().values():
        for node, _ in imports_of(path):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "transformers":
                found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    listed = {name: DOCUMENTED.get(name, set()) | UNEXPLAINED.get(name, set()) for name in {*DOCUMENTED, *UNEXPLAINED}}
    assert found == listed
    assert not any(name.startswith("_") for names in found.values() for name in names)
    for module, names in DOCUMENTED.items():
        assert names <= set(dir(importlib.import_module(module)))


def test_transformers_takes_only_the_dependencies_for_requirements_of_remote_code():
    from transformers.dynamic_module_utils import get_imports

    required = {name for path in uploaded_files().values() for name in get_imports(path)}
    assert required <= {"torch", "transformers", "safetensors", "PIL", "numpy"} | set(sys.stdlib_module_names)


def test_every_uploaded_file_is_reached_from_the_classes_of_the_auto_map():
    files = uploaded_files()
    reached, waiting = set(), {reference.split(".")[0] for reference in AUTO_MAP.values()}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= {node.module for node, _ in imports_of(files[name]) if getattr(node, "level", 0)} - reached
    assert reached == set(files)


def test_code_that_was_changed_in_a_checkpoint_is_written_anew(tmp_path):
    names = copy_code(tmp_path)
    (tmp_path / "modeling_adaptive_llava.py").write_text("raise SystemExit\n")
    assert copy_code(tmp_path) == names
    original = (ROOT / "modeling" / "modeling_adaptive_llava.py").read_bytes()
    assert (tmp_path / "modeling_adaptive_llava.py").read_bytes() == original
    assert not list(tmp_path.glob("*.partial"))


# Construction from other models


def tiny_text(kind: str = "qwen2", **options):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_text_config(kind, **options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.tie_weights()
    return model


def tiny_tower(kind: str):
    torch.manual_seed(0)
    if kind in ("clip", "siglip"):
        config = tiny_vision_config(kind)
    elif kind == "dinov2":
        config = Dinov2Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=4, mlp_ratio=2
        )
    elif kind == "mobilenet":
        config = MobileNetV2Config(image_size=48, depth_multiplier=0.25, depth_divisible_by=4, min_depth=4)
    else:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return AutoModel.from_config(config).eval()


TOWERS = {
    # kind: (image size, feature layer, grid)
    "clip": (24, -2, [6, 6]),
    "siglip": (24, -2, [6, 6]),
    "dinov2": (24, -2, [6, 6]),
    "mobilenet": (48, 4, [6, 6]),
    "resnet": (224, -1, [28, 28]),
}
every_tower = pytest.mark.parametrize("kind", TOWERS)


def from_tower(kind: str, preset: str = "dfmr", **fields) -> AdaptiveLlavaForConditionalGeneration:
    torch.manual_seed(2)
    fields = {"image_token_id": IMG, "vision_feature_layer": TOWERS[kind][1]} | fields
    model = AdaptiveLlavaForConditionalGeneration.from_backbones(tiny_tower(kind), tiny_text(), preset, **fields)
    model.generation_config.eos_token_id = None
    return model


@every_tower
def test_any_tower_joins_any_language_model(kind, tmp_path):
    size, _, grid = TOWERS[kind]
    model, pixels = from_tower(kind), tiny_images(2, image_size=size)
    assert model.config.vision_grid == grid
    assert model.config.compressor_trained is False
    with torch.no_grad():
        output = model(input_ids=IDS, pixel_values=pixels, visual_rungs=[0, 1])
    height, width = grid
    assert output.num_visual_tokens.tolist() == [(height // 3) * (width // 3), (height // 2) * (width // 2)]
    assert output.logits.isfinite().all()
    model.save_pretrained(tmp_path)
    again = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS, pixel_values=pixels, visual_rungs=[0, 1]).logits, output.logits)
    assert again.generate(input_ids=IDS, pixel_values=pixels, max_new_tokens=2).shape == (1, 8)


def test_a_tower_that_tells_no_size_is_measured_on_the_tiles_it_will_see():
    model = from_tower("resnet", tiling={"type": "anyres", "tile_size": 48})
    assert model.config.vision_grid == [6, 6]
    pixels, sizes = tiny_images(3, image_size=48).unsqueeze(0), torch.tensor([[48, 96]])
    spent = model.encode_images(pixels, sizes, visual_rungs=[0, 1, 2]).lengths
    assert spent == (sum(model.config.visual_token_counts) + 1,)  # a newline behind the row of tiles


@every_tower
def test_patches_of_a_tower_stand_row_by_row_without_prefix_tokens(kind):
    # a bright square in one corner moves the features there the most
    size, _, (height, width) = TOWERS[kind]
    model = from_tower(kind, "llava", vision_feature_layer=1)
    height, width = model.model.extract_features(torch.zeros(1, 3, size, size)).grid
    dark = torch.zeros(1, 3, size, size)
    lit = dark.clone()
    lit[:, :, : size // 6, -size // 6 :] = 5.0  # the upper right corner
    with torch.no_grad():
        difference = model.model.extract_features(lit).patches - model.model.extract_features(dark).patches
    strongest = difference.norm(dim=-1).view(height, width).flatten().argmax().item()
    row, column = divmod(strongest, width)
    assert row < height / 2 <= column


@every_tower
def test_text_alone_in_training_reaches_a_trainable_tower_of_any_kind(kind):
    model = from_tower(kind).train()
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
    tower = [parameter.grad for parameter in model.model.vision_tower.parameters()]
    assert any(gradient is not None for gradient in tower)
    assert all(gradient.abs().max() == 0 for gradient in tower if gradient is not None)


def test_the_vision_side_of_a_dual_encoder_is_taken():
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=CLIPTextConfig(vocab_size=50, **text).to_dict(), vision_config=tiny_vision_config().to_dict()
    )
    torch.manual_seed(0)
    model = AdaptiveLlavaForConditionalGeneration.from_backbones(CLIPModel(config), tiny_text(), image_token_id=IMG)
    assert model.config.vision_config.model_type == "clip_vision_model"
    with torch.no_grad():
        assert model(input_ids=IDS, pixel_values=tiny_images(2)).num_visual_tokens.tolist() == [36, 36]


@pytest.mark.parametrize("preset", PRESETS_HERE)
def test_new_parts_have_storage_and_the_precision_of_the_language_model(preset):
    vision, text = tiny_tower("clip"), tiny_text().bfloat16()
    model = AdaptiveLlavaForConditionalGeneration.from_backbones(vision, text, preset, image_token_id=IMG)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    own = [p for n, p in model.model.named_parameters() if not n.startswith("vision_tower.")]
    assert {parameter.dtype for parameter in own} == {torch.bfloat16}
    with torch.no_grad():
        assert model(input_ids=IDS, pixel_values=tiny_images(2)).logits.isfinite().all()


def test_backbones_may_be_given_as_folders(tmp_path):
    tiny_tower("clip").save_pretrained(tmp_path / "vision")
    tiny_text().save_pretrained(tmp_path / "text")
    model = AdaptiveLlavaForConditionalGeneration.from_backbones(
        tmp_path / "vision", str(tmp_path / "text"), image_token_id=IMG
    )
    assert torch.equal(model.lm_head.weight, tiny_text().lm_head.weight)
    vision = model.model.vision_tower.state_dict()
    for name, value in vision.items():
        assert torch.equal(value, getattr(tiny_tower("clip"), "vision_model", tiny_tower("clip")).state_dict()[name])


@pytest.mark.parametrize("tied", [True, False])
def test_a_placeholder_new_to_the_tokenizer_grows_the_embeddings(tied, tmp_path):
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(100)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w3")
    model = AdaptiveLlavaForConditionalGeneration.from_backbones(
        tiny_tower("clip"), tiny_text(tie_word_embeddings=tied), tokenizer=tokenizer
    )
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == 100
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 101
    ids = torch.tensor([[5, 100, 6]])
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=tiny_images(1)).logits
    model.save_pretrained(tmp_path)
    again = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, pixel_values=tiny_images(1)).logits, expected)
    assert (again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()) is tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied


@pytest.mark.parametrize("fields", [{}, {"image_token_id": 100}, {"image_token_id": -1}])
def test_backbones_without_a_placeholder_of_their_own_are_refused(fields):
    with pytest.raises(ValueError, match=r"`image_token_id=.*` is no row of the text model's 100 embeddings"):
        AdaptiveLlavaForConditionalGeneration.from_backbones(tiny_tower("clip"), tiny_text(), **fields)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("phi", {}, r"has no head that is a plain matrix"),
        ("gemma2", {"head_dim": 8}, r"changes its logits after the head \(`final_logit_softcapping=30"),
        ("granite", {"logits_scaling": 8.0}, r"`logits_scaling=8"),
    ],
)
def test_a_language_model_with_more_than_a_matrix_as_head_is_refused(kind, options, message):
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 100,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    }
    text = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **(shape | options)))
    with pytest.raises(ValueError, match=message):
        AdaptiveLlavaForConditionalGeneration.from_backbones(tiny_tower("clip"), text, image_token_id=IMG)


def stock_llava(vision: str = "clip", **options) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tiny_vision_config(vision),
        text_config=tiny_text_config(tie_word_embeddings=options.get("tie_word_embeddings", False)),
        image_token_index=IMG,
        image_seq_length=36,
        **({"tie_word_embeddings": False} | options),
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def difference_from(stock: LlavaForConditionalGeneration, model) -> float:
    pixels = tiny_images(2)
    wide = torch.tensor([[token for token in IDS[0].tolist() for _ in range(36 if token == IMG else 1)]])
    expected = stock(input_ids=wide, pixel_values=pixels).logits[0, [0, 36, 37, 38, 74, 75]]
    return (model(input_ids=IDS, pixel_values=pixels).logits[0] - expected).abs().max().item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vision_feature_layer": [-2, -1]},
        {"vision_feature_layer": [1, 3, 2]},
        {"vision_feature_layer": -1},
        {"vision": "siglip", "vision_feature_select_strategy": "full"},
        {"multimodal_projector_bias": False, "projector_hidden_act": "relu"},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_a_converted_llava_gives_its_own_logits(options, tmp_path):
    stock = stock_llava(**options)
    model = AdaptiveLlavaForConditionalGeneration.from_llava(stock)
    assert difference_from(stock, model) <= 2e-5
    assert model.model.language_model is stock.model.language_model
    model.save_pretrained(tmp_path)
    again = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert difference_from(stock, again) <= 2e-5


def test_a_llava_may_be_given_as_a_folder(tmp_path):
    stock = stock_llava()
    stock.save_pretrained(tmp_path)
    model = AdaptiveLlavaForConditionalGeneration.from_llava(tmp_path, dtype=torch.float32)
    assert difference_from(stock, model) <= 2e-5


@pytest.mark.parametrize("layer", [-2, [-2, -1]])
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("compressor", ["token_concat", "spatial_fusion"])
@torch.no_grad()
def test_joined_patches_start_as_their_exact_average(compressor, layer, window):
    stock, pixels = stock_llava(vision_feature_layer=layer), tiny_images(2)
    joined = AdaptiveLlavaForConditionalGeneration.from_llava(stock, compressor={"type": compressor, "window": window})
    assert joined.config.compressor_trained is True
    pooled = AdaptiveLlavaForConditionalGeneration.from_llava(
        stock, "avg-pool", compressor={"type": "average_pool", "factors": [window]}
    )
    one, other = joined.encode_images(pixels), pooled.encode_images(pixels)
    assert one.lengths == other.lengths
    assert (one.values - other.values).abs().max() <= 1e-5
    inputs = {"input_ids": IDS, "pixel_values": pixels}
    assert (joined(**inputs).logits - pooled(**inputs).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize(("fused", "plain"), [("mbtf", "llava"), ("stf-mbtf", "avg-pool")])
@torch.no_grad()
def test_fused_blocks_start_as_the_selected_layer(fused, plain, layer, tmp_path):
    stock = stock_llava(vision_feature_layer=layer)
    inputs = {"input_ids": IDS, "pixel_values": tiny_images(2)}
    model = AdaptiveLlavaForConditionalGeneration.from_llava(stock, fused)
    expected = AdaptiveLlavaForConditionalGeneration.from_llava(stock, plain)(**inputs).logits
    assert (model(**inputs).logits - expected).abs().max() <= 1e-5
    assert model.config.compressor_trained is True
    model.save_pretrained(tmp_path)
    again = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("source", "preset", "fields", "named"),
    [
        ({}, "stf", {"compressor": {"type": "spatial_fusion", "variant": "paper"}}, "compressor"),
        ({}, "stf", {"compressor": {"type": "spatial_fusion", "fused_tokens": 2}}, "compressor"),
        ({"projector_hidden_act": "relu"}, "stf", {}, "compressor"),
        ({}, "mbtf", {"fusion_variant": "paper"}, "multi_block_fusion"),
        ({}, "mbtf", {"fusion_blocks": [3, 2, 1]}, "multi_block_fusion"),
        ({"projector_hidden_act": "relu"}, "stf-mbtf", {"fusion_variant": "paper"}, "multi_block_fusion, compressor"),
    ],
)
def test_parts_that_start_anew_are_named_and_recorded(source, preset, fields, named, caplog):
    model = AdaptiveLlavaForConditionalGeneration.from_llava(stock_llava(**source), preset, **fields)
    assert model.config.compressor_trained is False
    assert f"New weights in: {named}. Fine-tune the model before use" in caplog.text


def test_fields_override_those_of_the_converted_model():
    model = AdaptiveLlavaForConditionalGeneration.from_llava(
        stock_llava(), "dfmr", router={"type": "feature_std", "thresholds": [0.3, 0.6]}
    )
    assert model.model.router.thresholds == (0.3, 0.6)
    assert model.config.image_token_id == IMG


@pytest.mark.parametrize(
    ("vision", "strategy", "message"),
    [
        ("clip", "full", r"`vision_feature_select_strategy='full'` keeps the \[CLS\] token"),
        ("siglip", "default", r"`vision_feature_select_strategy='default'` drops the first patch of a tower without"),
    ],
)
def test_a_llava_whose_features_form_no_grid_is_refused(vision, strategy, message):
    stock = stock_llava(vision, vision_feature_select_strategy=strategy)
    with pytest.raises(ValueError, match=message):
        AdaptiveLlavaForConditionalGeneration.from_llava(stock)


def test_another_architecture_than_llava_is_refused():
    with pytest.raises(ValueError, match=r"`model` is a 'qwen2'; `from_llava` takes LLaVA-1.5"):
        AdaptiveLlavaForConditionalGeneration.from_llava(tiny_text())
    with pytest.raises(ValueError, match=r"`preset='LLaVA'` is unknown"):
        AdaptiveLlavaForConditionalGeneration.from_llava(stock_llava(), "LLaVA")
