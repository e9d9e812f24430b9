"""Training of elastic encoders: objectives, losses, alignment, data and evaluation.

The names below are imported when they are first used, so that the trainers of the siblings (`trainer.franca` and
others) do not load the encoder's.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arguments import TwoDMSETrainingArguments
    from .gates import fit_exit_gates
    from .objectives import Objective, Plan
    from .projections import fit_exit_projections
    from .step_loss import plan_loss
    from .trainer import TwoDMSETrainer

__all__ = [
    "Objective",
    "Plan",
    "TwoDMSETrainer",
    "TwoDMSETrainingArguments",
    "fit_exit_gates",
    "fit_exit_projections",
    "plan_loss",
]

_MODULES = {
    "Objective": "objectives",
    "Plan": "objectives",
    "TwoDMSETrainer": "trainer",
    "TwoDMSETrainingArguments": "arguments",
    "fit_exit_gates": "gates",
    "fit_exit_projections": "projections",
    "plan_loss": "step_loss",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
