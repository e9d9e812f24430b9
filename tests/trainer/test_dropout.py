"""Training without the dropout of the backbone's configuration."""

import pytest
import torch
from conftest import FAMILIES, LADDER, SENTENCES, tiny_config
from datasets import Dataset

from modeling_2dmse import TwoDMSEConfig, TwoDMSEModel
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.dropout import switch_off_dropout


def configured(family: str, rate: float) -> TwoDMSEModel:
    """A model whose backbone's configuration has this value for each of its dropout rates."""
    backbone = tiny_config(family).to_dict()
    rates = {name: rate for name, value in backbone.items() if "dropout" in name and isinstance(value, float)}
    assert rates
    torch.manual_seed(0)
    return TwoDMSEModel(TwoDMSEConfig(backbone_config=backbone | rates, sizes=LADDER))


def states(model: TwoDMSEModel, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    ids = torch.arange(5, 25).view(2, 10)
    return model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), layers=(1, 4)).layer_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_dropout_equals_one_that_is_configured_without(family):
    dropping, still = configured(family, 0.4), configured(family, 0.0)
    assert not torch.equal(states(dropping), states(dropping, seed=1)), "the family has dropout"
    switch_off_dropout(dropping)
    torch.testing.assert_close(states(dropping), states(still, seed=1), rtol=0, atol=0)


def make_trainer(model, folder, **kwargs) -> TwoDMSETrainer:
    args = TwoDMSETrainingArguments(
        output_dir=str(folder), sizes=LADDER, use_cpu=True, bf16=False, report_to="none", **kwargs
    )
    rows = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]})
    return TwoDMSETrainer(model=model, args=args, train_dataset=rows)


def test_the_trainer_switches_dropout_off_and_keeps_the_configuration(tiny_model, tmp_path):
    default, without = tiny_model(), tiny_model()
    assert "dropout" not in make_trainer(default, tmp_path).describe()
    assert not torch.equal(states(default), states(default, seed=1))
    assert make_trainer(without, tmp_path, dropout=False).describe()["dropout"] is False
    torch.testing.assert_close(states(without), states(without, seed=1), rtol=0, atol=0)
    assert without.config.to_dict() == default.config.to_dict()
