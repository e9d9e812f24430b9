"""The host's work in encoding and training: the same pipeline with a model whose forward returns at once."""

import os
from collections.abc import Callable
from functools import partial

import torch
from datasets import Dataset

from modeling_2dmse.batching import default_batch_tokens, pooled_states
from modeling_2dmse.packing import Packing
from run_scripts.shared import models
from run_scripts.shared.measure import in_turn, row, seconds
from trainer.data import PairCollator, text_columns

HIDDEN = 768
TRIPLETS = 128
STEPS = 50


def host_cost(args, texts: list[str], rows: Dataset) -> list[dict]:
    """Time of everything except the model, over the time of the fast tokenizer's own batch call, in one thread.

    Args:
        args: the benchmark's arguments.
        texts: what is encoded.
        rows: what is trained on, at most 50 batches; the last batch may be incomplete.

    Returns:
        `host.encode`; `host.train`, a collated and transferred step with each text seen for the first time; and
        `host.train.again`, the same steps in the next epoch.
    """
    threads, parallel = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        return _measure(args, texts, rows)
    finally:
        torch.set_num_threads(threads)
        if parallel is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel


def _measure(args, texts: list[str], rows: Dataset) -> list[dict]:
    tokenizer = models.load_tokenizer(args.model_name_or_path, args.trust_remote_code)
    columns = text_columns(rows)
    whole = rows.select(range(min(len(rows), STEPS * TRIPLETS))).to_list()
    examples = [whole[start : start + TRIPLETS] for start in range(0, len(whole), TRIPLETS)]
    trained = [text for batch in examples for column in columns for text in (row[column] for row in batch) if text]
    again = PairCollator(tokenizer, columns, args.max_length, packed=True, remember=True)
    _collate(again, examples)
    sides = {
        "encode": partial(_encode, tokenizer, texts, args.max_length),
        "encode tokens": _tokens_alone(tokenizer, texts, args.max_length),
        "train": lambda: _collate(PairCollator(tokenizer, columns, args.max_length, packed=True), examples),
        "train again": partial(_collate, again, examples),
        "train tokens": _tokens_alone(tokenizer, trained, args.max_length),
    }
    timed = {name: partial(seconds, side) for name, side in sides.items()}
    in_turn(1, timed)
    taken = in_turn(args.runs, timed)
    more = {"seconds": taken}
    return [
        row("host.encode", "<= 1.3", taken["encode"], taken["encode tokens"], texts=len(texts), **more),
        row("host.train", "<= 1.5", taken["train"], taken["train tokens"], triplets=TRIPLETS, steps=len(examples)),
        row("host.train.again", "<= 0.2", taken["train again"], taken["train tokens"], triplets=TRIPLETS),
    ]


def _encode(tokenizer, texts: list[str], max_length: int) -> None:
    nothing = torch.zeros(1, len(texts), HIDDEN)
    forward = lambda batch: nothing[:, : len(batch.get("packing", batch["input_ids"]))]
    tokens = default_batch_tokens(torch.device("cpu"), HIDDEN, 4 * HIDDEN) * 16  # as large as on a GPU
    pooled_states(forward, tokenizer, texts, max_length, tokens, packs=lambda: True, show_progress_bar=False)


def _collate(collator: PairCollator, examples: list[list[dict]]) -> None:
    for batch in examples:
        inputs = collator(batch)
        packing = Packing(inputs["lengths"])
        assert len(packing.cu_seq_lens) + len(packing.position_ids)


def _tokens_alone(tokenizer, texts: list[str], max_length: int) -> Callable[[], object]:
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.enable_truncation(max_length)
    return lambda: backend.encode_batch(texts)
