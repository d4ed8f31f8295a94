"""Weights of released LLaVA-Mini checkpoints under the names of this package.

Paper: LLaVA-Mini, https://arxiv.org/abs/2501.03895. Its compressor is an `nn.MultiheadAttention`, with queries, keys
and values projected by one matrix; here they are layers of their own, which adapters and 4-bit loading see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from adaptive_llava.modeling.sincos_positions import sincos_positions


def query_resampler_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of LLaVA-Mini's compressor under the names of `QueryResamplerCompressor`, for `counts=[C * C]`.

    The joint query, key and value projection is split; positions are computed, not kept, so that the stored table is
    checked and dropped. The weights belong to `key_positions="enlarged"` and `num_heads=8`.

    Args:
        weights: By the name behind `model.compressor.`, all of them or, shard by shard, a part.

    Raises:
        ValueError: A name that LLaVA-Mini's compressor does not have, or positions that are not its own.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name == "pos_embed":
            _check_stored_positions(weight)
        elif name == "query":
            renamed[f"query_{len(weight)}"] = weight
        elif name in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = name.rsplit("_", 1)[1]
            parts = zip("qkv", weight.chunk(3), strict=True)
            # copies: safetensors refuses tensors that share memory
            renamed |= {f"{part}_proj.{kind}": tensor.clone() for part, tensor in parts}
        elif name in ("attn.out_proj.weight", "attn.out_proj.bias"):
            renamed[name.replace("attn.out_proj", "o_proj")] = weight
        elif name.split(".")[0] in ("ln_q", "ln_kv"):
            renamed[name] = weight
        else:
            raise ValueError(
                f"`weights` holds {name!r}, which LLaVA-Mini's compressor does not have. Pass only tensors whose "
                "names start with 'model.compressor.', with that prefix removed."
            )
    return renamed


def _check_stored_positions(table: Tensor) -> None:
    side = math.isqrt(len(table))
    places = torch.arange(side, device=table.device)
    # released tables may have been rounded to half precision
    if len(table) != side * side or not torch.allclose(
        table.float(), sincos_positions(places, places, table.shape[1]), rtol=0, atol=1e-2
    ):
        raise ValueError(
            f"`pos_embed` of shape {tuple(table.shape)} is not the sine-cosine table of a square grid, as LLaVA-Mini "
            "stores it, and this compressor computes its positions. Such weights cannot be converted."
        )
