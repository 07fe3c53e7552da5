"""Training that knows how the model will be quantized.

    quantize_(model, QAT(…)) ──► prepared layers ── any training ──► quantize_(model, QAT(step="convert"))
      recipe.py                    layers.py                            packed layers (nn)

values.py     fake_quantize, inject_noise: single tensors     bits.py      learnable bits under a budget
sandwich.py   one weight that is good at many bits            schedule.py  bits that follow the gradients
"""

from .layers import Prepared, QATEmbedding, QATLinear, prepared_layers
from .recipe import QAT
from .sandwich import sandwich
from .schedule import PrecisionSchedule
from .values import fake_quantize, inject_noise

__all__ = [
    "QAT",
    "PrecisionSchedule",
    "Prepared",
    "QATEmbedding",
    "QATLinear",
    "fake_quantize",
    "inject_noise",
    "prepared_layers",
    "sandwich",
]
