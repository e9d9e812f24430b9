"""A guide model, which tells the loss which candidates of an anchor are false negatives (GISTEmbed, Solatorio 2024)."""

import os
from collections.abc import Sequence

import torch

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.encoding import to_embeddings

from .arguments import TwoDMSETrainingArguments
from .data import PairCollator, query_document_prompts
from .gradient_cache import CachedForward

KEY = "guide"


class GuidedCollator:
    """A batch of `PairCollator` together with the same texts for the guide, whose tokenizer is another one.

    Args:
        collator: of the model that is trained.
        guide: of the guide, for the same columns without the texts without labels.
    """

    def __init__(self, collator: PairCollator, guide: PairCollator):
        self.collator = collator
        self.guide = guide

    def __call__(self, examples: list[dict]) -> dict:
        return self.collator(examples) | {KEY: self.guide(examples)}


class Guide:
    """The guide model on the device of the training.

    Args:
        model: the model, which is not trained.
        args: the arguments of the training, whose loss must be `infonce`.

    Raises:
        ValueError: the loss has no negatives in the batch.
    """

    def __init__(self, model: TwoDMSEModel, args: TwoDMSETrainingArguments):
        if args.loss not in (None, "infonce"):
            raise ValueError(f"guide: only infonce has false negatives to leave out, but the loss is {args.loss}")
        self.model = model.eval().requires_grad_(False)
        if not any(parameter.is_meta for parameter in model.parameters()):  # else accelerate has placed it
            self.model.to(args.device)
        self.args = args

    @property
    def name(self) -> str:
        """The folder or the Hub name of the guide."""
        path = self.model.name_or_path
        return os.path.basename(os.path.normpath(path)) if os.path.isdir(path) else path

    @torch.no_grad()
    def embeddings(self, batch: dict) -> torch.Tensor:
        """The embeddings, (rows, dim), of the guide's part of a batch; in chunks if the gradient cache has some."""
        lengths, layers, examples = batch["lengths"], (self.model.num_layers,), self.args.gradient_cache_chunk_size
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
        if examples is None:
            buckets = {"num_buckets": self.args.num_buckets, "lengths": lengths}
            states = self.model(**inputs, layers=layers, **buckets).layer_embeddings[0]
        else:
            forward = lambda chunk: self.model(**chunk, layers=layers).layer_embeddings
            states = CachedForward(forward, inputs, examples * len(batch["counts"]), lengths).states()[0]
        return to_embeddings(states, self.model.config.dim, self.model.config.similarity)


def guide_collator(model: TwoDMSEModel, columns: Sequence[str], collator: PairCollator) -> PairCollator:
    """The collator of the guide: its own tokenizer and prompts, and the lengths of the model that is trained."""
    longest = model.max_length
    return PairCollator(
        model.tokenizer,
        columns,
        min(collator.max_length, longest),
        prompts=query_document_prompts(columns, model.config.prompts),
        max_first_length=min(collator.max_first_length, longest),
    )
