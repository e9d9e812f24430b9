"""What users of sentence-transformers type: other names of texts and sizes, queries and documents, similarity."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .configuration_2dmse import TwoDMSEConfig, size_fields

Texts = str | Sequence[str]
Embeddings = np.ndarray | torch.Tensor | Sequence[np.ndarray] | Sequence[torch.Tensor]


def sized(kwargs: dict) -> dict:
    """The arguments of `from_pretrained` with the size as `num_layers` and `dim`, or in the configuration among them.

    Raises:
        ValueError: as `one_size`.
    """
    kwargs = size_fields(kwargs)
    # Not by its class: transformers imports a folder's code for the model and for the configuration separately.
    if getattr(kwargs.get("config"), "model_type", None) == TwoDMSEConfig.model_type:
        size = {name: kwargs.pop(name, None) for name in ("num_layers", "dim")}
        kwargs["config"] = kwargs["config"].with_size(**size)
    return kwargs


def one_of_texts(texts: Texts | None, sentences: Texts | None, inputs: Texts | None) -> Texts | None:
    """The texts, under any of their names; ValueError if they are given twice."""
    given = {"texts": texts, "sentences": sentences, "inputs": inputs}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"texts: {' and '.join(given)} are names of one argument; give one of them")
    return next(iter(given.values()), None)


def move(model: torch.nn.Module, device: str | torch.device | int | None) -> None:
    """Move the model to a device, if one is named; ValueError for several, or for what is no device."""
    if device is None:
        return
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: {device!r} is not allowed; name one device, for example 'cpu'") from error
    model.to(place)


if TYPE_CHECKING:
    from .encoding import EncodeMixin as _Encoder
else:
    _Encoder = object


class SynonymsMixin(_Encoder):
    """Methods of sentence-transformers, for a model that has `encode`."""

    def encode_query(self, texts: Texts | None = None, *args, **kwargs) -> np.ndarray | torch.Tensor:
        """`encode` with the prompt `query` of the configuration, or with none if it has no such prompt.

        Args:
            texts: a string, or a list of strings.
            args: those of `encode`.
            kwargs: those of `encode`; a `prompt` or `prompt_name` takes the place of the prompt.
        """
        return self._encode_as("query", texts, *args, **kwargs)

    def encode_document(self, texts: Texts | None = None, *args, **kwargs) -> np.ndarray | torch.Tensor:
        """`encode` with the prompt `document` of the configuration, or with none if it has no such prompt.

        Args:
            texts: a string, or a list of strings.
            args: those of `encode`.
            kwargs: those of `encode`; a `prompt` or `prompt_name` takes the place of the prompt.
        """
        return self._encode_as("document", texts, *args, **kwargs)

    def similarity(self, embeddings1: Embeddings, embeddings2: Embeddings) -> torch.Tensor:
        """The similarity of each of some embeddings to each of others, by `config.similarity`.

        Args:
            embeddings1: (A, dim), or (dim,) for one.
            embeddings2: (B, dim), or (dim,) for one.

        Returns:
            (A, B), float32.

        Raises:
            ValueError: they have different dimensions, or their values are bits.
        """
        first, second = _rows("embeddings1", embeddings1), _rows("embeddings2", embeddings2)
        if first.shape[1] != second.shape[1]:
            raise ValueError(
                f"embeddings2: they have {second.shape[1]} dimensions, embeddings1 {first.shape[1]}; encode both at "
                "one size"
            )
        if self.config.similarity == "cosine":
            first, second = (torch.nn.functional.normalize(rows, dim=1) for rows in (first, second))
        return first @ second.T

    def _encode_as(self, role: str, texts: Texts | None, *args, **kwargs) -> np.ndarray | torch.Tensor:
        if kwargs.get("prompt") is None and kwargs.get("prompt_name") is None and len(args) < 4:
            kwargs["prompt"] = self.config.prompts.get(role, "")
        return self.encode(texts, *args, **kwargs)


def _rows(name: str, embeddings: Embeddings) -> torch.Tensor:
    """(rows, dim) in float32."""
    if isinstance(embeddings, (list, tuple)):
        embeddings = torch.stack([torch.as_tensor(row) for row in embeddings])
    rows = torch.as_tensor(embeddings)
    if rows.dtype == torch.uint8:
        raise ValueError(f"{name}: embeddings of precision binary are bits; encode with another precision")
    return torch.atleast_2d(rows.float())
