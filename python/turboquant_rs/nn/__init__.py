"""Quantized modules, and the functions that swap them into a model."""

from .convert import dequantize_, prepare_, quantize_
from .embedding import QuantEmbedding
from .linear import QuantLinear
from .precision import precision, set_precision
from .speed import Speeds, bench

__all__ = [
    "QuantEmbedding",
    "QuantLinear",
    "Speeds",
    "bench",
    "dequantize_",
    "precision",
    "prepare_",
    "quantize_",
    "set_precision",
]
