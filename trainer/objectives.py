"""Objectives: which sizes a step trains, with which weights, and which sizes learn from which.

An objective maps a ladder and a random generator to a `Plan`; `plan_loss` in its own file maps a plan and the pooled
states to a loss.
They depend on nothing else, so gathering across processes and gradient caching are the same for all objectives.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from modeling_2dmse.configuration_2dmse import Size

# Share of the shallow steps that reach to two thirds of the layers instead of one.
_MIDDLE_SHARE = 1 / 3


class Term(NamedTuple):
    """weight * loss(size), on the embeddings of one size."""

    size: Size
    weight: float


class Alignment(NamedTuple):
    """weight * distance of `student` to `teacher`; `kind` is `feature_kl`, `score_kl`, `query_kl`, `pca` or
    `embedding`."""

    kind: str
    student: Size
    teacher: Size
    weight: float


class Cross(NamedTuple):
    """weight * loss of the first column (queries, anchors) at one size and the other columns at another size.

    Both sizes have the same dim.
    """

    queries: Size
    documents: Size
    weight: float


class Plan(NamedTuple):
    """The computation of one step.

    Attributes:
        terms: the losses on the labeled rows.
        alignments: the alignments on the labeled rows.
        crosses: the losses between sizes on the labeled rows.
        unlabeled: the alignments on the rows without labels.
        similarity: how embeddings are compared, `cosine` or `dot`.
        teacher_given: the teacher's states are given, so that the step needs no exit of its own for them.
        feature_kl_form: the vectors of `feature_kl`, and whether its teacher is detached: see `Objective`.
    """

    terms: tuple[Term, ...]
    alignments: tuple[Alignment, ...] = ()
    crosses: tuple[Cross, ...] = ()
    unlabeled: tuple[Alignment, ...] = ()
    similarity: str = "cosine"
    teacher_given: bool = False
    feature_kl_form: str = "raw"

    @property
    def layers(self) -> tuple[int, ...]:
        """The exits that the step needs, in ascending order."""
        sizes = [term.size for term in self.terms]
        alignments = self.alignments + self.unlabeled
        sizes += [alignment.student for alignment in alignments]
        if not self.teacher_given:
            sizes += [alignment.teacher for alignment in alignments]
        sizes += [size for c in self.crosses for size in (c.queries, c.documents)]
        return tuple(sorted({size.num_layers for size in sizes}))


@dataclass(frozen=True)
class Objective:
    """One of the training objectives, set up for a model.

    Args:
        name: `2dmse`, `starbucks`, `matryoshka`, `separate` or `espresso`.
        ladder: the sizes to train, small to large.
        num_layers: number of layers of the model, N.
        hidden_size: hidden size of the model, H.
        alignment: `none`, `feature_kl`, `score_kl` or `query_kl`; by default the choice of the objective.
        alignment_weight: factor of the alignment; by default the choice of the objective.
        compression_dim: dimensions that `espresso` compresses to.
        teacher: `largest`; or `start` or `embeddings`: the teacher of `score_kl`, `query_kl` and `embedding` is the
            model before training, or vectors that are computed before, for the largest size too.
        cross_size_weight: factor of the loss of queries at each shallower size and documents at the deepest layer of
            the ladder, cut to the same dim; 0 for none.
        unlabeled_weight: factor of the alignment on texts without labels, as `alignment_weight` on the other texts; 0
            if there are none. `score_kl` replaces `query_kl` on them: they have no queries.
        similarity: how embeddings are compared, `cosine` or `dot`.
        embedding_weight: factor of the distance of each size's embedding to the teacher's first dimensions.
        shallow_steps: share of the steps that leave out the deep sizes and are cheap for it: of three such steps, two
            train only the sizes of at most a third of the layers, and one those of at most two thirds. They need a
            teacher that is not a size of the step.
        feature_kl_form: what `feature_kl` compares, cut to the student's dimensions: `raw` pooled states, whose teacher
            is not detached (the form of the authors of Starbucks and 2DMSE); `raw_detached`; or `normalized` or
            `normalized_detached` vectors.
        draw_full_dim: whether `2dmse` draws its dim from H too; the released code draws only dims below H.
        separate_full_width: whether `separate` trains all dimensions and is cut only when it is evaluated, as in
            Starbucks' code.
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
    similarity: str = "cosine"
    embedding_weight: float = 0.0
    shallow_steps: float = 0.0
    feature_kl_form: str = "raw"
    draw_full_dim: bool = False
    separate_full_width: bool = False

    def plan(self, rng: random.Random) -> Plan:
        """The sizes, weights and alignments of one step; objectives that sample sizes draw them from `rng`."""
        if self.shallow_steps and rng.random() < self.shallow_steps:
            most = self.middle_layers if rng.random() < _MIDDLE_SHARE else self.shallow_layers
            return _up_to(most, replace(self, shallow_steps=0.0).plan(rng))
        unlabeled: tuple[Alignment, ...] = ()
        if self.unlabeled_weight:
            state = rng.getstate()
            kind = "score_kl" if self.kind == "query_kl" else self.alignment
            spec = replace(self, alignment=kind, alignment_weight=self.unlabeled_weight)
            spec = replace(spec, unlabeled_weight=0.0, embedding_weight=0.0)
            unlabeled = spec.plan(rng).alignments
            rng.setstate(state)  # so that both have the same sizes
        plan = OBJECTIVES[self.name](self, rng)._replace(
            unlabeled=unlabeled, similarity=self.similarity, feature_kl_form=self.feature_kl_form
        )
        if self.teacher != "largest" and self.name != "separate":
            taught = {a.teacher: a.weight for a in plan.alignments}
            alignments = (Alignment(self.kind, size, size, weight) for size, weight in taught.items())
            plan = plan._replace(alignments=plan.alignments + tuple(alignments))
        if self.embedding_weight:
            plan = plan._replace(alignments=plan.alignments + self._to_embedding(plan))
        if not self.cross_size_weight:
            return plan
        deepest = max(size.num_layers for size in self.ladder)
        shallow = dict.fromkeys(term.size for term in plan.terms if term.size.num_layers < deepest)
        crosses = (Cross(size, Size(deepest, size.dim), self.cross_size_weight) for size in shallow)
        return plan._replace(crosses=tuple(crosses))

    @property
    def shallow_layers(self) -> int:
        """The most layers of a size that two of three shallow steps train: a third, if a size is that shallow."""
        third = max(1, self.num_layers // 3)
        return third if any(size.num_layers <= third for size in self.ladder) else self.middle_layers

    @property
    def middle_layers(self) -> int:
        """The most layers of a size that the third one trains."""
        return two_thirds(self.num_layers)

    def _to_embedding(self, plan: Plan) -> tuple[Alignment, ...]:
        """Every size that has a loss learns the teacher's first dimensions; the largest only from another teacher."""
        sizes = [term.size for term in plan.terms]
        largest = max(sizes)
        students = sizes if self.teacher != "largest" else [size for size in sizes if size != largest]
        return tuple(Alignment("embedding", size, largest, self.embedding_weight) for size in students)

    @property
    def exits(self) -> tuple[int, ...]:
        """The layers whose exits are trained, in any step."""
        draws = self.name == "2dmse"
        always = replace(self, shallow_steps=0.0)
        return tuple(range(1, self.num_layers + 1)) if draws else always.plan(random.Random(0)).layers

    @property
    def kind(self) -> str:
        """The alignment that is used."""
        return self.alignment or DEFAULT_ALIGNMENT.get(self.name, "none")


def two_thirds(num_layers: int) -> int:
    """The most layers of a size that a shallow step can train.

    >>> two_thirds(6)
    4
    """
    return max(1, 2 * num_layers // 3)


def _up_to(num_layers: int, plan: Plan) -> Plan:
    """What a plan says of the sizes of at most so many layers."""
    few = lambda size: size.num_layers <= num_layers
    return plan._replace(
        terms=tuple(term for term in plan.terms if few(term.size)),
        alignments=tuple(alignment for alignment in plan.alignments if few(alignment.student)),
        unlabeled=tuple(alignment for alignment in plan.unlabeled if few(alignment.student)),
        crosses=(),
        teacher_given=True,
    )


def geometric_dims(hidden_size: int, smallest: int = 8) -> list[int]:
    """8, 16, 32, ... below H, and H.

    Examples:
        >>> geometric_dims(384)
        [8, 16, 32, 64, 128, 256, 384]
    """
    dims = []
    while smallest < hidden_size:
        dims.append(smallest)
        smallest *= 2
    return [*dims, hidden_size]


def plan_2dmse(spec: Objective, rng: random.Random) -> Plan:
    """loss(N,H) + loss(k,H)/k + T ln(2+k) KL(k, N) + loss(N,d) + loss(k,d)/k, with T = 1.

    The weights are those of the authors' code, not of the paper. 1/k is in the releases 0.3.8 to 0.3.10 of angle-emb,
    ln(2+k) only in the repository between 2024-02-29 and 2024-03-02; in the first release with 2DMSE, 0.3.4, all
    weights are 1. All of them draw d from 8, 16, 32, ... below H.
    """
    n, h = spec.num_layers, spec.hidden_size
    dims = geometric_dims(h)
    dim = rng.choice(dims if spec.draw_full_dim else dims[:-1] or dims)
    if n == 1:
        return Plan((Term(Size(1, h), 1.0), Term(Size(1, dim), 1.0)))
    k = rng.randint(1, n - 1)
    full, shallow = Size(n, h), Size(k, h)
    terms = (Term(full, 1.0), Term(shallow, 1 / k), Term(Size(n, dim), 1.0), Term(Size(k, dim), 1 / k))
    weight = math.log(2 + k) * _weight(spec, 1.0)
    return Plan(terms, () if spec.kind == "none" else (Alignment(spec.kind, shallow, full, weight),))


def plan_starbucks(spec: Objective, rng: random.Random) -> Plan:
    """Every size of the ladder in every step; all sizes except the largest learn from the largest (Starbucks, SRL)."""
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
    """loss at the largest size of the ladder only, as for a small model that is trained alone (Starbucks, table A1).

    The authors' code trains all dimensions of the cut model and cuts the embeddings when it evaluates
    (`separate_full_width`). With a teacher's embeddings, the size also learns their similarities.
    """
    size = spec.ladder[-1]
    full = Size(size.num_layers, spec.hidden_size)
    student = full if spec.separate_full_width else size
    aligned = spec.teacher == "embeddings" and spec.kind != "none"
    alignments = (Alignment(spec.kind, student, full, _weight(spec, 1.0)),) if aligned else ()
    return Plan((Term(student, 1.0),), alignments)


def plan_espresso(spec: Objective, rng: random.Random) -> Plan:
    """loss(N,H) + sum over layers n of w_n (loss(n,k) + PCA alignment at n) (ESE).

    w_n = 1 / ((1 + ln n) (N - 1)) below the last layer, as in the authors' code, and w_N = 1.
    """
    n, k = spec.num_layers, min(spec.compression_dim, spec.hidden_size)
    weights = {layer: 1 / ((1 + math.log(layer)) * (n - 1)) for layer in range(1, n)} | {n: 1.0}
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
