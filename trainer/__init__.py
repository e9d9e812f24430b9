"""How an elastic encoder learns: objectives, losses, alignment, data and evaluation."""

from .arguments import TwoDMSETrainingArguments
from .objectives import Objective, Plan, plan_loss
from .projections import fit_exit_projections
from .trainer import TwoDMSETrainer

__all__ = [
    "Objective",
    "Plan",
    "TwoDMSETrainer",
    "TwoDMSETrainingArguments",
    "fit_exit_projections",
    "plan_loss",
]
