"""A guide model that marks the false negatives of infonce (GISTEmbed)."""

import math
import os
import random
from pathlib import Path

import pytest
import torch
from conftest import TRIPLETS
from test_distributed import assert_same, batch_of, gradients, make_trainer, run_check, without_dropout
from test_retrieval_training import dot, vectors

from modeling_2dmse import TwoDMSEModel
from trainer.losses import Rows, base_loss
from trainer.step_loss import plan_loss


def test_infonce_leaves_out_what_the_guide_puts_nearer_than_the_positive():
    x, guide = vectors(8, 6, 0), vectors(8, 4, 1)
    rows = Rows((3, 3, 2), guide=guide)
    expected, hidden = 0.0, 0
    for anchor in range(3):
        limit, total = dot(guide[anchor], guide[3 + anchor]), 0.0
        for number in range(5):
            if number != anchor and dot(guide[anchor], guide[3 + number]) > limit:
                hidden += 1
            else:
                total += math.exp(2.0 * dot(x[anchor], x[3 + number]))
        expected += math.log(total) / 3 - 2.0 * dot(x[anchor], x[3 + anchor]) / 3
    assert 0 < hidden < 12
    assert base_loss("infonce", x, rows, scale=2.0).item() == pytest.approx(expected, abs=1e-10)
    assert base_loss("infonce", x, Rows((3, 3, 2)), scale=2.0).item() > expected + 1e-3


def test_a_step_with_a_guide_of_another_tokenizer_and_width(tiny_model, tmp_path):
    guide = tiny_model("roberta", sizes=["4x32"]).truncate(3, 16)
    guide.config.prompts = {"query": "the dogs "}
    losses = []
    for chunk, others in ((None, guide), (2, guide), (None, None)):
        model = tiny_model()
        trainer = make_trainer(
            model, tmp_path, "starbucks", None, "infonce", guide=others, dropout=False, gradient_cache_chunk_size=chunk
        )
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
        losses.append(trainer.training_step(model, batch).item())
    texts = [text for column in TRIPLETS for text in TRIPLETS[column][:6] if text]
    prompted = ["the dogs " * (row < 6) + text for row, text in enumerate(texts)]
    embeddings = torch.from_numpy(guide.encode(prompted))
    rows = Rows((6, 6, 6, 2), guide=embeddings)
    assert rows.false_negatives.any()
    plan = trainer.training_objective.plan(random.Random(0))
    expected, _ = plan_loss(plan, model.encode_states(texts, (1, 2, 4)).clone(), rows, "infonce")
    assert losses[:2] == pytest.approx([expected.item()] * 2, rel=1e-4)
    assert abs(losses[2] - losses[0]) > 1e-3
    assert not any(parameter.requires_grad for parameter in guide.parameters())


def check_guide(start: str, folder: str) -> None:
    """The embeddings of the guide are gathered in the order of the states."""
    rank, counts = int(os.environ["RANK"]), [4, 3]
    model = without_dropout(TwoDMSEModel.from_pretrained(start, attn_implementation="eager"))
    guide = TwoDMSEModel.from_pretrained(start, num_layers=2)
    trainer = make_trainer(model, folder, "starbucks", None, "infonce", guide=guide)
    wrapped = trainer.accelerator.prepare(model)
    own = range(sum(counts[:rank]), sum(counts[: rank + 1]))
    loss = trainer.training_step(wrapped, batch_of(trainer, own)).item()
    ours = gradients(wrapped)
    inputs = batch_of(trainer, range(sum(counts)))
    rows = Rows.of_batch(inputs, trainer.guide.embeddings(inputs.pop("guide")))
    assert rows.false_negatives.any()
    plan = trainer.training_objective.plan(random.Random(0))
    expected, _ = plan_loss(plan, model(**inputs, layers=plan.layers).layer_embeddings, rows, "infonce")
    expected.backward()
    assert abs(loss - expected.item()) < 1e-5 * expected.item()
    assert_same(ours, gradients(model))
    (Path(folder) / f"equal-{rank}").touch()


def test_two_processes_with_a_guide_equal_one_on_the_joined_batch(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "start")
    run_check("check_guide", 2, tmp_path, "test_guide")
