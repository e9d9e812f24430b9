"""Score a LLaVA at several numbers of visual tokens: `python run_scripts/evaluate_m3.py --model_name_or_path M ...`.

Rows of the table: each level; the oracle, which takes the fewest tokens that answer correctly; and, as an extension, a
cascade that goes to the next level while the answer is not confident.
"""

import math
import os
from dataclasses import dataclass, field

from run_scripts.shared import checks, cli, remote_code


@dataclass
class EvaluationArguments:
    """What is scored on what."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a LLaVA, stock or nested."})
    data_file: str = field(
        metadata={"help": "Rows with an image (image, images) and a conversation (messages, or LLaVA's conversations): "
                  "json, jsonl, parquet. A row is right if greedy decoding gives its answers."},
    )  # fmt: skip
    output_dir: str = field(metadata={"help": "Folder for results.json."})
    visual_token_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of visual tokens, each the square of a divisor of the grid's side. Default: the "
                  "levels that the model was trained for."},
    )  # fmt: skip
    cascade_threshold: float | None = field(
        default=None,
        metadata={"help": "Extension: also a cascade from level to level until the probability of the answer's first "
                  "token reaches this. Default: none."},
    )  # fmt: skip
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder that image paths start at. Default: the folder of the file."}
    )
    batch_size: int = field(default=16, metadata={"help": "Rows per batch."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the results of an earlier evaluation."})
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Parse, load, score, write."""
    with cli.user_errors():
        (args,) = cli.Parser((EvaluationArguments,)).parse(argv)
        check(args)

        from accelerate.utils import send_to_device
        from torch.utils.data import DataLoader
        from tqdm.auto import tqdm

        from modeling_m3.visual_tokens import check_token_sizes
        from run_scripts.shared import models, output
        from run_scripts.shared.llava import load_llava
        from trainer.m3.conversations import ConversationCollator, read_conversations
        from trainer.m3.levels import join_scores, level_table, score_batch

        rows = read_conversations(args.data_file, args.image_dir, "data_file")
        model, processor = load_llava(args.model_name_or_path, args.trust_remote_code)
        sizes = check_token_sizes(args.visual_token_sizes or model.config.visual_token_sizes, model.config.grid_side)
        collator = ConversationCollator(processor, sizes)
        collator([rows[0]])  # shows here what does not fit the processor's template
    model = models.to_device(model).eval()
    loader = DataLoader(rows, args.batch_size, collate_fn=collator)
    batches = tqdm(loader, desc="scoring", disable=len(loader) == 1 or None)  # None: shown on a terminal
    with cli.user_errors(), cli.reading_pictures():
        levels = join_scores(score_batch(model, send_to_device(batch, model.device)) for batch in batches)
        check_losses({size: scores.loss for size, scores in levels.items()})
    table = level_table(model, levels, args.cascade_threshold)
    results = {"model": args.model_name_or_path, "data": os.path.basename(args.data_file), "n": len(rows)}
    if args.cascade_threshold is not None:
        results["cascade_threshold"] = args.cascade_threshold
    print(format_table(table))
    with cli.writing(args.output_dir):
        os.makedirs(args.output_dir, exist_ok=True)
        output.write_json(os.path.join(args.output_dir, "results.json"), results | {"levels": table})
    print(f"\n{len(rows)} rows; tokens and costs are means over their prompts; written to {args.output_dir}")


def check(args: EvaluationArguments) -> None:
    """ValueError for a flag that is not allowed."""
    checks.check_at_least("batch_size", args.batch_size, 1)
    if args.cascade_threshold is not None and not 0 < args.cascade_threshold <= 1:
        raise ValueError(f"cascade_threshold: {args.cascade_threshold} is not allowed; use a probability up to 1")
    checks.check_no_results(args.output_dir, args.overwrite)
    checks.check_files("data_file", args.data_file)
    checks.check_model(args.model_name_or_path)


def check_losses(losses: dict[int, float]) -> None:
    """ValueError if the loss at a number of visual tokens is not finite."""
    for size, loss in losses.items():
        if not math.isfinite(loss):
            raise ValueError(f"model_name_or_path: the loss at {size} visual tokens is {loss}; a model or a processor "
                             "with finite values has a finite one")  # fmt: skip


def format_table(table: dict[str, dict[str, float]]) -> str:
    """The scores and costs as markdown, a row per level."""
    lines = [
        "| visual tokens | accuracy | loss | tokens per image | prompt | prefill GFLOPs | KV cache KB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in table.items():
        loss = f"{row['loss']:.4f}" if "loss" in row else ""
        title = f"{name} (extension)" if name == "cascade" else name
        lines.append(
            f"| {title} | {row['accuracy']:.4f} | {loss} | {row['visual_tokens']:.1f} | {row['sequence_length']:.1f} "
            f"| {row['prefill_flops'] / 1e9:.4g} | {row['kv_cache_bytes'] / 1e3:.4g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
