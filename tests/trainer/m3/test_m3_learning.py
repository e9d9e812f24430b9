"""The paper's ablation in small: a LLaVA trained at all levels, compared with one trained at all tokens and pooled.

This trains on three digits, for some seconds from a common start. docs/m3.md has the results for all ten digits, from
random weights and with three seeds.
"""

import pytest

from modeling_m3 import MatryoshkaLlavaForConditionalGeneration
from run_scripts.digits_m3 import WORDS, digit_tables, tiny_llava
from trainer.m3.conversations import ConversationCollator, check_conversations
from trainer.m3.levels import score_batch
from trainer.m3.trainer import M3Trainer, M3TrainingArguments


@pytest.fixture(scope="module")
def three_digits():
    few = lambda row: row["messages"][1]["content"] in WORDS[:3]
    return {name: check_conversations(table.filter(few)) for name, table in digit_tables().items()}


def train(start, sizes: list[int], steps: int, rows, processor, folder):
    args = M3TrainingArguments(
        output_dir=str(folder / "out"),
        visual_token_sizes=sizes,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        report_to="none",
        seed=0,
    )
    model = MatryoshkaLlavaForConditionalGeneration.from_pretrained(start)
    M3Trainer(model=model, args=args, train_dataset=rows, processing_class=processor).train()
    return model.eval()


def test_nested_training_is_what_makes_few_tokens_work(three_digits, tmp_path):
    stock, processor = tiny_llava(seed=0)
    stock.save_pretrained(tmp_path / "stock")
    train(tmp_path / "stock", [36], 40, three_digits["train"], processor, tmp_path).save_pretrained(tmp_path / "start")
    batch = ConversationCollator(processor, [1, 9, 36])(list(three_digits["test"]))
    accuracy = {}
    for name, sizes in (("nested", [1, 9, 36]), ("full", [36])):
        model = train(tmp_path / "start", sizes, 55, three_digits["train"], processor, tmp_path)
        accuracy[name] = {size: scores.accuracy for size, scores in score_batch(model, batch).items()}
    assert accuracy["nested"][1] - accuracy["full"][1] >= 0.3, accuracy
    assert accuracy["nested"][9] - accuracy["full"][9] >= 0.3, accuracy
    assert min(accuracy["nested"][36], accuracy["full"][36]) >= 0.9, accuracy
