"""The loss of a step and its gradient, from a plan and the pooled states.

The sizes of a step are computed at once in a few large kernels (`plan_groups`), or one after another if their matrices
would take too much memory (`plan_parts`).
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from modeling_2dmse.configuration_2dmse import Size
from modeling_2dmse.encoding import to_embeddings
from modeling_2dmse.packing import to_device

from . import stacked
from .alignment import embedding_distance, feature_kl, pca_distance, query_kl, score_kl
from .choices import LOSSES
from .losses import SCALE, Rows, base_loss
from .objectives import Alignment, Plan

# Numbers in the matrices of similarities of all sizes up to which the sizes of a step are computed at once.
_STACKED_SCORES = {"cpu": 2**22, "cuda": 2**26}
_STACKED = ("score_kl", "query_kl", "feature_kl", "embedding")
# The alignments in which the model before training, or embeddings of another one, may be the teacher.
_OF_SCORES = ("score_kl", "query_kl")
_OF_START = (*_OF_SCORES, "embedding")


def plan_parts(
    plan: Plan,
    states: Sequence[torch.Tensor],
    rows: Rows,
    loss: str,
    scale: float = SCALE,
    start: torch.Tensor | None = None,
) -> Iterator[tuple[str, float, torch.Tensor]]:
    """The parts of a step's loss, one after another.

    The parts share only the states. So the backward pass of one part can run, and its graph be freed, before the next
    part is computed.

    Args:
        plan: the computation.
        states: the raw pooled states, (rows, hidden) for each of `plan.layers`.
        rows: the roles of the rows.
        loss: name of the base loss.
        scale: the factor of the similarities (1 / temperature).
        start: (rows, hidden), the pooled states of the model before training after the layers of the teacher, which
            they replace in `score_kl`, `query_kl` and `embedding`.

    Yields:
        name (`loss/2x64`, `alignment/2x64`, `embedding/2x64`, `unlabeled/2x64` or `cross/2x64`), weight and value.
    """
    if len(states) != len(plan.layers):
        raise ValueError(f"states: {len(states)} exits are given, the plan needs {len(plan.layers)}")

    def state(num_layers: int) -> torch.Tensor:
        return states[plan.layers.index(num_layers)].float()

    def embedding(size: Size) -> torch.Tensor:
        return to_embeddings(rows.labeled_states(state(size.num_layers)), size.dim, plan.similarity)

    def distance(alignment: Alignment, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        given = start if alignment.kind in _OF_START else None
        above = state(alignment.teacher.num_layers) if given is None else given
        sides = part(state(alignment.student.num_layers)), part(above)
        return _distance(alignment, *sides, plan, rows.counts[0], scale)

    # No tensor has a name here: it would stay in memory during the caller's backward pass and the next parts.
    for size, weight in plan.terms:
        yield f"loss/{size}", weight, base_loss(loss, embedding(size), rows, scale)
    for name, alignments, part in (
        ("alignment", plan.alignments, rows.labeled_states),
        ("unlabeled", plan.unlabeled, rows.unlabeled_states),
    ):
        for alignment in alignments:
            yield _name(name, alignment), alignment.weight, distance(alignment, part)
    first = rows.counts[0]
    for queries, documents, weight in plan.crosses:
        joined = torch.cat(
            (state(queries.num_layers)[:first], rows.labeled_states(state(documents.num_layers))[first:])
        )
        vectors = to_embeddings(joined, queries.dim, plan.similarity)
        yield f"cross/{queries}", weight, base_loss(loss, vectors, rows, scale)


def fits_stacked(plan: Plan, rows: Rows, device: torch.device) -> bool:
    """Whether the matrices of all sizes of a step may be in memory together."""
    labeled, sizes = sum(rows.counts), max(len(plan.terms), len(plan.alignments))
    scores = max(sizes * labeled**2, len(plan.unlabeled) * rows.unlabeled**2)
    return scores <= _STACKED_SCORES.get(device.type, _STACKED_SCORES["cpu"])


def plan_groups(
    plan: Plan, states: torch.Tensor, rows: Rows, loss: str, scale: float = SCALE, start: torch.Tensor | None = None
) -> Iterator[tuple[list[str], list[float], torch.Tensor]]:
    """The parts of `plan_parts` in groups that are computed at once.

    The arguments are those of `plan_parts`, but `states` is one tensor, (L, rows, hidden).

    Yields:
        names, weights and values, (parts,), of a group.
    """
    labeled = sum(rows.counts)
    sides = {"alignment": slice(0, labeled), "unlabeled": slice(labeled, None)}

    @functools.cache  # losses and alignments are of the same vectors
    def vectors(sizes: tuple[Size, ...], side: str, similarity: str) -> torch.Tensor:
        index = [plan.layers.index(size.num_layers) for size in sizes]
        exits = states
        if index != list(range(len(states))):
            exits = states.index_select(0, to_device(np.asarray(index), states.device))
        return stacked.to_embeddings(exits[:, sides[side]], [size.dim for size in sizes], similarity)

    if plan.terms:
        sizes = tuple(term.size for term in plan.terms)
        embeddings = vectors(sizes, "alignment", plan.similarity)
        values = stacked.base_loss(loss, embeddings, [size.dim for size in sizes], rows, scale)
        yield [f"loss/{size}" for size in sizes], [term.weight for term in plan.terms], values
    for name, alignments in (("alignment", plan.alignments), ("unlabeled", plan.unlabeled)):
        for (kind, teacher), found in itertools.groupby(_stackable(alignments), lambda a: (a.kind, a.teacher)):
            group = list(found)
            students = tuple(alignment.student for alignment in group)
            embeddings, dims = vectors(students, name, _compared_as(plan, kind)), [size.dim for size in students]
            given = start if kind in _OF_START else None
            above = states[plan.layers.index(teacher.num_layers)] if given is None else given
            values = _distances(plan, kind, teacher, embeddings, dims, above[sides[name]], rows.counts[0], scale)
            yield [_name(name, alignment) for alignment in group], [alignment.weight for alignment in group], values
    others = [tuple(a for a in kept if a.kind not in _STACKED) for kept in (plan.alignments, plan.unlabeled)]
    alone = plan._replace(terms=(), alignments=others[0], unlabeled=others[1])
    exits = [states[plan.layers.index(num_layers)] for num_layers in alone.layers]
    for part, weight, value in plan_parts(alone, exits, rows, loss, scale):
        yield [part], [weight], value[None]


def _distances(
    plan: Plan,
    kind: str,
    teacher: Size,
    students: torch.Tensor,
    dims: Sequence[int],
    above: torch.Tensor,
    queries: int,
    scale: float,
) -> torch.Tensor:
    """(S,), the distance of each size's vectors, (S, rows, largest dim), to the teacher's states, (rows, H)."""
    if kind != "feature_kl" or _detaches(plan):
        above = above.detach()
    if kind in _OF_SCORES:
        target = to_embeddings(above, teacher.dim, plan.similarity)
        if kind == "score_kl":
            return stacked.score_kl(students, target, scale)
        return stacked.query_kl(students, target, queries, scale)
    targets = stacked.to_embeddings(above.expand(len(dims), *above.shape), dims, _compared_as(plan, kind))
    if kind == "embedding":
        return stacked.embedding_distance(students, targets)
    return stacked.feature_kl(students, targets, dims)


def _compared_as(plan: Plan, kind: str) -> str:
    """The similarity whose vectors an alignment compares: those of `dot` are not normalised."""
    if kind != "feature_kl":
        return plan.similarity
    return "dot" if plan.feature_kl_form.startswith("raw") else "cosine"


def _detaches(plan: Plan) -> bool:
    """Whether the teacher of `feature_kl` is detached."""
    return plan.feature_kl_form.endswith("_detached")


def _name(side: str, alignment: Alignment) -> str:
    """The name of a part; a size may learn both similarities and embeddings on the same rows."""
    return f"{'embedding' if alignment.kind == 'embedding' else side}/{alignment.student}"


def _stackable(alignments: Sequence[Alignment]) -> list[Alignment]:
    return [alignment for alignment in alignments if alignment.kind in _STACKED]


@torch.enable_grad()
def plan_gradient(
    plan: Plan, states: torch.Tensor, rows: Rows, loss: str, scale: float = SCALE, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The loss of a step, with its gradient; the arguments are those of `plan_groups`.

    Returns:
        the weighted sum, the value of each part by name (without its weight), and the gradient with respect to the
        states. None of them has a graph.
    """
    gradient = torch.zeros_like(states)
    if loss in LOSSES and fits_stacked(plan, rows, states.device):
        leaf = states.detach().requires_grad_()
        leaf.grad = gradient
        names, weights, values = zip(*plan_groups(plan, leaf, rows, loss, scale, start), strict=True)
        joined = torch.cat(values)
        factors = np.asarray(list(itertools.chain.from_iterable(weights)), dtype=np.float32)
        total = (joined * to_device(factors, joined.device)).sum()
        total.backward()
        parts = dict(zip(itertools.chain.from_iterable(names), joined.detach().unbind(), strict=True))
        return total.detach(), parts, gradient
    # One leaf per exit, whose gradient is a slice: the gradient of an indexing would be as large as all exits.
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
    """The loss of a step; the arguments are those of `plan_parts`.

    Args:
        plan: the computation.
        states: (L, rows, hidden), the raw pooled states after each of `plan.layers`.
        rows: the roles of the rows.
        loss: name of the base loss.
        scale: the factor of the similarities (1 / temperature).
        start: (rows, hidden), the states of the model before training, if it is the teacher.

    Returns:
        the weighted sum, whose backward can run only once, and the value of each part by name.
    """
    total, parts, gradient = plan_gradient(plan, states, rows, loss, scale, start)
    return _WithGradient.apply(states, total, gradient), parts


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to the states is known already; backward uses it up."""

    @staticmethod
    def forward(ctx, states, value, gradient):
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("plan_loss: backward can run only once on its loss")
        return gradient.mul_(grad_value), None, None


def _distance(
    alignment: Alignment, state: torch.Tensor, teacher: torch.Tensor, plan: Plan, queries: int, scale: float
) -> torch.Tensor:
    """The distance of one exit's states (rows, H) to the teacher's states (rows, H)."""
    kind, dim = alignment.kind, alignment.student.dim
    if kind == "pca":
        return pca_distance(state, dim)
    similarity = _compared_as(plan, kind)
    student = to_embeddings(state, dim, similarity)
    if kind == "feature_kl":
        return feature_kl(student, to_embeddings(teacher, dim, similarity), _detaches(plan))
    if kind == "embedding":
        return embedding_distance(student, to_embeddings(teacher, dim, similarity))
    target = to_embeddings(teacher, alignment.teacher.dim, similarity)
    return score_kl(student, target, scale) if kind == "score_kl" else query_kl(student, target, queries, scale)
