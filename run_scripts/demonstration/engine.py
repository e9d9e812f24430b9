"""What the demo computes: a corpus embedded at every size in one pass, searched at two sizes and compared."""

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Texts of the corpus that stand for queries when sizes are compared with the full size.
PROBES = 200
# Neighbours that are compared.
NEIGHBOURS = 10
# Each time that is shown is the median of this many.
_RUNS = 3
_FLOAT32 = 4


@dataclass(frozen=True)
class Document:
    """A text, and the title that it is shown under."""

    title: str
    text: str


@dataclass(frozen=True)
class Result:
    """The documents found at one size, best first, and what finding them took.

    Args:
        size: layers and dimensions.
        rows: numbers of the documents, all of them, best first.
        scores: their similarities to the query, in the same order.
        encode_ms: milliseconds from the query's text to its embedding.
        search_ms: milliseconds of the comparison with all documents.
        index_mb: megabytes of the documents' vectors in float32.
    """

    size: tuple[int, int]
    rows: list[int]
    scores: list[float]
    encode_ms: float
    search_ms: float
    index_mb: float


class SizedCorpus:
    """A corpus that can be searched at every size of a model.

    Args:
        model: an elastic model, as loaded by `AutoModel.from_pretrained`.
        documents: at least one; they are embedded here, in one pass for all sizes.
        layers: the depths that can be chosen, ascending.
        dims: the numbers of dimensions that can be chosen, ascending.
        batch_size: most texts per batch when they are the longest; default: the model's.
    """

    def __init__(
        self,
        model,
        documents: Sequence[Document],
        layers: Sequence[int],
        dims: Sequence[int],
        batch_size: int | None = None,
    ):
        self.model, self.documents = model, list(documents)
        self.layers, self.dims = list(layers), list(dims)
        self.query_prompt, self.document_prompt = (
            model.config.prompts.get(name, model.find_prompt()) for name in ("query", "document")
        )
        texts = [document.text for document in self.documents]
        states = model.encode_states(texts, self.layers, batch_size, self.document_prompt, show_progress_bar=True)
        self._states = dict(zip(self.layers, states, strict=True))
        self.vectors = functools.lru_cache(maxsize=16)(self._vectors)

    @property
    def full(self) -> tuple[int, int]:
        """The largest size, which the others are compared with."""
        return self.layers[-1], self.dims[-1]

    def index_mb(self, dim: int) -> float:
        """Megabytes of the corpus's vectors in float32."""
        return len(self.documents) * dim * _FLOAT32 / 1e6

    def search(self, query: str, num_layers: int, dim: int) -> Result:
        """Rank all documents for a query at one size."""
        vectors = self.vectors(num_layers, dim)
        encode = functools.partial(self.model.encode, query, num_layers, dim, prompt=self.query_prompt)
        encode_ms, vector = _timed(encode)
        search_ms, scores = _timed(lambda: vectors @ vector)
        rows = np.argsort(-scores, kind="stable")
        return Result((num_layers, dim), rows.tolist(), scores[rows].tolist(), encode_ms, search_ms, self.index_mb(dim))

    def agreement(self) -> np.ndarray:
        """(layers, dims): the mean share of a text's nearest others at the full size that a size finds as well."""
        count = min(len(self.documents), PROBES)
        probes = np.linspace(0, len(self.documents) - 1, count).astype(int)
        wanted = self._nearest(probes, *self.full)
        shares = np.ones((len(self.layers), len(self.dims)))
        for i, n in enumerate(self.layers):
            for j, dim in enumerate(self.dims):
                found = self._nearest(probes, n, dim)
                if found.size:
                    shares[i, j] = (found[:, :, None] == wanted[:, None, :]).any(axis=2).mean()
        return shares

    def query_ms(self) -> np.ndarray:
        """(layers, dims): milliseconds to embed a query of a few words; dimensions hardly change them."""
        query = " ".join(self.documents[0].text.split()[:8]) or "a query"
        self.model.encode(query)  # the first call prepares things
        times = [_timed(functools.partial(self.model.encode, query, n))[0] for n in self.layers]
        return np.repeat(np.array(times)[:, None], len(self.dims), axis=1)

    def similarities(self, first: str, second: str) -> np.ndarray:
        """(layers, dims): the similarity of two texts at every size, from one pass."""
        states = self.model.encode_states([first, second], self.layers, prompt=self.model.find_prompt())
        pairs = [[self._embed(state, dim) for dim in self.dims] for state in states]
        return np.array([[float(pair[0] @ pair[1]) for pair in row] for row in pairs])

    def _vectors(self, num_layers: int, dim: int) -> np.ndarray:
        """(documents, dim), float32."""
        return self._embed(self._states[num_layers], dim).numpy()

    def _embed(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """The embeddings of a size, as `model.encode` makes them."""
        cut = states[:, :dim].float().contiguous()
        return cut if self.model.config.similarity == "dot" else torch.nn.functional.normalize(cut, dim=-1)

    def _nearest(self, probes: np.ndarray, num_layers: int, dim: int) -> np.ndarray:
        """(probes, neighbours): the nearest other documents of some documents."""
        vectors = self.vectors(num_layers, dim)
        scores = vectors[probes] @ vectors.T
        scores[np.arange(len(probes)), probes] = -np.inf
        count = min(NEIGHBOURS, (len(self.documents) - 1) // 2)
        return np.argpartition(-scores, count, axis=1)[:, :count] if count else np.empty((len(probes), 0))


def _timed(function):
    """Median milliseconds of some calls, and the value of the last one."""
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        value = function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times), value
