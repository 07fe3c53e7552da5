"""Which layer gets how many bits, and when.

    model, batches ── sensitivity ──► Sensitivity ── allocate ──► Plan ──► tq.quantize_(model, plan)
                     (sensitivity.py)   layer × bits  (allocate.py)  (plan.py)

losses.py     what a model is scored by          variants.py    one weight at every choice of bits
choices.py    costs and scores for the solver    weights.py     all weights at the bits of a plan
swaps.py      swaps accepted on measured KL      picture.py     what a person looks at

    load, latency ── policy ──► level ── nn/switch.py ──► the bits that every layer reads in this forward
                   (policy.py)

controller.py the policy with a model and a clock  errors.py    the error signal of layers, sampled
history.py    what it saw and did, to do it again

phases.py     intervals of a generation            phased.py      a plan for each of them

    nested model, batches ── refine ──► thresholds: rows of x that read more bits than others   (refine.py)
"""

from turboquant_rs.nn import precision, set_precision

from .allocate import Budget, allocate
from .controller import PrecisionController
from .errors import Quality
from .history import History
from .losses import Categorical, Gaussian
from .phased import PhasedPlan
from .phases import Phases
from .plan import Plan, read_plan
from .policy import SLO, Event
from .refine import RefinedLayer, Refinement, refine
from .sensitivity import LayerScores, PhasedSensitivity, Sensitivity, sensitivity

__all__ = [
    "SLO",
    "Budget",
    "Categorical",
    "Event",
    "Gaussian",
    "History",
    "LayerScores",
    "PhasedPlan",
    "PhasedSensitivity",
    "Phases",
    "Plan",
    "PrecisionController",
    "Quality",
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
