"""MTEB's own tasks at every size, from one encoding pass per text: the sizes share a store of pooled states."""

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.encoding import to_embeddings

# Texts whose states, at the full hidden size, are in memory at once.
_PIECE = 16_384


class StateStore:
    """The pooled states of texts at some exits, each cut to the largest dim that is asked of it.

    Args:
        model: the model.
        sizes: the sizes that will be asked for.
        max_query_length: longest query in tokens; by default `max_length`.
        **encode: `batch_size`, `max_length` and `show_progress_bar` of `TwoDMSEModel.encode_states`.
    """

    def __init__(self, model: TwoDMSEModel, sizes: Sequence[Size], max_query_length: int | None = None, **encode: Any):
        self.model = model
        self.widths = {n: max(s.dim for s in sizes if s.num_layers == n) for n in sorted({s.num_layers for s in sizes})}
        self.encode = encode
        self.max_query_length = max_query_length
        self.clear()

    def clear(self) -> None:
        """Forget all texts."""
        self._rows: dict[tuple[str, str], int] = {}
        self._states = {n: np.empty((0, width), dtype=np.float32) for n, width in self.widths.items()}

    def embeddings(self, texts: Sequence[str], size: Size, role: str = "") -> torch.Tensor:
        """The embeddings of a size; only texts that were never asked for in this role are encoded.

        Args:
            texts: the texts.
            size: one of the sizes of the store.
            role: `query`, `document` or `""`. The model's prompt of that name, if any, is put before each text.

        Returns:
            (len(texts), dim), float32.
        """
        new = [text for text in dict.fromkeys(texts) if (role, text) not in self._rows]
        for start in range(0, len(new), _PIECE):
            self._add(new[start : start + _PIECE], role)
        rows = [self._rows[role, text] for text in texts]
        states = torch.from_numpy(self._states[size.num_layers][rows, : size.dim])
        return to_embeddings(states, size.dim, self.model.config.similarity)

    def _add(self, texts: list[str], role: str) -> None:
        options = dict(self.encode)
        if role == "query" and self.max_query_length is not None:
            options["max_length"] = self.max_query_length
        prompt = self.model.config.prompts.get(role, "")
        states = self.model.encode_states(texts, list(self.widths), prompt=prompt, **options)
        first, last = len(self._rows), len(self._rows) + len(texts)
        for (n, width), state in zip(self.widths.items(), states, strict=True):
            stored = self._states[n]
            if last > len(stored):  # it grows by doubling, so that each state is copied a few times only
                larger = np.empty((max(last, 2 * len(stored)), width), dtype=np.float32)
                larger[:first] = stored[:first]
                stored = self._states[n] = larger
            stored[first:last] = state[:, :width].numpy()
        self._rows.update({(role, text): first + row for row, text in enumerate(texts)})


class SizedEncoder:
    """One size of a model, as an encoder of MTEB (`mteb.models.EncoderProtocol`).

    Args:
        store: the states, which the sizes share.
        size: the size.
        name: name of the model, ORGANIZATION/NAME.
    """

    def __init__(self, store: StateStore, size: Size, name: str):
        from mteb.models import ModelMeta

        config = store.model.config
        self.store = store
        self.size = size
        self.dot = config.similarity == "dot"
        facts = {"name": f"{name}-{size}", "embed_dim": size.dim, "similarity_fn_name": config.similarity}
        self.mteb_model_meta = ModelMeta.create_empty(facts)

    def encode(self, inputs: Iterable[dict], *, prompt_type: Any = None, **kwargs: Any) -> np.ndarray:
        """(texts, dim), the embeddings of a data loader's batches of texts; MTEB's other arguments change nothing."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self.store.embeddings(texts, self.size, prompt_type.value if prompt_type else "").numpy()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """(A, B), the similarities of (A, dim) and (B, dim)."""
        left, right = map(self._vectors, (embeddings1, embeddings2))
        return left @ right.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """(A,), the similarities of (A, dim) and (A, dim), row by row."""
        left, right = map(self._vectors, (embeddings1, embeddings2))
        return (left * right).sum(dim=-1)

    def _vectors(self, embeddings: Any) -> torch.Tensor:
        rows = torch.atleast_2d(torch.as_tensor(embeddings).float())
        return rows if self.dot else torch.nn.functional.normalize(rows, dim=-1)


def load_tasks(names: Sequence[str]) -> list:
    """MTEB's tasks of these names, with their data.

    Raises:
        ValueError: MTEB is not installed, or a task is unknown, is not about texts, or its data cannot be loaded.
    """
    if importlib.util.find_spec("mteb") is None:
        raise ValueError('mteb_tasks: mteb is not installed; pip install "twodmse[mteb]"')
    import mteb

    tasks = []
    for name in dict.fromkeys(names):
        try:
            task = mteb.get_task(name)
        except KeyError as error:
            known = [kind.metadata.name for kind in mteb.get_tasks()]
            similar = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {', '.join(similar)}?" if similar else ""
            raise ValueError(f"mteb_tasks: MTEB has no task {name!r}{hint}") from error
        if list(task.metadata.modalities) != ["text"]:
            raise ValueError(f"mteb_tasks: {name} is about {', '.join(task.metadata.modalities)}, not only texts")
        tasks.append(task)
    for task in tasks:
        _load_data(task)
    return tasks


def _load_data(task: Any) -> None:
    try:
        task.load_data()
    except (OSError, ValueError, RuntimeError) as error:  # without a network, datasets raises either of them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"mteb_tasks: the data of {task.metadata.name} cannot be loaded: {reason}") from error


def evaluate_mteb(
    model: TwoDMSEModel,
    tasks: Sequence[Any],
    sizes: Sequence[Size],
    folder: str | Path,
    name: str,
    max_query_length: int | None = None,
    **encode: Any,
) -> dict[str, dict]:
    """Run MTEB's tasks at every size; each text of a task is encoded once for all sizes.

    The model's prompts `query` and `document`, if it has any, are put before queries and documents.

    Args:
        model: the model.
        tasks: of `load_tasks`.
        sizes: the sizes.
        folder: gets MTEB's own result of each size and task, SIZE/TASK.json.
        name: name of the model in MTEB's files; it need not have an organization.
        max_query_length: longest query in tokens; by default `max_length`.
        **encode: `batch_size`, `max_length` and `show_progress_bar` of `TwoDMSEModel.encode_states`.

    Returns:
        for each task, as in `{"STSBenchmark": {"type": "STS", "dataset": "mteb/stsbenchmark-sts", "metric":
        "cosine_spearman", "scores": {"1x32": 0.61}}}`, MTEB's main score, averaged by MTEB over splits and languages.
    """
    import mteb

    store = StateStore(model, sizes, max_query_length, **encode)
    results: dict[str, dict] = {}
    for task in tasks:
        facts, scores = task.metadata, {}
        for size in sizes:
            encoder: Any = SizedEncoder(store, size, name if "/" in name else f"local/{name}")
            done = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
            result = done.task_results[0]
            path = Path(folder, str(size), f"{facts.name}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            result.to_disk(path)
            scores[str(size)] = float(result.get_score())
        results[facts.name] = {"type": facts.type, "dataset": facts.dataset["path"], "metric": facts.main_score}
        results[facts.name]["scores"] = scores
        store.clear()
    return results
