"""The paper's ablation in small: trained at all levels against trained at all tokens and pooled at inference.

Four of the digits and a minute's training; the README has all ten, with three seeds.
"""

import pytest

from modeling_m3 import MatryoshkaLlavaForConditionalGeneration
from run_scripts.digits import WORDS, digit_tables, tiny_llava
from trainer.conversations import ConversationCollator, check_conversations
from trainer.levels import score_batch
from trainer.m3 import M3Trainer, M3TrainingArguments


@pytest.fixture(scope="module")
def four_digits():
    few = lambda row: row["messages"][1]["content"] in WORDS[:4]
    return {name: check_conversations(table.filter(few)) for name, table in digit_tables().items()}


def accuracies(sizes: list[int], rows: dict, folder) -> dict[int, float]:
    stock, processor = tiny_llava(seed=0)
    stock.save_pretrained(folder / "stock")
    args = M3TrainingArguments(
        output_dir=str(folder / "out"),
        visual_token_sizes=sizes,
        max_steps=70,
        per_device_train_batch_size=24,
        learning_rate=3e-3,
        weight_decay=0.1,
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        report_to="none",
        seed=0,
    )
    model = MatryoshkaLlavaForConditionalGeneration.from_pretrained(folder / "stock")
    M3Trainer(model=model, args=args, train_dataset=rows["train"], processing_class=processor).train()
    batch = ConversationCollator(processor, [1, 9, 36])([rows["test"][i] for i in range(len(rows["test"]))])
    return {size: scores.accuracy for size, scores in score_batch(model.eval(), batch).items()}


def test_nested_training_is_what_makes_few_tokens_work(four_digits, tmp_path):
    nested = accuracies([1, 9, 36], four_digits, tmp_path)
    full = accuracies([36], four_digits, tmp_path)
    print(nested, full)
    assert nested[1] - full[1] >= 0.3
    assert nested[9] - full[9] >= 0.3
    assert min(nested[36], full[36]) >= 0.9
