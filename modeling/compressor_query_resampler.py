"""Learned queries that gather the patches by cross-attention, with sets of several sizes to choose from.

Paper: LLaVA-Mini, https://arxiv.org/abs/2501.03895, section 4.2, for the attention (one set of C x C queries); the
DynamicResampler report for several sets, each with queries of its own (1 and 256).
Shapes: (V, height * width, dim) -> (V, count, dim); the tokens of a count C * C form a C x C grid, row-major
Per view, with LN for layer norm and P for positions: q = LN(queries) + P_q; x = LN(patches);
tokens = MultiHead(q, x + P_k, x). No residual, no norm and no feed-forward layer behind it.
Differs from LLaVA-Mini's code by default: its key positions are those of the C x C queries enlarged to the patch grid
(`key_positions="enlarged"`), here both stand in patch coordinates; and it starts from random weights
(`initialisation="normal"`), here from the mean of each query's cell. Positions are computed, not stored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compressor_base import Compressor
from .option_schema import whole_numbers
from .sincos_positions import enlarged_positions, sincos_positions, wave_frequency
from .visual_tokens import VisionFeatures


QUERY_SETS = ("own", "nested")
KEY_POSITIONS = ("grid", "enlarged")
INITIALISATIONS = ("pass_through", "normal")


class QueryResamplerCompressor(Compressor):
    """Multi-head cross-attention from `count` queries, which share all weights but themselves, to all patches.

    Args:
        dim: Width of the vision features, divisible by 4.
        text_dim: Width of the language model.
        counts: Tokens of each rung, strictly rising square numbers; `[C * C]` alone is LLaVA-Mini.
        query_sets: `"own"`: a table of queries for each count, as in DynamicResampler. `"nested"`: a smaller count
            takes the first rows of the largest table, as in MQT-LLaVA, but spreads them over the whole image on a grid
            of its own; MQT's places, in raster order on the largest grid, would leave few queries its top rows only.
        num_heads: Heads of the attention; divides `dim`. LLaVA-Mini: 8.
        key_positions: `"grid"`: patches stand at their row and column, queries at the centre of their cell. A query
            stands for all of its cell, so waves shorter than that fade from its position, and a lone query, whose cell
            is the image, has none. `"enlarged"`: queries stand at row and column of their C x C grid, patches at the
            same table enlarged bicubically.
        initialisation: `"pass_through"`: a token starts as the mean of the normalised patches in about its cell,
            weighted by place alone: nearly its own patch if there are as many queries as patches, the mean of all for
            one query. `"normal"`: LLaVA-Mini's, normal queries and PyTorch's attention weights; learns far slower.

    Raises:
        ValueError: An option is not one of these, or does not fit `dim`.
    """

    type_name = "query_resampler"

    def __init__(
        self,
        dim: int,
        text_dim: int,
        *,
        counts: Sequence[int] = (1, 256),
        query_sets: str = "own",
        num_heads: int = 8,
        key_positions: str = "grid",
        initialisation: str = "pass_through",
    ):
        super().__init__(dim, text_dim)
        self.counts = _square_counts(counts)
        self.query_sets = _one_of("query_sets", query_sets, QUERY_SETS)
        self.key_positions = _one_of("key_positions", key_positions, KEY_POSITIONS)
        self.initialisation = _one_of("initialisation", initialisation, INITIALISATIONS)
        (self.num_heads,) = whole_numbers("compressor.num_heads", [num_heads], minimum=1)
        _check_width(dim, self.num_heads, initialisation)
        self.num_rungs = len(self.counts)
        self.sides = tuple(math.isqrt(count) for count in self.counts)
        # direct parameters: transformers 5 asks a module for start values only if it has some of its own
        for count in self.counts if query_sets == "own" else self.counts[-1:]:
            self.register_parameter(f"query_{count}", nn.Parameter(torch.empty(count, dim)))
        self.ln_q = nn.LayerNorm(dim)
        self.ln_kv = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self._positions: dict[Any, tuple[Tensor, Tensor]] = {}
        self.initialise()

    def queries(self, rung: int) -> Tensor:
        """Learned queries of a rung, `(counts[rung], dim)`."""
        table = self.counts[rung] if self.query_sets == "own" else self.counts[-1]
        return getattr(self, f"query_{table}")[: self.counts[rung]]

    def idle_parameters(self, rungs: Collection[int]) -> Iterable[nn.Parameter]:
        if self.query_sets == "nested":
            return ()
        return [getattr(self, f"query_{count}") for rung, count in enumerate(self.counts) if rung not in rungs]

    def grid_after(self, grid: tuple[int, int], rung: int) -> tuple[int, int]:
        return self.sides[rung], self.sides[rung]

    def compress(self, features: VisionFeatures, rung: int) -> Tensor:
        queries, keys, values = self._projected(features, rung)
        heads = F.scaled_dot_product_attention(queries, keys, values)
        # (V, heads, count, dim / heads) -> (V, count, dim)
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def attention_weights(self, features: VisionFeatures, rung: int) -> Tensor:
        """Where each token of a rung looks, `(V, heads, counts[rung], height * width)`; rows sum to 1."""
        queries, keys, _ = self._projected(features, rung)
        return (queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1])).softmax(-1)

    def positions(self, grid: tuple[int, int], rung: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of a rung's queries, `(counts[rung], dim)`, and of the patches, `(height * width, dim)`; fp32."""
        side, dim = self.sides[rung], self.input_dim
        if self.key_positions == "enlarged":
            places = torch.arange(side, device=device)
            table = sincos_positions(places, places, dim)
            return table, enlarged_positions(table, side, grid)
        rows, columns = (torch.arange(length, device=device) for length in grid)
        cell_height, cell_width = grid[0] / side, grid[1] / side
        steps = torch.arange(side, device=device) + 0.5
        queries = sincos_positions(
            steps * cell_height - 0.5,
            steps * cell_width - 0.5,
            dim,
            spread=(_cell_spread(cell_height, side), _cell_spread(cell_width, side)),
        )
        return queries, sincos_positions(rows, columns, dim)

    @torch.no_grad()
    def initialise(self) -> None:
        dim = self.input_dim
        self.ln_q.reset_parameters()
        self.ln_kv.reset_parameters()
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            # as PyTorch draws its joint (3 * dim, dim) projection
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(0.5))
        nn.init.uniform_(self.o_proj.weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.zeros_(layer.bias)
        for table in self.parameters(recurse=False):
            nn.init.normal_(table, std=0.02)
        if self.initialisation == "pass_through":
            self._start_as_pass_through()

    def _start_as_pass_through(self) -> None:
        """Attention by place alone, values untouched; learning may add content to both.

        Every head compares the same few waves of the positions. With the waves' frequencies w, a query and a key that
        are d patches apart score `strength * sum(cos(w * d))` per axis, and `strength = 6 / sum(w^2)` makes the
        attention about as wide as a cell (see `_cell_spread`). In the channels of these waves, the queries start at 0
        and the patches almost at 0, which the value projection undoes: else content, larger than positions, would
        decide.
        """
        dim, width = self.input_dim, self.input_dim // self.num_heads
        frequencies, waves = _matching_waves(dim, width)
        channels = [block * (dim // 4) + wave for block in range(4) for wave in waves]
        strength = 6 / sum(frequencies[wave] ** 2 for wave in waves)
        scale = math.sqrt(strength * math.sqrt(width))
        nn.init.zeros_(self.q_proj.weight)
        for head in range(self.num_heads):
            rows = slice(head * width, head * width + len(channels))
            nn.init.zeros_(self.k_proj.weight[rows])
            for layer in (self.q_proj, self.k_proj):
                layer.weight[rows][list(range(len(channels))), channels] = scale
        nn.init.eye_(self.v_proj.weight)
        nn.init.eye_(self.o_proj.weight)
        self.ln_kv.weight[channels] = _CONTENT_SHARE
        self.v_proj.weight[channels, channels] = 1 / _CONTENT_SHARE
        others = sorted(set(range(dim)) - set(channels))
        for table in self.parameters(recurse=False):
            table[:, channels] = 0
            # layer norm takes off the mean, so that it must be 0 already
            table[:, others] -= table[:, others].mean(1, keepdim=True)

    def _kept_positions(self, grid: tuple[int, int], rung: int, like: Tensor) -> tuple[Tensor, Tensor]:
        # enlarging them costs a sixth of the projections of an image; a compiled graph keeps no state
        if torch.compiler.is_compiling():
            queries, keys = self.positions(grid, rung, like.device)
            return queries.to(like.dtype), keys.to(like.dtype)
        key = (tuple(grid), rung, like.device, like.dtype)
        if key not in self._positions:
            with torch.inference_mode(False):  # else training could not use them afterwards
                queries, keys = self.positions(grid, rung, like.device)
                self._positions[key] = queries.to(like.dtype), keys.to(like.dtype)
        return self._positions[key]

    def _projected(self, features: VisionFeatures, rung: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, each `(V, heads, length, dim / heads)`."""
        patches = self.ln_kv(features.patches.to(self.ln_kv.weight.dtype))
        query_positions, key_positions = self._kept_positions(features.grid, rung, patches)
        queries = self.ln_q(self.queries(rung))
        queries = self.q_proj(queries + query_positions).expand(len(patches), -1, -1)
        keys = self.k_proj(patches + key_positions)
        heads = [states.unflatten(2, (self.num_heads, -1)) for states in (queries, keys, self.v_proj(patches))]
        return heads[0].transpose(1, 2), heads[1].transpose(1, 2), heads[2].transpose(1, 2)


# In the channels that compare places, this share of the patches is left at the start; a power of two rounds nothing.
_CONTENT_SHARE = 1 / 64
_LONGEST_WAVE = 24  # patches per radian: longer ones hardly differ within an image


def _cell_spread(cell: float, side: int) -> float:
    """Standard deviation, in patches, at which a query's position fades with its cell's length.

    With variance `cell^2 - 1` a cell of one patch is a point, and the attention of `_start_as_pass_through` spreads by
    about `cell / sqrt(12)`, as an evenly filled cell does.
    """
    return math.inf if side == 1 else math.sqrt(max(cell * cell - 1, 0))


def _matching_waves(dim: int, head_width: int) -> tuple[list[float], list[int]]:
    """All frequencies, and the waves that a head of this width compares, evenly from the shortest to the longest."""
    frequencies = [wave_frequency(float(wave), dim) for wave in range(dim // 4)]
    useful = sum(frequency * _LONGEST_WAVE >= 1 for frequency in frequencies)
    number = min(head_width // 4, useful)
    return frequencies, [round(wave * (useful - 1) / max(number - 1, 1)) for wave in range(number)]


def _square_counts(counts: Sequence[int]) -> tuple[int, ...]:
    checked = whole_numbers("compressor.counts", counts, minimum=1)
    if list(checked) != sorted(set(checked)) or any(math.isqrt(count) ** 2 != count for count in checked):
        raise ValueError(
            f"`compressor.counts={list(checked)!r}` must be strictly rising square numbers, since the queries "
            "stand on a C x C grid over the image. Use numbers like [1, 4, 16, 64, 256]."
        )
    return checked


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"`compressor.{name}={value!r}` is unknown. Pass one of: {', '.join(known)}.")
    return value


def _check_width(dim: int, num_heads: int, initialisation: str) -> None:
    if dim % 4:
        raise ValueError(
            f"`compressor.type='query_resampler'` needs vision features whose width is divisible by 4, for the sines "
            f"and cosines of two axes, and these are {dim} wide. Choose another layer or compressor."
        )
    if dim % num_heads:
        fitting = [number for number in range(1, 33) if dim % number == 0]
        raise ValueError(
            f"`compressor.num_heads={num_heads}` must divide the width of the vision features, {dim}. "
            f"Pass one of: {', '.join(map(str, fitting))}."
        )
    if initialisation == "pass_through" and dim // num_heads < 4:
        raise ValueError(
            f"`compressor.num_heads={num_heads}` leaves heads of {dim // num_heads} channels at width {dim}, and "
            "`initialisation='pass_through'` compares places in at least 4. Use fewer heads, or "
            "`initialisation='normal'`."
        )
