"""All rows of the benchmark by name, in the order they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from adaptive_llava.training.benchmark_rows import (
    against_stock,
    authors_modules,
    batches,
    compression,
    memory,
    prefill,
    waits_and_graphs,
)
from adaptive_llava.training.benchmark_rows.measurement import Measurement
from adaptive_llava.training.benchmark_workload import Workload


_MULTI = "dynamic-resampler-multi"
_RUNGS = {64: 3, 16: 2, 1: 0}  # of its ladder 1, 4, 16, 64, 256
_COUNTED = ("dfmr", "dynamic-resampler", "stf")

ROWS: dict[str, Callable[[Workload], Measurement]] = {
    "identity_prefill": against_stock.identity_prefill,
    "identity_first_token": against_stock.identity_first_token,
    "identity_decode": against_stock.identity_decode,
    "identity_memory": memory.identity_memory,
    "expanded_layout": against_stock.expanded_layout,
    "logits_memory": memory.logits_memory,
    "training_memory": memory.training_memory,
    "cache_bytes": memory.cache_bytes,
    **{f"prefill_{tokens}": partial(prefill.fewer_tokens, tokens=tokens) for tokens in (288, 144, 64, 16, 1)},
    "end_to_end_factor_2": partial(prefill.end_to_end, preset="dfmr", rung=1),
    "end_to_end_factor_3": partial(prefill.end_to_end, preset="dfmr", rung=0),
    **{f"end_to_end_{count}": partial(prefill.end_to_end, preset=_MULTI, rung=rung) for count, rung in _RUNGS.items()},
    "encode_once": prefill.encode_once,
    "growth_batch": prefill.per_batch,
    "growth_images": prefill.per_image,
    "growth_frames": prefill.per_frame,
    "dfmr_share": compression.dfmr_share,
    "spatial_fusion_share": compression.spatial_fusion_share,
    "resampler_1_share": partial(compression.resampler_share, rung=0),
    "resampler_256_share": partial(compression.resampler_share, rung=1),
    **{f"mixed_rungs_{preset}": partial(compression.mixed_rungs, preset=preset) for preset in _COUNTED},
    **{f"operators_{preset}": partial(compression.operators_of_a_batch, preset=preset) for preset in _COUNTED},
    "authors_spatial_fusion": authors_modules.spatial_fusion,
    "authors_query_compression": authors_modules.query_compression,
    "authors_prefusion": authors_modules.prefusion,
    "ragged_generate_8": partial(batches.ragged_generate, batch=8),
    "ragged_generate_32": partial(batches.ragged_generate, batch=32),
    "ragged_training": batches.ragged_training,
    "packed_training": batches.packed_training,
    "waits_of_forward": waits_and_graphs.waits_of_forward,
    "waits_on_padded_rows": waits_and_graphs.waits_on_padded_rows,
    **{f"graphs_{preset}": partial(waits_and_graphs.compressor_graphs, preset=preset) for preset in _COUNTED},
    "graphs_router_and_splice": waits_and_graphs.other_graphs,
}
