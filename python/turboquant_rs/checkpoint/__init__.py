"""Whole checkpoints on disk: quantize one, look into one, compare two, a block of rows in memory at a time.

quantize.py   IN → select → read rows → pack → write → OUT       select.py   which tensors, and why not
compare.py    inspect_checkpoint, compare_checkpoints
"""

from turboquant_rs.checkpoint.compare import (
    Comparison,
    Contents,
    StoredTensor,
    compare_checkpoints,
    inspect_checkpoint,
)
from turboquant_rs.checkpoint.quantize import Quantized, quantize_checkpoint

__all__ = [
    "Comparison",
    "Contents",
    "Quantized",
    "StoredTensor",
    "compare_checkpoints",
    "inspect_checkpoint",
    "quantize_checkpoint",
]
