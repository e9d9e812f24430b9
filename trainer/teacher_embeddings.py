"""Embeddings of a teacher that are computed once, before training, and looked up in each step."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_2dmse import TwoDMSEModel

from .data import PairCollator

# Texts that the teacher encodes at a time, which is also what an interrupted computation repeats.
_PIECE = 2048


class TeacherEmbeddings:
    """The vector of each training text, which every size learns to reproduce.

    Args:
        texts: the texts, with the prompts that the training puts before them.
        vectors: (len(texts), hidden), as wide as the states of the model that is trained. Their first d columns are
            the target of a size of d dimensions, so they should be rotated to their principal directions
            (`principal_directions`).

    Raises:
        ValueError: the numbers of texts and vectors differ.
    """

    def __init__(self, texts: Sequence[str], vectors: np.ndarray):
        if len(texts) != len(vectors):
            raise ValueError(f"vectors: there are {len(vectors)} for {len(texts)} texts")
        self.texts, self.vectors = list(texts), vectors
        self._rows = {text: row for row, text in enumerate(texts)}

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """(len(texts), hidden), float32; ValueError for a text that has no vector."""
        missing = next((text for text in texts if text not in self._rows), None)
        if missing is not None:
            raise ValueError(f"teacher_embeddings: there is none for the training text {missing[:60]!r}")
        return torch.from_numpy(np.asarray(self.vectors[[self._rows[text] for text in texts]], dtype=np.float32))


class TargetCollator:
    """A batch of `PairCollator` with `targets`, (rows, hidden): the teacher's vector of each row.

    Args:
        collator: makes the batch.
        teacher: the vectors.
    """

    def __init__(self, collator: PairCollator, teacher: TeacherEmbeddings):
        self.collator = collator
        self.teacher = teacher

    def __call__(self, examples: list[dict]) -> dict:
        texts = [
            self.collator.prompts.get(column, "") + example[column]
            for column in self.collator.columns
            for example in examples
            if example[column]
        ]
        return self.collator(examples) | {"targets": self.teacher(texts)}


def compute_teacher_embeddings(
    teacher: TwoDMSEModel, texts: Sequence[str], folder: str | os.PathLike, name: str, **encode: Any
) -> np.ndarray:
    """The teacher's embeddings of texts at its full size, from a file if it has been written before.

    Args:
        teacher: the model.
        texts: the texts; the teacher's own prompts are not added.
        folder: where the file is written, a piece at a time: an interrupted computation resumes.
        name: what identifies the teacher, for example its name and a checksum of its weights.
        **encode: `max_length`, `batch_size` and `show_progress_bar` of `TwoDMSEModel.encode`.

    Returns:
        (len(texts), dim of the teacher) float32, unit norm.
    """
    digest = hashlib.sha256(repr((name, encode.get("max_length"))).encode())
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    path = Path(folder) / f"teacher-{digest.hexdigest()[:16]}"
    path.mkdir(parents=True, exist_ok=True)
    pieces = []
    for start in range(0, len(texts), _PIECE):
        piece = path / f"{start // _PIECE:06d}.npy"
        if not piece.exists():
            vectors = teacher.encode(list(texts[start : start + _PIECE]), prompt="", **encode)
            partial = piece.with_suffix(f".partial-{os.getpid()}")  # several processes may write the same piece
            with open(partial, "wb") as file:
                np.save(file, vectors)
            os.replace(partial, piece)
        pieces.append(np.load(piece))
    return np.concatenate(pieces)


def principal_directions(vectors: np.ndarray, width: int) -> torch.Tensor:
    """The rotation V to the principal directions of vectors T, strongest first (PCA without centering).

    Args:
        vectors: (n, dim), T.
        width: columns of the result.

    Returns:
        (dim, width), float64: the eigenvectors of T^T T with the largest eigenvalues. If width is larger than dim, the
        further columns are 0, so that T V has zeros there.
    """
    gram = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
    for start in range(0, len(vectors), _PIECE):
        piece = torch.from_numpy(np.asarray(vectors[start : start + _PIECE], dtype=np.float64))
        gram += piece.T @ piece
    directions = torch.linalg.eigh(gram)[1].flip(1)[:, :width]
    return torch.nn.functional.pad(directions, (0, width - directions.shape[1]))
