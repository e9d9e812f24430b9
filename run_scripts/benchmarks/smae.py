"""The cost of an SMAE step, against the published code's way: the logits of every token, size by size."""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import BertConfig

from modeling_2dmse import StarbucksConfig, StarbucksForMaskedAutoencoding, StarbucksOutput, TwoDMSEConfig
from modeling_2dmse.backbone import view
from modeling_2dmse.modeling_smae import FirstTokenReplaced
from run_scripts.shared.measure import in_a_fresh_process, in_turn, peak_memory, row, seconds
from trainer.smae.masking import IGNORED

ROWS, LENGTH = 32, 128
SIDES = ("ours", "plain")


def smae_cost(sizes: list[str], runs: int) -> list[dict]:
    """Step time and peak memory, ours over those of the plain reference, with the shape of all-MiniLM-L6."""
    peaks = {side: in_a_fresh_process(_measure_peak, side, sizes) for side in SIDES}
    print(f"peak: ours {peaks['ours']:.2f} GB, plain {peaks['plain']:.2f} GB", flush=True)
    model, batch = make_model(sizes), make_batch()
    with torch.no_grad():
        ours, plain = model.eval()(**batch).loss.item(), plain_loss(model, batch).item()
    if abs(ours - plain) > 1e-4 * plain:
        raise ValueError(f"smae: the two sides do not compute the same loss ({ours} and {plain})")
    model.train()
    for side in SIDES:
        step(side, model, batch)  # the first step allocates memory and starts threads
    sides = {side: partial(seconds, partial(step, side, model, batch)) for side in SIDES}
    taken = in_turn(runs, sides)
    shape = {"rows": ROWS, "length": LENGTH, "sizes": len(sizes)}
    return [
        row("smae.time", "<= 0.45", taken["ours"], taken["plain"], **shape),
        row("smae.memory", "<= 0.4", [peaks["ours"]], [peaks["plain"]], peaks_gb=peaks, **shape),
    ]


def make_model(sizes: list[str]) -> StarbucksForMaskedAutoencoding:
    """A random model with the shape of all-MiniLM-L6, without dropout, so that both sides compute the same loss."""
    backbone = BertConfig(
        vocab_size=30_522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    config = StarbucksConfig(TwoDMSEConfig(backbone, sizes=sizes))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return StarbucksForMaskedAutoencoding(config).to(device)


def make_batch() -> dict[str, torch.Tensor]:
    """Rows of random words without padding, with masks of 0.2 and 0.4."""
    torch.manual_seed(1)
    ids = torch.randint(1000, 30_000, (ROWS, LENGTH))
    drawn = torch.rand(ids.shape)
    drawn[:, 0] = 1.0
    light, heavy = drawn < 0.2, drawn < 0.4
    batch = {
        "input_ids": ids.masked_fill(light, 103),
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(~light, IGNORED),
        "decoder_input_ids": ids.masked_fill(heavy, 103),
        "decoder_labels": ids.masked_fill(~heavy, IGNORED),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: value.to(device) for name, value in batch.items()}


def plain_loss(model: StarbucksForMaskedAutoencoding, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same loss, size by size, from the logits of all tokens."""
    layers = sorted({size.num_layers for size in model.ladder})
    mask = batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
    states = dict(zip(layers, model.encoder.token_states(layers, inputs), strict=True))
    words, total = model.get_input_embeddings(), 0.0

    def logits(transformed: torch.Tensor) -> torch.Tensor:
        return F.linear(transformed, model.head.output_weight(words), model.head.bias).flatten(0, 1)

    for n, d in model.ladder:
        transformed = model.head.transform(states[n][..., :d])
        mlm = F.cross_entropy(logits(transformed), batch["labels"].flatten())
        layer = FirstTokenReplaced(model.decoder_layer, transformed[:, 0])
        decoder = view(model.encoder.backbone, model.encoder.config.layer_stack, [layer])
        copy = decoder(input_ids=batch["decoder_input_ids"], attention_mask=mask).last_hidden_state
        mae = F.cross_entropy(logits(model.head.transform(copy)), batch["decoder_labels"].flatten())
        total = total + (mlm + mae) / 2
    return total / len(model.ladder)


def step(side: str, model: StarbucksForMaskedAutoencoding, batch: dict[str, torch.Tensor]) -> None:
    """Forward and backward of a side, `ours` or `plain`."""
    model.zero_grad()
    output: StarbucksOutput | None = model(**batch) if side == "ours" else None
    (output.loss if output else plain_loss(model, batch)).backward()


def _measure_peak(side: str, sizes: list[str], pipe) -> None:
    model, batch = make_model(sizes), make_batch()
    for _ in range(2):
        step(side, model, batch)
    pipe.send(peak_memory())
