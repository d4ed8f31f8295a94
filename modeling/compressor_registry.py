"""All compressors by type name."""

from __future__ import annotations

from .compressor_average_pool import AveragePoolCompressor
from .compressor_base import Compressor
from .compressor_identity import IdentityCompressor
from .compressor_query_resampler import QueryResamplerCompressor
from .compressor_spatial_fusion import SpatialFusionCompressor
from .compressor_token_concat import TokenConcatCompressor


COMPRESSORS: dict[str, type[Compressor]] = {
    "identity": IdentityCompressor,
    "average_pool": AveragePoolCompressor,
    "query_resampler": QueryResamplerCompressor,
    "token_concat": TokenConcatCompressor,
    "spatial_fusion": SpatialFusionCompressor,
}
