"""Backbones that cannot become elastic are refused when they are imported, and the message says what is wrong."""

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, BertConfig, BertModel

from modeling_2dmse import TwoDMSEModel

SHAPE = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
DECODER = {"vocab_size": 60, "n_layers": 3, "n_heads": 4}
REFUSED = {
    "esm": (
        lambda: transformers.EsmConfig(**SHAPE, position_embedding_type="rotary", mask_token_id=4),
        r"contact_head.regression.weight of a cut of one layer has the shape \(1, 4\)",
    ),
    "convbert": (
        lambda: transformers.ConvBertConfig(**SHAPE, embedding_size=32, conv_kernel_size=3),
        "states change with the padding after it",
    ),
    "mobilebert": (
        lambda: transformers.MobileBertConfig(**SHAPE, embedding_size=16, intra_bottleneck_size=32,
                                              use_bottleneck=False),
        "states change with the padding after it",
    ),
    "fnet": (
        lambda: transformers.FNetConfig(vocab_size=60, hidden_size=32, num_hidden_layers=3, intermediate_size=48),
        "states change with the padding after it",
    ),
    "bigbird": (
        lambda: transformers.BigBirdConfig(**SHAPE),
        "block_sparse attention depends on the longest text of a batch; pass attention_type='original_full'",
    ),
    "rwkv": (
        lambda: transformers.RwkvConfig(vocab_size=60, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32),
        "RwkvModel cannot be made elastic: a saved model of it could not be read again: division by zero",
    ),
    "squeezebert": (
        lambda: transformers.SqueezeBertConfig(**SHAPE, embedding_size=32),
        "its forward fails without its pooler, which no size uses",
    ),
}  # fmt: skip
CAUSAL = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=60, hidden_size=32, n_layer=3, n_head=4),
    "mpt": lambda: transformers.MptConfig(d_model=32, max_seq_len=32, expansion_ratio=2, **DECODER),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=3),
    "lfm2": lambda: transformers.Lfm2Config(  # its first layer alone could not fill a cache
        **SHAPE, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"]
    ),
}


def saved(config, folder) -> str:
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_at_import(name, tmp_path):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        TwoDMSEModel.from_backbone(saved(config(), tmp_path))


@pytest.mark.parametrize("name", CAUSAL)
def test_backbones_that_read_left_to_right_pool_the_last_token(name, tmp_path):
    assert TwoDMSEModel.from_backbone(saved(CAUSAL[name](), tmp_path)).config.pooling == "lasttoken"


CODE = """
from transformers import BertConfig, BertModel
class OwnConfig(BertConfig):
    model_type = {kind!r}
class OwnModel(BertModel):
    config_class = OwnConfig
"""


class RegisteredConfig(BertConfig):
    model_type = "registered-in-this-process"


class RegisteredModel(BertModel):
    config_class = RegisteredConfig


class BertOfThisProcess(BertModel):
    """With the configuration of transformers' own BERT."""


def test_a_backbone_that_only_this_process_knows_is_refused(tmp_path, monkeypatch):
    names = [(CONFIG_MAPPING, "_extra_content"), (MODEL_MAPPING, "_extra_content")]
    for mapping, name in names:  # as it was, after the test
        monkeypatch.setattr(mapping, name, dict(getattr(mapping, name)))
    AutoConfig.register(RegisteredConfig.model_type, RegisteredConfig)
    AutoModel.register(RegisteredConfig, RegisteredModel)
    for kind, config in ((RegisteredModel, RegisteredConfig), (BertOfThisProcess, BertConfig)):
        AutoModel.register(config, kind, exist_ok=True)
        kind(config(**SHAPE)).save_pretrained(tmp_path / kind.__name__)
        message = rf"{kind.__name__} cannot be made elastic: {kind.__name__} is not part of transformers, and its code"
        with pytest.raises(ValueError, match=message):
            TwoDMSEModel.from_backbone(tmp_path / kind.__name__)


@pytest.mark.parametrize("kind", ["own-encoder", "bert"])
def test_a_backbone_with_code_of_its_own_is_refused(kind, tmp_path):
    import json

    BertModel(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(CODE.format(kind=kind))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="OwnModel cannot be made elastic: OwnModel is not part of transformers"):
        TwoDMSEModel.from_backbone(tmp_path, trust_remote_code=True)
