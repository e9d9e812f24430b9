"""sentence-transformers as its documentation uses it, and checks that it does the same work as this project."""

import copy
import importlib.util
from typing import Any

import torch

from modeling_2dmse import Size, TwoDMSEModel
from run_scripts.shared import models
from trainer.losses import Rows, base_loss

# The largest difference of two embeddings or losses that rounding can cause.
ROUNDING = 1e-4


def check_installed() -> None:
    """ValueError if sentence-transformers is missing."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError('benchmark: sentence-transformers is missing; pip install -e ".[benchmark]"')


def load_peer(folder: str, max_length: int, trust_remote_code: bool = False):
    """The model of a folder as a SentenceTransformer, on the device that it selects itself."""
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(folder, trust_remote_code=trust_remote_code)
    peer.max_seq_length = max_length
    peer.model_card_data.generate_widget_examples = False  # no card is read, and they take time and a bar
    return peer


def load_both(args) -> tuple[TwoDMSEModel, Any]:
    """The model that a benchmark's arguments name, as an elastic model and as a SentenceTransformer."""
    name, trust = models.resolve_model(args.model_name_or_path), args.trust_remote_code
    model = models.to_device(models.load_encoder(name, args.sizes, trust_remote_code=trust))
    models.check_max_length(model, args.max_length)
    return model, load_peer(name, args.max_length, trust)


def cut_layers(peer, num_layers: int):
    """A copy with the first `num_layers` layers, cut as in the sentence-transformers documentation.

    Raises:
        ValueError: the layers are not where BERT has them, which is what the documentation describes.
    """
    if not hasattr(getattr(peer[0].auto_model, "encoder", None), "layer"):
        kind = type(peer[0].auto_model).__name__
        raise ValueError(
            f"benchmark: the layers of a {kind} cannot be cut by `encoder.layer`; use a plain BERT encoder"
        )
    peer = copy.deepcopy(peer)
    backbone = peer[0].auto_model
    backbone.encoder.layer = backbone.encoder.layer[:num_layers]
    return peer


def check_same_embeddings(model: TwoDMSEModel, peer, texts: list[str], sizes: list[Size]) -> None:
    """ValueError if the two sides embed the texts differently at one of the sizes."""
    for size in sizes:
        ours = model.encode(texts, num_layers=size.num_layers, dim=size.dim, max_length=peer.max_seq_length)
        theirs = cut_layers(peer, size.num_layers).encode(texts, truncate_dim=size.dim, normalize_embeddings=True)
        apart = float(abs(ours - theirs).max())
        if apart > ROUNDING:
            raise ValueError(f"benchmark: the sides' embeddings differ by {apart:.1g} at {size}; nothing is compared")


@torch.no_grad()
def check_same_loss(model: TwoDMSEModel, peer, columns: dict[str, list[str]]) -> None:
    """ValueError if the inner losses of the two sides differ on a batch of anchors, positives and negatives."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    texts = [text for column in columns.values() for text in column]
    embeddings = model.encode(texts, max_length=peer.max_seq_length, convert_to_tensor=True)
    ours = base_loss("infonce", embeddings, Rows(tuple(map(len, columns.values())))).item()
    embedded = [peer.encode(column, convert_to_tensor=True) for column in columns.values()]
    theirs = MultipleNegativesRankingLoss(peer).compute_loss_from_embeddings(embedded, None).item()
    if abs(ours - theirs) > ROUNDING:
        raise ValueError(f"benchmark: the sides' losses differ ({ours:.6f} and {theirs:.6f}); nothing is compared")
