"""Training without the dropout that the backbone's configuration asks for."""

import pytest
import torch
from conftest import FAMILIES, LADDER, SENTENCES, tiny_config
from datasets import Dataset

from modeling_2dmse import TwoDMSEConfig, TwoDMSEModel
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.dropout import switch_off_dropout


def configured(family: str, share: float) -> TwoDMSEModel:
    """A model whose backbone's configuration has this share wherever it names a dropout."""
    backbone = tiny_config(family).to_dict()
    rates = {name: share for name, value in backbone.items() if "dropout" in name and isinstance(value, float)}
    assert rates
    torch.manual_seed(0)
    return TwoDMSEModel(TwoDMSEConfig(backbone_config=backbone | rates, sizes=LADDER))


def states(model: TwoDMSEModel, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    ids = torch.arange(5, 25).view(2, 10)
    return model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), layers=(1, 4)).layer_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_it_is_as_if_none_had_been_configured(family):
    dropping, still = configured(family, 0.4), configured(family, 0.0)
    assert not torch.equal(states(dropping), states(dropping, seed=1)), "the family drops something"
    switch_off_dropout(dropping)
    torch.testing.assert_close(states(dropping), states(still, seed=1), rtol=0, atol=0)


def make_trainer(model, folder, **kwargs) -> TwoDMSETrainer:
    args = TwoDMSETrainingArguments(
        output_dir=str(folder), sizes=LADDER, use_cpu=True, bf16=False, report_to="none", **kwargs
    )
    rows = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]})
    return TwoDMSETrainer(model=model, args=args, train_dataset=rows)


def test_the_trainer_switches_it_off_and_the_configuration_stays(tiny_model, tmp_path):
    untold, told = tiny_model(), tiny_model()
    assert "dropout" not in make_trainer(untold, tmp_path).describe()
    assert not torch.equal(states(untold), states(untold, seed=1))
    assert make_trainer(told, tmp_path, dropout=False).describe()["dropout"] is False
    torch.testing.assert_close(states(told), states(told, seed=1), rtol=0, atol=0)
    assert told.config.to_dict() == untold.config.to_dict()
