"""Trainers of the ideas that were tried for our recipe, or are still to be tried; docs/lab-notes.md reports effects.

Each is a TwoDMSETrainer that changes one thing. The attribute with the idea's name, a number, sets how much.
"""

import random

import torch

from modeling_2dmse import Size
from modeling_2dmse.encoding import to_embeddings
from trainer import TwoDMSETrainer
from trainer.alignment import query_kl, score_kl
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


class FinalPhase(TwoDMSETrainer):
    """In the last share of the steps, only the exits' projections are trained; all other weights are frozen."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.encoder.exit_projections is None:
            raise ValueError("idea: final_phase needs exits with projections (--exit_projections true)")

    def training_step(self, *args, **kwargs):
        if self.state.global_step >= (1 - self.final_phase) * self.state.max_steps:
            for name, parameter in self.encoder.named_parameters():
                parameter.requires_grad_(name.startswith("exit_projections."))
        return super().training_step(*args, **kwargs)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.encoder.requires_grad_(True)


class StateIdea(PlanIdea):
    """An idea that adds to the loss of a step, or to its gradient, from the pooled states."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.gradient_cache_chunk_size is not None or self.args.world_size > 1:
            raise ValueError("idea: it needs one process and no gradient_cache_chunk_size")

    def change(self, plan):
        self.step_plan = super().change(plan)
        return self.step_plan

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + self.more_loss(outputs.layer_embeddings, sum(inputs["counts"]))
        return (loss, outputs) if return_outputs else loss

    def more_loss(self, states: torch.Tensor, labeled: int) -> torch.Tensor | float:
        """What is added to the loss, from the states (L, rows, H), whose first `labeled` rows have labels."""
        return 0.0

    def embedding(self, states: torch.Tensor, size: Size, labeled: int) -> torch.Tensor:
        """(labeled, dim), the embeddings of a size."""
        state = states[self.step_plan.layers.index(size.num_layers)][:labeled]
        return to_embeddings(state, size.dim, self.encoder.config.similarity)


class Chain(StateIdea):
    """A share of the weight of score_kl goes to the similarities of the next larger size of the same step."""

    def change(self, plan):
        self.chained = [a for a in plan.alignments if a.kind == "score_kl" and a.student != self.ladder[-1]]
        less = [a._replace(weight=a.weight * (1 - self.chain)) if a in self.chained else a for a in plan.alignments]
        return super().change(plan._replace(alignments=tuple(less)))

    def more_loss(self, states, labeled):
        total = super().more_loss(states, labeled)
        for alignment in self.chained:
            larger = self.ladder[self.ladder.index(alignment.student) + 1]
            student, teacher = (self.embedding(states, size, labeled) for size in (alignment.student, larger))
            total = total + alignment.weight * self.chain * score_kl(student, teacher, self.loss_scale)
        return total


class Bank(StateIdea):
    """score_kl also compares each row with the vectors of earlier steps (cross-batch memory, Wang et al. 2020)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.teacher == "embeddings":
            raise ValueError("idea: bank needs the teacher largest or start")
        self.banks: dict[Size, tuple[torch.Tensor, torch.Tensor]] = {}
        self.start_state: torch.Tensor | None = None

    def _start_state(self, *args, **kwargs):
        self.start_state = super()._start_state(*args, **kwargs)
        return self.start_state

    def more_loss(self, states, labeled):
        total = super().more_loss(states, labeled)
        for alignment in self.step_plan.alignments:
            if alignment.kind != "score_kl":
                continue
            student = self.embedding(states, alignment.student, labeled)
            teacher = self.embedding(states, alignment.teacher, labeled).detach()
            if self.start_state is not None:
                state = self.start_state[:labeled]
                teacher = to_embeddings(state, alignment.teacher.dim, self.encoder.config.similarity)
            now, kept = (student, teacher), self.banks.get(alignment.student)
            if kept is not None:
                sides = [torch.cat(pair) for pair in zip(now, kept, strict=True)]
                total = total + alignment.weight * query_kl(*sides, len(student), self.loss_scale)
            joined = now if kept is None else [torch.cat(pair) for pair in zip(kept, now, strict=True)]
            self.banks[alignment.student] = tuple(side.detach()[-int(self.bank) :] for side in joined)
        return total


class BalancedGradients(StateIdea):
    """Each exit's gradient is multiplied by (mean norm / its norm) to a power: 1 makes the norms of all exits equal."""

    def more_loss(self, states, labeled):
        if states.requires_grad:
            states.register_hook(self._balance)
        return super().more_loss(states, labeled)

    def _balance(self, gradient: torch.Tensor) -> torch.Tensor:
        norms = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        return gradient * ((norms.mean() / norms) ** self.balanced_gradients)[:, None, None]


TRAINERS = {
    "own_alignment": OwnAlignment,
    "largest_loss": LargestLoss,
    "drawn_sizes": DrawnSizes,
    "shallow_gradient": ShallowGradient,
    "layerwise_rates": LayerwiseRates,
    "angle_beside": AngleBeside,
    "weakened_directions": WeakenedDirections,
    "final_phase": FinalPhase,
    "chain": Chain,
    "bank": Bank,
    "balanced_gradients": BalancedGradients,
}


def idea_trainer(strengths: dict[str, float]) -> type[TwoDMSETrainer]:
    """The trainer of several ideas at once.

    Args:
        strengths: the number of each idea by its name, a key of TRAINERS.
    """
    return type("IdeaTrainer", tuple(TRAINERS[name] for name in strengths), dict(strengths))
