"""Write a small task and a tiny random LLaVA that learns it: `python run_scripts/digits_m3.py --output_dir out/digits`.

The pictures are scikit-learn's 1,797 handwritten digits, so that nothing is downloaded. OUT/train.parquet,
OUT/valid.parquet and OUT/test.parquet hold rows of a picture and a question with its answer, OUT/model the model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from run_scripts.shared import checks, cli, screen

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

    from modeling_m3 import MatryoshkaLlavaProcessor

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUESTION = "which digit is this ?"
# Number of rows of each split, after shuffling.
SPLITS = {"train": 1100, "valid": 297, "test": 400}
GRID, PATCH = 6, 4
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


@dataclass
class DigitsArguments:
    """What is written."""

    output_dir: str = field(metadata={"help": "Folder for the three tables and the model."})
    seed: int = field(default=0, metadata={"help": "Seed of the model's random weights."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier call has written there."})


def main(argv=None) -> None:
    """Parse, make, write."""
    with cli.user_errors():
        (args,) = cli.Parser((DigitsArguments,)).parse(argv)
        checks.check_seeds([args.seed], "seed")
        if os.path.exists(os.path.join(args.output_dir, "model")) and not args.overwrite:
            raise ValueError(f"output_dir: {args.output_dir} holds a model; choose another or pass --overwrite")
        tables = digit_tables()
        model, processor = tiny_llava(args.seed)
        folder = os.path.join(args.output_dir, "model")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        with screen.without_bars():
            for split, table in tables.items():
                table.to_parquet(os.path.join(args.output_dir, f"{split}.parquet"))
    sizes = ", ".join(f"{len(table)} {split}" for split, table in tables.items())
    print(f"{sizes} rows and {model.num_parameters():,} random parameters; written to {args.output_dir}")


def digit_tables() -> dict[str, Dataset]:
    """Rows of (image, messages) for `train`, `valid` and `test`; ValueError if a package is missing."""
    import datasets
    import numpy as np

    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            f'digits: the package {error.name} is missing; pip install pillow scikit-learn, or -e ".[test]"'
        ) from error
    digits = load_digits()
    rows = {
        "image": [Image.fromarray((picture * 15).astype(np.uint8)).convert("RGB") for picture in digits.images],
        "messages": [
            [{"role": "user", "content": f"<image>{QUESTION}"}, {"role": "assistant", "content": WORDS[target]}]
            for target in digits.target
        ],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).shuffle(seed=0)
    tables, start = {}, 0
    for split, count in SPLITS.items():
        tables[split] = table.select(range(start, start + count))
        start += count
    return tables


def tiny_llava(seed: int) -> tuple[LlavaForConditionalGeneration, MatryoshkaLlavaProcessor]:
    """A stock LLaVA with random weights and 36 visual tokens per image, and its processor; without torchvision."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    words = [*special, "user", "assistant", ":", *QUESTION.split(), *WORDS]
    shape = {"num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            image_size=GRID * PATCH,
            patch_size=PATCH,
            **shape,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            max_position_embeddings=128,
            initializer_range=0.1,  # at the usual 0.02, a model this narrow takes several times as long to learn
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            **shape,
        ),
        image_token_index=special.index("<image>"),
        image_seq_length=GRID**2,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config), _processor(_tokenizer(words, special))


def _tokenizer(words: list[str], special: list[str]) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import TokenizersBackend

    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), special, strict=False))
    return TokenizersBackend(tokenizer_object=raw, **named, extra_special_tokens={"image_token": "<image>"})


def _processor(tokenizer: PreTrainedTokenizerBase) -> MatryoshkaLlavaProcessor:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    from modeling_m3 import MatryoshkaLlavaProcessor

    side = GRID * PATCH
    images = LlavaImageProcessorPil(
        size={"height": side, "width": side}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return MatryoshkaLlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


if __name__ == "__main__":
    main()
