"""Tiny checkpoints in the layout of the LLaVA authors' code base, with the names and shapes of theirs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from tests.conftest import BOS, EOS, PAD


ROWS = 99  # of the language model, one for each token of the tokenizer below
WIDTH = 32  # of the tower and of the language model
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."


Shapes = dict[str, tuple[int, ...]]


def text_tokenizer() -> PreTrainedTokenizerFast:
    """One id per printable character, and no `<image>`."""
    characters = [chr(code) for code in range(32, 126)] + ["\n"]
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 3}
    vocabulary |= {character: 4 + index for index, character in enumerate(characters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Values so large that every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.25 for name, shape in shapes.items()}


def layers(prefix: str, *widths: int) -> Shapes:
    """Shapes of linear layers 0, 2, 4, ... of an `nn.Sequential` with activations between them."""
    pairs = list(pairwise(widths))
    weights = {f"{prefix}.{2 * index}.weight": (out, into) for index, (into, out) in enumerate(pairs)}
    return weights | {f"{prefix}.{2 * index}.bias": (out,) for index, (_, out) in enumerate(pairs)}


def decoder_layer(prefix: str, width: int = WIDTH) -> Shapes:
    """Shapes of one layer of `tiny_text_config("llama")`."""
    shapes: Shapes = {
        f"{prefix}.self_attn.{name}_proj.weight": (width if name in "qo" else width // 2, width) for name in "qkvo"
    }
    shapes |= {f"{prefix}.mlp.{name}_proj.weight": (64, width) for name in ("gate", "up")}
    shapes |= {f"{prefix}.mlp.down_proj.weight": (width, 64)}
    return shapes | {f"{prefix}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}


def language_shapes(width: int = WIDTH) -> Shapes:
    """Of a language model of two layers."""
    shapes: Shapes = {"model.embed_tokens.weight": (ROWS, width), "lm_head.weight": (ROWS, width)}
    shapes |= {"model.norm.weight": (width,)}
    return shapes | decoder_layer("model.layers.0", width) | decoder_layer("model.layers.1", width)


def resampler_shapes(side: int) -> Shapes:
    """Of LLaVA-Mini's compressor."""
    shapes: Shapes = {f"model.compressor.{name}": (side * side, WIDTH) for name in ("query", "pos_embed")}
    shapes |= {
        f"model.compressor.{norm}.{kind}": (WIDTH,) for norm in ("ln_q", "ln_kv") for kind in ("weight", "bias")
    }
    shapes |= {"model.compressor.attn.in_proj_weight": (3 * WIDTH, WIDTH)}
    shapes |= {"model.compressor.attn.in_proj_bias": (3 * WIDTH,)}
    shapes |= {"model.compressor.attn.out_proj.weight": (WIDTH, WIDTH)}
    return shapes | {"model.compressor.attn.out_proj.bias": (WIDTH,)}


def llava_tensors(*further: Shapes, projector: tuple[int, ...] = (WIDTH, WIDTH, WIDTH)):
    """LLaVA-1.5 without its tower; the projector's widths, and shapes of what a system adds."""
    shapes = language_shapes(projector[-1]) | layers("model.mm_projector", *projector)
    for more in further:
        shapes |= more
    return random_tensors(shapes)


def llava_config(tower: Path | str, **fields) -> dict:
    """The config.json of LLaVA-1.5, with a tiny language model."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": ROWS,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "tune_mm_mlp_adapter": False,
    } | fields


def tower_config(width: int = WIDTH, layers: int = 3, side: int = 24) -> CLIPVisionConfig:
    """A CLIP tower on 4-pixel patches, 6x6 of them for 24 pixels."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=side,
        patch_size=4,
        projection_dim=16,
    )


def tower_tensors(config: CLIPVisionConfig | None = None) -> dict[str, Tensor]:
    """Random weights of a CLIP tower, named as inside its `vision_model`."""
    state = CLIPVisionModel(config or tower_config()).state_dict()
    return random_tensors({name.removeprefix("vision_model."): tuple(value.shape) for name, value in state.items()}, 1)


def save_tower(folder: Path, config: CLIPVisionConfig | None = None, *, weights: bool = True) -> Path:
    """The folder of a CLIP tower as it was published, with its text side, or without weights."""
    config = config or tower_config()
    folder.mkdir(parents=True)
    dual = {"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": config.to_dict(), "text_config": {}}
    (folder / "config.json").write_text(json.dumps(dual))
    size = config.image_size
    CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=[0.5, 0.4, 0.3]
    ).save_pretrained(folder)
    if weights:
        named = {f"vision_model.{name}": value for name, value in tower_tensors(config).items()}
        named |= {"logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.ones(4)}
        named |= {"vision_model.embeddings.position_ids": torch.arange(37)[None]}
        torch.save(named, folder / "pytorch_model.bin")
    return folder


def save_checkpoint(
    folder: Path, tensors: dict[str, Tensor], config: dict, *, shards: int = 2, pickled: bool = True
) -> Path:
    """A checkpoint with tokenizer and generation config, in shards as transformers' older releases write them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    files = [f"{stem}-{number + 1:05}-of-{shards:05}.{ending}" for number in range(shards)]
    places = {name: files[index % shards] for index, name in enumerate(tensors)}
    for file in files:
        share = {name: value for name, value in tensors.items() if places[name] == file}
        torch.save(share, folder / file) if pickled else save_file(share, folder / file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "temperature": 0.9, "top_p": 0.6})
    )
    text_tokenizer().save_pretrained(folder)
    return folder
