"""Rows against the authors' modules, written again here the way they are: image by image, with our weights.

Papers: LLaVA-STF, https://arxiv.org/abs/2506.07138; LLaVA-Mini, https://arxiv.org/abs/2501.03895.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_llava.modeling.encoded_images import EncodedBatch
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.training.benchmark_rows.measurement import Measurement
from adaptive_llava.training.benchmark_workload import Workload


_IMAGES = 4


def spatial_fusion(work: Workload) -> Measurement:
    """Spatial token fusion as released."""
    compressor, features = work.model("stf").model.compressor, work.features(_IMAGES)
    peer = NaiveSpatialFusion(compressor)
    pairs = work.time(lambda: compressor(features, [0] * _IMAGES), lambda: peer(features.patches))
    return _never_slower("spatial fusion", pairs)


def query_compression(work: Workload) -> Measurement:
    """LLaVA-Mini's compressor."""
    compressor, features = work.model("llava-mini", prefusion_layers=0).model.compressor, work.features(_IMAGES)
    peer = NaiveQueryCompression(compressor, features)
    pairs = work.time(lambda: compressor(features, [0] * _IMAGES), lambda: peer(features.patches))
    return _never_slower("LLaVA-Mini's compressor", pairs)


def prefusion(work: Workload) -> Measurement:
    """LLaVA-Mini's modality pre-fusion."""
    images, model = _IMAGES // 2, work.model("llava-mini").model
    batch, text = prefusion_inputs(work, model, images)
    peer, alone = NaivePrefusion(model.modality_prefusion.decoder), without_placeholders(work, batch, text)
    patches, visual = batch.encoded.patches, batch.encoded.values
    assert patches is not None  # the model has pre-fusion
    pairs = work.time(lambda: model.fuse_modalities(text, batch), lambda: peer(patches, visual, alone))
    return _never_slower("LLaVA-Mini's pre-fusion", pairs, images)


def _never_slower(what: str, pairs: Any, images: int = _IMAGES) -> Measurement:
    return Measurement(f"{what} of {images} images / the authors' way, one by one", pairs, "s", 1.0, 1.0)


@torch.no_grad()
def prefusion_inputs(work: Workload, model: Any, images: int) -> tuple[EncodedBatch, Tensor]:
    """Prompts with an image each, on the host with their patches, and their embeddings."""
    features = work.features(images)
    encoded = model._compress(features, model.router(features), [0] * images)
    ids = work.prompt(images)["input_ids"]
    return EncodedBatch(ids.cpu(), None, None, encoded, True), model.get_input_embeddings()(ids)


def without_placeholders(work: Workload, batch: EncodedBatch, text: Tensor) -> Tensor:
    """Embeddings of the text alone, `(B, L, dim)` -> `(B, TEXT_TOKENS, dim)`."""
    return text[batch.input_ids.to(text.device) != work.image_token].unflatten(0, (len(text), -1))


class NaiveSpatialFusion:
    """Windows joined for each image by two unfolds, then the released layers.

    Args:
        compressor: Has the weights.
    """

    def __init__(self, compressor: Any):
        self.window, self.layers = compressor.window, (compressor.linear_1, compressor.linear_2)

    def __call__(self, patches: Tensor) -> Tensor:
        """`(V, height * width, dim)` -> `(V * tokens, text_dim)`."""
        return torch.cat([self._one(each) for each in patches])

    def _one(self, patches: Tensor) -> Tensor:
        side = math.isqrt(len(patches))
        # (height, width, dim) -> (rows, columns, dim, window, window)
        windows = patches.view(side, side, -1).unfold(0, self.window, self.window).unfold(1, self.window, self.window)
        joined = windows.contiguous().view(windows.shape[0] * windows.shape[1], -1)
        return self.layers[1](F.gelu(self.layers[0](joined)))


class NaiveQueryCompression:
    """`nn.MultiheadAttention` from the queries to each image's patches, with the weights it also returns.

    Args:
        compressor: Has the weights.
        features: Tell the grid.
    """

    def __init__(self, compressor: Any, features: VisionFeatures):
        dim = compressor.input_dim
        self.norms = compressor.ln_q, compressor.ln_kv
        self.queries = compressor.queries(0)
        positions = compressor.positions(features.grid, 0, self.queries.device)
        self.positions = [table.to(self.queries.dtype) for table in positions]
        attention = nn.MultiheadAttention(dim, compressor.num_heads, batch_first=True)
        self.attention = attention.to(self.queries.device, self.queries.dtype).eval()
        projections = compressor.q_proj, compressor.k_proj, compressor.v_proj
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(torch.cat([layer.weight for layer in projections]))
            self.attention.in_proj_bias.copy_(torch.cat([layer.bias for layer in projections]))
        self.attention.out_proj = compressor.o_proj

    def __call__(self, patches: Tensor) -> Tensor:
        """`(V, height * width, dim)` -> `(V * tokens, dim)`."""
        return torch.cat([self._one(each) for each in patches])

    def _one(self, patches: Tensor) -> Tensor:
        values = self.norms[1](patches)
        queries = self.norms[0](self.queries) + self.positions[0]
        return self.attention(queries, values + self.positions[1], values)[0]


class NaivePrefusion:
    """Decoder layers over [patches, visual tokens, text] of each prompt, with a mask written out.

    Args:
        decoder: Has the layers.
    """

    def __init__(self, decoder: Any):
        self.decoder = decoder

    def __call__(self, patches: Tensor, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """All patches `(P, dim)`, visual tokens `(S, dim)` and text `(B, L, dim)` -> fused text and visual tokens."""
        texts, tokens = [], []
        for own in zip(patches.chunk(len(text)), visual.chunk(len(text)), text, strict=True):
            fused = self._one(torch.cat(own)).split([len(part) for part in own])
            tokens.append(fused[1])
            texts.append(fused[2])
        return torch.stack(texts), torch.cat(tokens)

    def _one(self, states: Tensor) -> Tensor:
        length = len(states)
        mask = states.new_full((length, length), torch.finfo(states.dtype).min).triu(1)[None, None]
        positions = torch.arange(length, device=states.device)[None]
        rotary = self.decoder.rotary_emb(states[None], positions)
        states = states[None]
        for layer in self.decoder.layers:
            output = layer(states, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            states = output if isinstance(output, Tensor) else output[0]
        return states[0]
