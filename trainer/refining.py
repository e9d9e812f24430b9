"""Training exit projections alone, on states that are computed once: seconds instead of minutes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.nn.utils.parametrizations import orthogonal
from transformers.utils import logging

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.encoding import to_embeddings
from modeling_2dmse.projection import ExitProjection

from .projections import check_at_hand

STEPS, RATE, SCALE = 300, 2e-3, 20.0
# Texts of a step whose similarities are learned, and the most texts that they are compared with.
QUERIES, _DOCUMENTS = 256, 4096
# What InfoNCE of the queries counts beside the divergence (docs/lab-notes.md).
_PAIR_WEIGHT = 0.3
# The first share of the steps, in which the rate rises.
_WARM_UP = 0.1


def refine_exit_projections(
    encoder: TwoDMSEModel,
    texts: Sequence[str],
    targets: torch.Tensor,
    sizes: Sequence[Size],
    steps: int = STEPS,
    seed: int = 0,
    states: torch.Tensor | None = None,
    layers: Sequence[int] | None = None,
    pairs: Sequence[tuple[int, int]] = (),
    **encode: Any,
) -> None:
    """Train the exit projections so that similarities at each size are those of the targets; nothing else changes.

    A projection that is fitted in closed form reproduces the targets' strongest directions, and few dimensions of them
    are not the few dimensions that tell near texts from far ones best. This function multiplies the projection of each
    exit by a matrix P that starts as the identity, and trains P with Adam on `alignment.query_kl` between the
    similarities of some texts to thousands of others at each size of the exit and those of the targets. So many others
    include a text's near neighbors, which a batch rarely does. By default the exit of the last layer is left alone: it
    is the full size's.

    With `pairs`, half of the texts that search are queries of these, documents alone are searched, and a query also
    learns to find its own document (InfoNCE over the same similarities, with a weight of 0.3).

    Args:
        encoder: the model with exit projections, which is changed in place.
        texts: some thousands of different texts of the kind that will be embedded.
        targets: (len(texts), any dim), the embeddings whose similarities the sizes learn.
        sizes: the sizes to train.
        steps: number of steps for each exit.
        seed: seed of the batches.
        states: (len(layers), len(texts), hidden), the states of the texts at these exits; computed by default.
        layers: the exits to refine, by default all but the last. Only those that `sizes` name are refined.
        pairs: the places in `texts` of queries and of the document of each. All other texts are documents too.
        **encode: `max_length`, `batch_size` and `show_progress_bar` of `TwoDMSEModel.encode_states`.

    Raises:
        ValueError: the model has no exit projections or they are offloaded, or there are not as many targets as texts.
    """
    if encoder.exit_projections is None:
        raise ValueError("encoder: it has no exit projections; call fit_exit_projections first")
    check_at_hand(encoder.exit_projections, "exit projections")
    if len(texts) != len(targets):
        raise ValueError(f"targets: there are {len(targets)} for {len(texts)} texts")
    named = {size.num_layers for size in sizes}
    exits = range(1, encoder.num_layers) if layers is None else layers
    layers = [n for n in exits if n in named]
    if not layers:
        return
    if states is None:
        states = encoder.encode_states(list(texts), layers, **encode)
    else:
        states = states[[place for place, n in enumerate(exits) if n in named]]
    similarity, device = encoder.config.similarity, encoder.input_device
    wanted = to_embeddings(targets, targets.shape[1], similarity).to(device)
    dims = [sorted({size.dim for size in sizes if size.num_layers == n}) for n in layers]
    batches = _Batches(wanted, similarity, torch.Generator().manual_seed(seed), pairs)
    matrices = _train(states.to(device), batches, dims, steps)
    projections = cast(list[ExitProjection], list(encoder.exit_projections))
    for n, matrix in zip(layers, matrices, strict=True):
        weight = projections[n - 1].weight
        weight.data.copy_(matrix.T @ weight.detach().double())


def dims_of_last_exit(encoder: TwoDMSEModel, sizes: Sequence[Size]) -> list[int]:
    """The dims of all sizes up to that of the largest size with all layers; none if there is no such size."""
    largest = max((size.dim for size in sizes if size.num_layers == encoder.num_layers), default=0)
    return sorted({size.dim for size in sizes if size.dim <= largest})


def join_targets(targets: Sequence[torch.Tensor], similarity: str) -> torch.Tensor:
    """Vectors whose similarities are the mean of those of several targets.

    Args:
        targets: (n, any dim) each.
        similarity: `cosine` or `dot`.

    Returns:
        (n, sum of the dims), of unit norm for `cosine`.
    """
    parts = [to_embeddings(target.cpu().float(), target.shape[1], similarity) for target in targets]
    return torch.cat(parts, dim=1) / len(parts) ** 0.5


def rotate_last_exit(
    encoder: TwoDMSEModel,
    states: torch.Tensor,
    targets: torch.Tensor,
    dims: Sequence[int],
    steps: int = STEPS,
    seed: int = 0,
) -> None:
    """Rotate the last exit so that its first few dimensions give the similarities of the targets as well as they can.

    The full size stays as it is: a rotation Q changes no similarity. Principal directions, with which the exit starts,
    lose the least squared error, but not the fewest near neighbors. Q is trained as `refine_exit_projections` trains P,
    at all dims but the largest, and stays orthogonal by torch's parametrization.

    Args:
        encoder: the model with exit projections, which is changed in place.
        states: (texts, hidden), what the last exit puts out for some thousands of texts.
        targets: (texts, any dim), the embeddings whose similarities the dims learn.
        dims: the dims at which embeddings will be used. At the largest, similarities stay as they are.
        steps: number of steps.
        seed: seed of the batches.
    """
    check_at_hand(encoder.exit_projections, "exit projections")
    if len(set(dims)) < 2:
        return
    *below, width = sorted(set(dims))
    similarity, device = encoder.config.similarity, encoder.input_device
    given, wanted = states[:, :width].to(device), to_embeddings(targets, targets.shape[1], similarity).to(device)
    rotation = torch.nn.Linear(width, width, bias=False, device=device)
    torch.nn.init.eye_(rotation.weight)
    orthogonal(rotation, orthogonal_map="cayley")
    batches = _Batches(wanted, similarity, torch.Generator().manual_seed(seed))
    minimize(list(rotation.parameters()), lambda: batches.loss(lambda rows: [rotation(given[rows])], [below]), steps)
    weight = cast(list[ExitProjection], list(encoder.exit_projections or ()))[-1].weight
    turned = rotation.weight.detach().double() @ weight.detach()[:width].double()
    weight.data[:width] = turned.to(weight.dtype)


def _train(states: torch.Tensor, batches: "_Batches", dims: Sequence[Sequence[int]], steps: int) -> torch.Tensor:
    """(L, hidden, hidden), float64: the matrices P of L exits, whose sizes have the `dims` of each.

    The exits do not depend on each other. They are trained on the same rows, whose targets are computed once.

    Args:
        states: (L, texts, hidden).
    """
    matrices = torch.eye(states.shape[-1], device=states.device).repeat(len(states), 1, 1).requires_grad_()

    def outputs(rows: torch.Tensor) -> list[torch.Tensor]:
        exits = zip(states, matrices, dims, strict=True)
        return [state[rows] @ matrix[:, : widths[-1]] for state, matrix, widths in exits]

    minimize([matrices], lambda: batches.loss(outputs, dims), steps)
    return matrices.detach().double()


class _Drawn(NamedTuple):
    """The texts of a step.

    Attributes:
        rows: (texts,), those that search, and then those that are found.
        searching: how many of them search.
        own: (queries,), the place among those that are found of the document of each of the first ones that search.
    """

    rows: torch.Tensor
    searching: int
    own: torch.Tensor


class _Batches:
    """Texts of a step: some of them search, the others are found.

    Args:
        targets: (texts, any dim), of unit norm for `cosine`.
        similarity: `cosine` or `dot`.
        generator: draws the texts of each step.
        pairs: the places of queries and of the document of each; none if all texts are alike.
    """

    def __init__(
        self,
        targets: torch.Tensor,
        similarity: str,
        generator: torch.Generator,
        pairs: Sequence[tuple[int, int]] = (),
    ):
        self.targets, self.similarity, self.generator = targets, similarity, generator
        self.pairs = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
        is_document = torch.ones(len(targets), dtype=torch.bool)
        is_document[self.pairs[:, 0]] = False
        self.documents = is_document.nonzero()[:, 0]

    def loss(
        self, outputs: Callable[[torch.Tensor], Sequence[torch.Tensor]], dims: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """The divergences of exits at the dims of each, on new rows; `outputs` gives what each exit puts out for the
        rows, (at most 4,352, any dim)."""
        drawn = self._draw() if len(self.pairs) else self._draw_alike()
        rows = drawn.rows.to(self.targets.device)
        return divergence(outputs(rows), self.targets[rows], dims, self.similarity, drawn.searching, drawn.own)

    def _draw_alike(self) -> _Drawn:
        rows = self._shuffled(torch.arange(len(self.targets)))[: QUERIES + _DOCUMENTS]
        return _Drawn(rows, min(QUERIES, len(rows) // 2), torch.empty(0, dtype=torch.long))

    def _draw(self) -> _Drawn:
        """Queries and any texts that search the other documents, among which are those of the queries."""
        others = self._shuffled(torch.arange(len(self.targets)))[: min(QUERIES, len(self.documents)) // 2]
        searches = torch.zeros(len(self.targets), dtype=torch.bool)
        searches[others] = True
        documents = self._shuffled(self.documents[~searches[self.documents]])[:_DOCUMENTS]
        places = torch.full((len(self.targets),), -1)
        places[documents] = torch.arange(len(documents))
        pairs = self._shuffled(self.pairs[places[self.pairs[:, 1]] >= 0])[: QUERIES // 2]
        rows = torch.cat([pairs[:, 0], others, documents])
        return _Drawn(rows, len(pairs) + len(others), places[pairs[:, 1]])

    def _shuffled(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[torch.randperm(len(rows), generator=self.generator)]


def divergence(
    outputs: Sequence[torch.Tensor],
    targets: torch.Tensor,
    dims: Sequence[Sequence[int]],
    similarity: str,
    searching: int | None = None,
    own: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over exits and their dims of how far the similarities of the first rows to the others are from the
    targets', () with gradient.

    Args:
        outputs: what each exit puts out, (rows, any dim).
        targets: (rows, any dim), of unit norm for `cosine`.
        dims: of each exit.
        similarity: `cosine` or `dot`.
        searching: how many of the first rows search, by default `QUERIES`, and at most half of all.
        own: (queries,), the place among the others of the document of each of the first rows, which adds InfoNCE.
    """
    queries = min(QUERIES, len(targets) // 2) if searching is None else searching
    scale = SCALE if similarity == "cosine" else 1.0
    wanted = (scale * targets[:queries] @ targets[queries:].T).softmax(dim=-1)
    if own is not None and len(own):  # the mean over these rows, in a mean over all that search
        asking = torch.arange(len(own), device=wanted.device)
        wanted[asking, own.to(wanted.device)] += _PAIR_WEIGHT * queries / len(own)
    loss = torch.zeros((), device=targets.device)
    for output, widths in zip(outputs, dims, strict=True):
        for dim in widths:
            student = to_embeddings(output, dim, similarity)
            scores = scale * student[:queries] @ student[queries:].T
            # The divergence of the two distributions, but for the entropy of the target, which is constant.
            loss = loss + torch.nn.functional.cross_entropy(scores, wanted)
    return loss


@torch.enable_grad()
def minimize(
    parameters: Sequence[torch.Tensor],
    loss: Callable[[], torch.Tensor],
    steps: int,
    description: str = "Refining projections",
) -> None:
    """Change the parameters by Adam; the rate rises in the first tenth of the steps and then falls to 0."""
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    warm_up = max(1, int(_WARM_UP * steps))
    rate = lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in logging.tqdm(range(steps), desc=description, leave=False, disable=None):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
