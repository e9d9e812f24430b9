"""Objectives: which sizes a step trains, with which weights, and which sizes learn from which.

An objective turns a ladder and a random generator into a `Plan`; `plan_loss` turns a plan and the pooled states into
a loss. Nothing else enters, which is what makes gathering across processes and gradient caching the same for all.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from modeling_2dmse.configuration_2dmse import Size
from modeling_2dmse.pooling import cut_and_normalize

from .alignment import feature_kl, pca_distance, score_kl
from .losses import SCALE, Rows, base_loss

ALIGNMENTS = ("none", "feature_kl", "score_kl")
TEACHERS = ("largest", "start")


class Term(NamedTuple):
    """weight * loss(size)."""

    size: Size
    weight: float


class Alignment(NamedTuple):
    """weight * distance of `student` to `teacher`; `kind` is feature_kl, raw_feature_kl, score_kl or pca."""

    kind: str
    student: Size
    teacher: Size
    weight: float


class Cross(NamedTuple):
    """weight * loss of the first column's texts (queries, anchors) at one size against the others at another.

    Both sizes have the same dim.
    """

    queries: Size
    documents: Size
    weight: float


class Plan(NamedTuple):
    """What one step computes: terms, alignments and crosses on the labelled rows, `unlabeled` on those without labels."""

    terms: tuple[Term, ...]
    alignments: tuple[Alignment, ...] = ()
    crosses: tuple[Cross, ...] = ()
    unlabeled: tuple[Alignment, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """The exits the step needs, ascending."""
        sizes = [term.size for term in self.terms]
        sizes += [size for a in self.alignments + self.unlabeled for size in (a.student, a.teacher)]
        sizes += [size for c in self.crosses for size in (c.queries, c.documents)]
        return tuple(sorted({size.num_layers for size in sizes}))


@dataclass(frozen=True)
class Objective:
    """One of the training objectives, set up for a model.

    Args:
        name: `2dmse`, `starbucks`, `matryoshka`, `separate` or `espresso`.
        ladder: the sizes to train, small to large.
        num_layers: layers of the model, N.
        hidden_size: H.
        alignment: `none`, `feature_kl` or `score_kl`; the objective's own choice when left out.
        alignment_weight: factor of the alignment; the objective's own when left out.
        compression_dim: dimensions that `espresso` compresses to.
        teacher: `largest`, or `start`: score_kl's teacher is the model before training, for the largest size too.
        cross_size_weight: factor of the loss of queries at each shallower size against documents at the ladder's
            deepest layer, cut to the same dim; 0 for none.
        unlabeled_weight: factor of the alignment on texts without labels, as alignment_weight is on the others; 0 where
            there are none.
    """

    name: str
    ladder: Sequence[Size]
    num_layers: int
    hidden_size: int
    alignment: str | None = None
    alignment_weight: float | None = None
    compression_dim: int = 128
    teacher: str = "largest"
    cross_size_weight: float = 0.0
    unlabeled_weight: float = 0.0

    def plan(self, rng: random.Random) -> Plan:
        """The sizes, weights and alignments of one step; `rng` decides where the objective samples."""
        unlabeled = ()
        if self.unlabeled_weight:
            state = rng.getstate()
            unlabeled = replace(self, alignment_weight=self.unlabeled_weight, unlabeled_weight=0.0).plan(rng).alignments
            rng.setstate(state)  # the same sizes for both
        plan = OBJECTIVES[self.name](self, rng)._replace(unlabeled=unlabeled)
        if self.teacher == "start":
            taught = {a.teacher: a.weight for a in plan.alignments}
            alignments = (Alignment("score_kl", size, size, weight) for size, weight in taught.items())
            plan = plan._replace(alignments=plan.alignments + tuple(alignments))
        if not self.cross_size_weight:
            return plan
        deepest = max(size.num_layers for size in self.ladder)
        shallow = dict.fromkeys(term.size for term in plan.terms if term.size.num_layers < deepest)
        crosses = (Cross(size, Size(deepest, size.dim), self.cross_size_weight) for size in shallow)
        return plan._replace(crosses=tuple(crosses))

    @property
    def exits(self) -> tuple[int, ...]:
        """The layers that some step trains an exit behind."""
        draws = self.name == "2dmse"
        return tuple(range(1, self.num_layers + 1)) if draws else self.plan(random.Random(0)).layers

    @property
    def kind(self) -> str:
        """The alignment in force."""
        return self.alignment or DEFAULT_ALIGNMENT.get(self.name, "none")


def geometric_dims(hidden_size: int, smallest: int = 8) -> list[int]:
    """8, 16, 32, ... below H, then H: the dims that `2dmse` draws from.

    >>> geometric_dims(384)
    [8, 16, 32, 64, 128, 256, 384]
    """
    dims = []
    while smallest < hidden_size:
        dims.append(smallest)
        smallest *= 2
    return [*dims, hidden_size]


def plan_2dmse(spec: Objective, rng: random.Random) -> Plan:
    """loss(N,H) + loss(k,H)/k + T ln(2+k) KL(k, N) + loss(N,d) + loss(k,d)/k (2DMSE, section 3.2; T = 1)."""
    n, h = spec.num_layers, spec.hidden_size
    dim = rng.choice(geometric_dims(h))
    if n == 1:
        return Plan((Term(Size(1, h), 1.0), Term(Size(1, dim), 1.0)))
    k = rng.randint(1, n - 1)
    full, shallow = Size(n, h), Size(k, h)
    terms = (Term(full, 1.0), Term(shallow, 1 / k), Term(Size(n, dim), 1.0), Term(Size(k, dim), 1 / k))
    weight = math.log(2 + k) * _weight(spec, 1.0)
    kind = "raw_feature_kl" if spec.kind == "feature_kl" else spec.kind
    return Plan(terms, () if kind == "none" else (Alignment(kind, shallow, full, weight),))


def plan_starbucks(spec: Objective, rng: random.Random) -> Plan:
    """Every size of the ladder, every step, and all but the largest learn from the largest (Starbucks, SRL)."""
    largest = spec.ladder[-1]
    terms = tuple(Term(size, 1.0) for size in spec.ladder)
    if spec.kind == "none":
        return Plan(terms)
    # 0.3 is the factor of Starbucks' STS code; its retrieval code, which aligns scores, uses 1.
    weight = _weight(spec, 0.3 if spec.kind == "feature_kl" else 1.0)
    return Plan(terms, tuple(Alignment(spec.kind, size, largest, weight) for size in spec.ladder[:-1]))


def plan_matryoshka(spec: Objective, rng: random.Random) -> Plan:
    """loss(N, d) for every dim of the ladder (MRL, eq. 1, all weights 1)."""
    sizes = [Size(spec.num_layers, dim) for dim in sorted({size.dim for size in spec.ladder})]
    return plan_starbucks(replace(spec, ladder=sizes, alignment=spec.kind), rng)


def plan_separate(spec: Objective, rng: random.Random) -> Plan:
    """loss at the ladder's largest size alone: the small model that is trained on its own (Starbucks, table A1)."""
    return Plan((Term(spec.ladder[-1], 1.0),))


def plan_espresso(spec: Objective, rng: random.Random) -> Plan:
    """loss(N,H) + sum over layers n of w_n (loss(n,k) + PCA alignment at n), w_n = 1 / (1 + ln n), w_N = 1 (ESE)."""
    n, k = spec.num_layers, min(spec.compression_dim, spec.hidden_size)
    weights = {layer: 1 / (1 + math.log(layer)) for layer in range(1, n)} | {n: 1.0}
    terms = [Term(Size(n, spec.hidden_size), 1.0)]
    terms += [Term(Size(layer, k), weight) for layer, weight in weights.items()]
    factor = _weight(spec, 1.0)
    return Plan(
        tuple(terms),
        tuple(Alignment("pca", Size(layer, k), Size(layer, k), weight * factor) for layer, weight in weights.items()),
    )


def _weight(spec: Objective, default: float) -> float:
    return default if spec.alignment_weight is None else spec.alignment_weight


OBJECTIVES = {
    "2dmse": plan_2dmse,
    "starbucks": plan_starbucks,
    "matryoshka": plan_matryoshka,
    "separate": plan_separate,
    "espresso": plan_espresso,
}
DEFAULT_ALIGNMENT = {"2dmse": "feature_kl", "starbucks": "score_kl"}


def plan_parts(
    plan: Plan,
    states: Sequence[torch.Tensor],
    rows: Rows,
    loss: str,
    scale: float = SCALE,
    start: torch.Tensor | None = None,
) -> Iterator[tuple[str, float, torch.Tensor]]:
    """The parts of a step's loss, one after the other.

    Args:
        plan: what to compute.
        states: one (rows, hidden) of pooled states, raw, for each of plan.layers.
        rows: the roles of the rows.
        loss: name of the base loss.
        start: (rows, hidden), what the model before training gives behind the layers of the alignments' teacher, which
            it then takes the place of in score_kl.

    Yields:
        name (`loss/2x64`, `alignment/2x64`, `unlabeled/2x64`, `cross/2x64`), weight and value. The parts share the
        states alone, so that each can be gone backward from, and its graph dropped, before the next is made.
    """
    if len(states) != len(plan.layers):
        raise ValueError(f"states: {len(states)} exits are given, the plan needs {len(plan.layers)}")

    def state(num_layers: int) -> torch.Tensor:
        return states[plan.layers.index(num_layers)].float()

    def embedding(size: Size) -> torch.Tensor:
        return cut_and_normalize(rows.labelled(state(size.num_layers)), size.dim)

    def distance(alignment: Alignment, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        kind, student, teacher, _ = alignment
        above = start if start is not None and kind == "score_kl" else state(teacher.num_layers)
        return _distance(kind, student.dim, teacher.dim, part(state(student.num_layers)), part(above), scale)

    # No tensor has a name here: it would be held while the caller goes backward and through the parts behind.
    for size, weight in plan.terms:
        yield f"loss/{size}", weight, base_loss(loss, embedding(size), rows, scale)
    for name, alignments, part in (
        ("alignment", plan.alignments, rows.labelled),
        ("unlabeled", plan.unlabeled, rows.unlabeled_states),
    ):
        for alignment in alignments:
            yield f"{name}/{alignment.student}", alignment.weight, distance(alignment, part)
    first = rows.counts[0]
    for queries, documents, weight in plan.crosses:
        joined = torch.cat((state(queries.num_layers)[:first], rows.labelled(state(documents.num_layers))[first:]))
        yield f"cross/{queries}", weight, base_loss(loss, cut_and_normalize(joined, queries.dim), rows, scale)


@torch.enable_grad()
def plan_gradient(
    plan: Plan, states: torch.Tensor, rows: Rows, loss: str, scale: float = SCALE, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The loss of a step, from the arguments of `plan_parts`, with its gradient.

    Returns:
        the weighted sum, each part by name without its weight, and the gradient with respect to the states; none has a
        graph. Part by part, so that the matrices of one size at a time are held.
    """
    gradient = torch.zeros_like(states)
    # One leaf an exit, which adds to its own slice: the gradient of an index would be as large as all exits.
    leaves = [state.detach().requires_grad_() for state in states]
    for leaf, slot in zip(leaves, gradient, strict=True):
        leaf.grad = slot
    total, parts = states.new_zeros((), dtype=torch.float32), {}
    for name, weight, value in plan_parts(plan, leaves, rows, loss, scale, start):
        (weight * value).backward()
        total, parts[name] = total + weight * value.detach(), value.detach()
    return total, parts, gradient


def plan_loss(
    plan: Plan, states: torch.Tensor, rows: Rows, loss: str, scale: float = SCALE, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a step, to go backward from, and each part by name; from the arguments of `plan_parts`."""
    total, parts, gradient = plan_gradient(plan, states, rows, loss, scale, start)
    return _WithGradient.apply(states, total, gradient), parts


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to the states is known already, and is used up by going backward once."""

    @staticmethod
    def forward(ctx, states, value, gradient):
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("plan_loss: its loss can be gone backward from once")
        return gradient.mul_(grad_value), None, None


def _distance(
    kind: str, dim: int, teacher_dim: int, state: torch.Tensor, teacher: torch.Tensor, scale: float
) -> torch.Tensor:
    """The named distance of one exit's (rows, H) at `dim` to the teacher's (rows, H) at its own."""
    if kind == "pca":
        return pca_distance(state, dim)
    if kind == "raw_feature_kl":
        return feature_kl(state, teacher)
    if kind == "feature_kl":
        return feature_kl(cut_and_normalize(state, dim), cut_and_normalize(teacher, dim))
    return score_kl(cut_and_normalize(state, dim), cut_and_normalize(teacher, teacher_dim), scale)
