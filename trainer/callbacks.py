"""Callbacks that the trainers share."""

from transformers import TrainerCallback


class EvaluateLastStep(TrainerCallback):
    """Evaluates after the last step too, so that the final weights compete for the best checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class TellEpoch(TrainerCallback):
    """Sets `target.epoch`, from which a sampler or collator derives its random choices, at each epoch's begin.

    accelerate does the same for samplers, but not for one that is wrapped to skip batches in a resumed run of several
    processes.
    """

    def __init__(self, target):
        self.target = target

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.target.epoch = int(state.epoch or 0)
