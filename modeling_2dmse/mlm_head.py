"""The head that turns token states into words: dense, activation, norm, vocabulary; the form of every family's own."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging

logger = logging.get_logger(__name__)


class MaskedLanguageHead(nn.Module):
    """
    A masked-language head that also reads the first d dimensions of a state (Starbucks, SMAE).

    Args:
        hidden_size: of the encoder.
        width: of the word embeddings (smaller than `hidden_size` in some ELECTRA models).
        vocab_size: of the word embeddings.
        activation: name in transformers' ACT2FN.
        norm_eps: of the norm.
        dense_bias, norm_bias, output_bias: whether these have a bias.
        tied: whether the output weights are the word embeddings; they are passed in then, and not stored twice.
    """

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
        """(..., d) to (..., width): the dense layer's first d input columns, its activation and norm."""
        weight = self.dense.weight[:, : states.shape[-1]]
        return self.norm(self.activation(F.linear(states, weight, self.dense.bias)))

    def output_weight(self, embeddings: nn.Module) -> torch.Tensor:
        """(vocabulary, width)."""
        return embeddings.weight if self.output is None else self.output.weight


def new_head_settings(backbone: PreTrainedModel) -> dict:
    """Settings of a head for a backbone that came without one: BERT's, on the backbone's own words."""
    vocab_size, width = backbone.get_input_embeddings().weight.shape
    return {
        "width": width,
        "vocab_size": vocab_size,
        "activation": _activations(backbone.config)[0],
        "norm_eps": getattr(backbone.config, "layer_norm_eps", 1e-12),
    }


def read_head(name_or_path: str, hub: dict, **kwargs) -> tuple[dict, dict[str, torch.Tensor]] | None:
    """The masked-language head of a checkpoint.

    The head's parts are found by what they are (one linear layer, one norm, the output embeddings), and the rebuilt
    head must give the checkpoint's own logits on a toy input.

    Args:
        hub: what a configuration is fetched with (`revision`, `token`, ...).
        kwargs: what a model is loaded with.

    Returns:
        its settings and weights; None where the checkpoint has none, or one of another form.
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
        logger.warning(f"{name_or_path}: its masked-language head has an unknown form; a new one is made")
        return None
    return _rebuild(model.eval(), dense[0], norms[0], output)


@torch.no_grad()
def _rebuild(model: PreTrainedModel, dense: nn.Linear, norm: nn.LayerNorm, output: nn.Linear):
    embeddings = model.get_input_embeddings()
    settings = {
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
    logger.warning(f"{type(model).__name__}: its masked-language head has an unknown form; a new one is made")
    return None


def _activations(config: PreTrainedConfig) -> list[str]:
    """Activations that the family's head may have, likeliest first."""
    names = [getattr(config, key, None) for key in ("classifier_activation", "hidden_act", "activation")]
    return [name for name in dict.fromkeys([*names, "gelu"]) if name in ACT2FN]
