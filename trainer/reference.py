"""Texts that every step compares its rows with, by embeddings that are known before training."""

from collections.abc import Sequence

import torch
from transformers import TrainingArguments

from modeling_2dmse import Size, TwoDMSEConfig
from modeling_2dmse.encoding import to_embeddings

from .refining import refine_targets
from .teacher_embeddings import TeacherEmbeddings

# Reference texts: with so many, a row's near neighbors are among them, which the rows of a batch rarely are.
_TEXTS = 4096
# The most texts on which few dimensions are trained; with more, their embeddings need not fit on the device.
_REFINED = 32_768


class Reference:
    """The embeddings of M reference texts, which do not change during training.

    Args:
        full: (M, H), those of the teacher.
        cut: (M, d) for each dim d of the ladder: what a size of d dimensions should give (`refining.refine_targets`).
    """

    def __init__(self, full: torch.Tensor, cut: dict[int, torch.Tensor]):
        self.full, self.cut = full, cut
        self._stacks: dict[tuple[int, ...], torch.Tensor] = {}

    def stack(self, dims: Sequence[int]) -> torch.Tensor:
        """(S, M, largest dim), `cut` for each of the dims, with zeros after its own."""
        key = tuple(dims)
        if key not in self._stacks:
            cuts = [torch.nn.functional.pad(self.cut[dim], (0, max(dims) - dim)) for dim in dims]
            self._stacks[key] = torch.stack(cuts)
        return self._stacks[key]


def make_reference(
    teacher: TeacherEmbeddings, ladder: Sequence[Size], config: TwoDMSEConfig, args: TrainingArguments
) -> Reference:
    """Draw reference texts among those that have a teacher's embedding.

    Args:
        teacher: the embeddings.
        ladder: the sizes.
        config: of the model; it says how embeddings are compared.
        args: their seed draws and refines; their device is where the embeddings are kept.
    """
    generator = torch.Generator().manual_seed(args.seed)
    drawn = torch.randperm(len(teacher.texts), generator=generator)[:_REFINED]
    kept = drawn.sort().values
    vectors = torch.as_tensor(teacher.vectors[kept.numpy()]).float().to(args.device)
    width = vectors.shape[1]
    dims = sorted({size.dim for size in ladder} - {width})
    found = refine_targets(vectors, dims, config.similarity, seed=args.seed) | {width: vectors}
    rows = torch.searchsorted(kept, drawn[:_TEXTS]).to(args.device)
    cut = {dim: to_embeddings(few[rows], dim, config.similarity) for dim, few in found.items()}
    return Reference(cut[width], cut)
