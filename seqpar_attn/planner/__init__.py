"""How long can I go, and how fast? Plans of training runs: memory, time and the best policy, predicted.

Standard library only. ``python -m seqpar_attn plan`` prints what this room computes; ``docs/planner.md`` says how.
"""

from .attention import attention_cost
from .calibration import read as read_calibration
from .hardware import GPUS, LINKS, Attention, Gpu, Link, find_gpu, find_link
from .memory import Memory, predict_memory
from .models import MODELS, Model, find_model, from_config
from .plan import DoesNotFitError, Plan, best_plan, longest, make_cluster, make_plan, policies
from .policy import Cluster, Policy
from .step import Step, predict_step

__all__ = [
    "GPUS",
    "LINKS",
    "MODELS",
    "Attention",
    "Cluster",
    "DoesNotFitError",
    "Gpu",
    "Link",
    "Memory",
    "Model",
    "Plan",
    "Policy",
    "Step",
    "attention_cost",
    "best_plan",
    "find_gpu",
    "find_link",
    "find_model",
    "from_config",
    "longest",
    "make_cluster",
    "make_plan",
    "policies",
    "predict_memory",
    "predict_step",
    "read_calibration",
]
