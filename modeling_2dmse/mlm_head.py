"""The head that predicts tokens from states: dense, activation, norm, vocabulary, as in every family's own head."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging

logger = logging.get_logger(__name__)


class MaskedLanguageHead(nn.Module):
    """A masked-language head that can also read only the first d dimensions of a state (Starbucks, SMAE).

    Args:
        hidden_size: dimensions of the encoder's states.
        width: dimensions of the word embeddings (smaller than `hidden_size` in some ELECTRA models).
        vocab_size: rows of the word embeddings.
        activation: name in transformers' ACT2FN.
        norm_eps: epsilon of the norm.
        dense_bias: whether the dense layer has a bias.
        norm_bias: whether the norm has a bias.
        output_bias: whether the logits have a bias.
        tied: whether the output weights are the word embeddings, which are then passed in and not stored twice.
    """

    bias: nn.Parameter | None
    output: nn.Linear | None

    def __init__(
        self,
        hidden_size: int,
        width: int,
        vocab_size: int,
        activation: str = "gelu",
        norm_eps: float = 1e-12,
        dense_bias: bool = True,
        norm_bias: bool = True,
        output_bias: bool = True,
        tied: bool = True,
    ):
        super().__init__()
        self.dense = nn.Linear(hidden_size, width, bias=dense_bias)
        self.activation = ACT2FN[activation]
        self.norm = nn.LayerNorm(width, eps=norm_eps, bias=norm_bias)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if output_bias else None
        self.output = None if tied else nn.Linear(width, vocab_size, bias=False)

    def transform(self, states: torch.Tensor) -> torch.Tensor:
        """(..., d) to (..., width): the dense layer's first d input columns, then activation and norm."""
        weight = self.dense.weight[:, : states.shape[-1]]
        return self.norm(self.activation(F.linear(states, weight, self.dense.bias)))

    def output_weight(self, embeddings: nn.Embedding) -> torch.Tensor:
        """The output weights, (vocabulary, width); `embeddings` are the encoder's word embeddings."""
        return embeddings.weight if self.output is None else self.output.weight


def new_head_settings(backbone: PreTrainedModel) -> dict:
    """Settings of a head for a backbone that came without one: as in BERT, with the backbone's own word embeddings."""
    vocab_size, width = cast(nn.Embedding, backbone.get_input_embeddings()).weight.shape
    return {
        "width": width,
        "vocab_size": vocab_size,
        "activation": _activations(backbone.config)[0],
        "norm_eps": getattr(backbone.config, "layer_norm_eps", 1e-12),
    }


def read_head(name_or_path: str, hub: dict, **kwargs) -> tuple[dict, dict[str, torch.Tensor]] | None:
    """The masked-language head of a checkpoint.

    The head's parts are found by their type (one linear layer, one norm, the output embeddings), and the rebuilt head
    must give the checkpoint's own logits on a toy input.

    Args:
        name_or_path: folder or Hub name.
        hub: arguments for fetching a configuration (`revision`, `token`, `trust_remote_code`, ...).
        kwargs: arguments for loading a model.

    Returns:
        Its settings and weights; None if the checkpoint has no head, or one of another form.
    """
    architectures = AutoConfig.from_pretrained(name_or_path, **hub).architectures or []
    if any(name.endswith("Model") for name in architectures):  # saved without any head
        return None
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except (ValueError, KeyError):  # no masked-language class for this family
        return None
    body = f"{model.base_model_prefix}."
    if any(not key.startswith(body) for key in info["missing_keys"]):
        return None
    inside, output = set(model.base_model.modules()), model.get_output_embeddings()
    outside = [module for module in model.modules() if module not in inside and module is not output]
    dense = [module for module in outside if isinstance(module, nn.Linear)]
    norms = [module for module in outside if isinstance(module, nn.LayerNorm)]
    if output is None or len(dense) != 1 or len(norms) != 1:
        logger.warning(f"{name_or_path}: its masked-language head has an unknown form; a new one is created")
        return None
    return _rebuild(model.eval(), dense[0], norms[0], output)


@torch.no_grad()
def _rebuild(
    model: PreTrainedModel, dense: nn.Linear, norm: nn.LayerNorm, output: nn.Linear
) -> tuple[dict, dict[str, torch.Tensor]] | None:
    """Settings and weights of a `MaskedLanguageHead` with the model's own logits; None if no activation gives them."""
    embeddings = cast(nn.Embedding, model.get_input_embeddings())
    settings: dict = {
        "width": dense.out_features,
        "vocab_size": output.out_features,
        "norm_eps": norm.eps,
        "dense_bias": dense.bias is not None,
        "norm_bias": norm.bias is not None,
        "output_bias": output.bias is not None,
        "tied": output.weight.data_ptr() == embeddings.weight.data_ptr(),
    }
    tensors = {f"dense.{key}": value for key, value in dense.state_dict().items()}
    tensors |= {f"norm.{key}": value for key, value in norm.state_dict().items()}
    tensors |= {"bias": output.bias.data} if settings["output_bias"] else {}
    tensors |= {} if settings["tied"] else {"output.weight": output.weight.data}
    ids = torch.arange(1, 13).reshape(2, 6) % settings["vocab_size"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected, states = model(**inputs).logits, model.base_model(**inputs).last_hidden_state
    for activation in _activations(model.config):
        head = MaskedLanguageHead(dense.in_features, **settings, activation=activation).to(states.dtype)
        head.load_state_dict(tensors)
        logits = F.linear(head.transform(states), head.output_weight(embeddings), head.bias)
        if torch.allclose(logits.float(), expected.float(), atol=1e-3, rtol=1e-3):
            return settings | {"activation": activation}, tensors
    logger.warning(f"{type(model).__name__}: its masked-language head has an unknown form; a new one is created")
    return None


def _activations(config: PreTrainedConfig) -> list[str]:
    """Activations that the family's head may have, most likely first."""
    names = [getattr(config, key, None) for key in ("classifier_activation", "hidden_act", "activation")]
    return [name for name in dict.fromkeys([*names, "gelu"]) if name is not None and name in ACT2FN]
