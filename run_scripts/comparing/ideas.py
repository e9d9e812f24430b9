"""Trainers of the ideas that were tried for our recipe and dropped; docs/lab-notes.md reports the effect of each.

Each is a TwoDMSETrainer that changes one thing. The attribute with the idea's name, a number, sets how much.
"""

import random

from modeling_2dmse import Size
from trainer import TwoDMSETrainer
from trainer.averaging import initial_shares
from trainer.data import texts_to_fit
from trainer.losses import SCORE_LOSSES, angle, cosent
from trainer.objectives import Plan, Term, geometric_dims

# The narrowest dim of drawn sizes.
SMALLEST_DRAWN = 32


class PlanIdea(TwoDMSETrainer):
    """An idea that changes what a step computes."""

    def _step(self, inputs):
        *step, plan, targets = super()._step(inputs)
        return (*step, self.change(plan), targets)

    def change(self, plan: Plan) -> Plan:
        """The plan of the step, made from the objective's plan."""
        return plan


class OwnAlignment(PlanIdea):
    """The largest size learns from the start (`--teacher start`) with its own weight."""

    def change(self, plan):
        largest = self.ladder[-1]
        own = [a._replace(weight=self.own_alignment) if a.student == largest else a for a in plan.alignments]
        return super().change(plan._replace(alignments=tuple(own)))


class LargestLoss(PlanIdea):
    """The base loss has another weight at the largest size than at the others, where it stays 1."""

    def change(self, plan):
        terms = [t._replace(weight=self.largest_loss) if t.size == self.ladder[-1] else t for t in plan.terms]
        return super().change(plan._replace(terms=tuple(terms)))


class DrawnSizes(PlanIdea):
    """Each step also trains further sizes, of any layer and of 32, 64, ... H dims, in the same way as the ladder's."""

    def change(self, plan):
        rng = random.Random(f"drawn-{self.args.seed}-{self.state.global_step}")
        dims = geometric_dims(self.encoder.config.hidden_size, SMALLEST_DRAWN)
        layers = range(1, self.encoder.num_layers + 1)
        grid = [Size(n, dim) for n in layers for dim in dims if Size(n, dim) not in self.ladder]
        drawn, pattern = rng.sample(grid, int(self.drawn_sizes)), plan.alignments[0]
        return super().change(
            plan._replace(
                terms=plan.terms + tuple(Term(size, 1.0) for size in drawn),
                alignments=plan.alignments + tuple(pattern._replace(student=size) for size in drawn),
            )
        )


class ShallowGradient(TwoDMSETrainer):
    """The gradient that shallower exits send into the layers they share is scaled; their projections get all of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.encoder.exit_projections is None:
            raise ValueError("idea: shallow_gradient needs exits with projections (--exit_projections true)")
        for projection in self.encoder.exit_projections[:-1]:
            projection.register_full_backward_hook(lambda _, into, out: (self.shallow_gradient * into[0],))


class LayerwiseRates(TwoDMSETrainer):
    """Each layer learns at a factor of the rate of the layer below it; embeddings learn at that of the first layer."""

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        shares = initial_shares(self.encoder, self.encoder.num_layers - 1)
        depth = {id(parameter): shares[name] for name, parameter in self.encoder.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            for below in sorted({depth[id(parameter)] for parameter in group["params"]}):
                own = [parameter for parameter in group["params"] if depth[id(parameter)] == below]
                groups.append(group | {"params": own, "lr": group["lr"] * self.layerwise_rates**below})
        optimizer.param_groups[:] = groups
        return optimizer


class AngleBeside(TwoDMSETrainer):
    """AnglE's loss, weighted, is added to CoSENT."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.loss != "cosent":
            raise ValueError(f"idea: angle_beside needs the loss cosent, not {self.args.loss}")
        SCORE_LOSSES["cosent+angle"] = lambda *sides: cosent(*sides) + self.angle_beside * angle(*sides)
        self.args.loss = "cosent+angle"


class WeakenedDirections(TwoDMSETrainer):
    """Shallow exits are fitted to targets whose directions are divided by their variance to this power."""

    def _fit_on_training_texts(self, layers=None):
        super()._fit_on_training_texts(layers)
        settings = {"max_length": self.args.max_length, "convert_to_tensor": True, "show_progress_bar": False}
        texts = texts_to_fit(self.train_tables, self.train_dataset, self.args.seed)
        embeddings = self.encoder.encode(texts, **settings)
        variance = embeddings.double().square().mean(dim=0)
        factor = (variance / variance.mean()).clamp(min=0.01) ** -self.weakened_directions
        for projection in self.encoder.exit_projections[:-1]:
            projection.weight.data.mul_(factor[:, None])


TRAINERS = {
    "own_alignment": OwnAlignment,
    "largest_loss": LargestLoss,
    "drawn_sizes": DrawnSizes,
    "shallow_gradient": ShallowGradient,
    "layerwise_rates": LayerwiseRates,
    "angle_beside": AngleBeside,
    "weakened_directions": WeakenedDirections,
}


def idea_trainer(strengths: dict[str, float]) -> type[TwoDMSETrainer]:
    """The trainer of several ideas at once.

    Args:
        strengths: the number of each idea by its name, a key of TRAINERS.
    """
    return type("IdeaTrainer", tuple(TRAINERS[name] for name in strengths), dict(strengths))
