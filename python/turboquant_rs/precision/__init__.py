"""Which layer gets how many bits, and when.

    model, batches ── sensitivity ──► Sensitivity ── allocate ──► Plan ──► tq.quantize_(model, plan)
                     (sensitivity.py)   layer × bits  (allocate.py)  (plan.py)

losses.py     what a model is scored by          variants.py    one weight at every choice of bits
choices.py    costs and scores for the solver    weights.py     all weights at the bits of a plan
swaps.py      swaps accepted on measured KL      picture.py     what a person looks at

    nested model, batches ── refine ──► thresholds: rows of x that read more bits than others   (refine.py)
"""

from turboquant_rs.nn import precision, set_precision

from .allocate import Budget, allocate
from .losses import Categorical, Gaussian
from .plan import Plan, read_plan
from .refine import RefinedLayer, Refinement, refine
from .sensitivity import LayerScores, Sensitivity, sensitivity

__all__ = [
    "Budget",
    "Categorical",
    "Gaussian",
    "LayerScores",
    "Plan",
    "RefinedLayer",
    "Refinement",
    "Sensitivity",
    "allocate",
    "precision",
    "read_plan",
    "refine",
    "sensitivity",
    "set_precision",
]
