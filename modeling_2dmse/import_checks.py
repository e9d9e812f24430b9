"""What a backbone must be able to do to become elastic, found by trying it on a few tokens when it is imported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from .backbone import FAILURES, build_backbone, cut_config, run_layers, without_cache
from .running import execution_device

# Relative error of a state that is only rounding.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_ROUNDING = 0.1


def check_origin(backbone: PreTrainedModel) -> None:
    """ValueError if the code of the backbone or of its configuration is not in transformers, which is all that a new
    process has: a saved folder carries this package's code only."""
    for part in (backbone, backbone.config):
        if type(part).__module__.partition(".")[0] != "transformers":
            raise _refusal(
                backbone,
                f"{type(part).__name__} is not part of transformers, and its code is not saved, so that no other "
                "process could read the saved folder; use a backbone of transformers",
            )


@torch.no_grad()
def reads_left_to_right(backbone: PreTrainedModel) -> bool:
    """Whether the states of a text's tokens depend only on the tokens before them, found by changing the last token."""
    ids = _tokens(backbone, 6).repeat(2, 1)
    ids[1, -1] = ids[0, 0]
    with _evaluating(backbone):
        first, second = _states(backbone, ids, torch.ones_like(ids))
    change = (first - second).abs().amax(dim=1)
    return bool(change[:-1].max() <= 1e-4 * change[-1])


@torch.no_grad()
def check_padding(backbone: PreTrainedModel, no_pooler: bool = False) -> None:
    """ValueError if the states of a text change when it is padded, as beside a longer text."""
    if getattr(backbone.config, "attention_type", None) == "block_sparse":  # only beside texts too long to try here
        raise _refusal(
            backbone,
            "block_sparse attention depends on the longest text of a batch; pass attention_type='original_full'",
        )
    short, pad = _tokens(backbone, 4), getattr(backbone.config, "pad_token_id", None) or 0
    padded = torch.nn.functional.pad(short, (0, 3), value=pad)
    mask = torch.nn.functional.pad(torch.ones_like(short), (0, 3))
    with _evaluating(backbone):
        try:
            alone = _states(backbone, short, torch.ones_like(short))
            beside = _states(backbone, padded, mask)[:, :4]
        except FAILURES as error:
            cause = "without its pooler, which no size uses" if no_pooler else "on a few tokens"
            raise _refusal(backbone, f"its forward fails {cause}: {error}") from error
    if _differ(alone, beside):
        raise _refusal(backbone, "a text's states change with the padding after it, which depends on the batch")


@torch.no_grad()
def check_reload(backbone: PreTrainedModel, built: PreTrainedModel, stack: str, norm: str) -> None:
    """ValueError if the first layer, saved and read again as a model of one layer, does not give the same states.

    Args:
        backbone: the backbone, with weights.
        built: what the saved folder's code builds from its configuration, on the meta device.
        stack: path of its list of layers.
        norm: path of its final norm.
    """
    _check_tensors(backbone, built, "")
    try:
        # The configuration as JSON has it.
        config = AutoConfig.for_model(**cut_config(backbone.config, 1).to_dict())
        with torch.device("meta"):
            built, whole = build_backbone(config), AutoModel.from_config(config, trust_remote_code=False)
    except FAILURES as error:
        raise _unreadable(backbone, error) from error
    _check_tensors(backbone, built, " of a cut of one layer")
    tensors = backbone.state_dict()
    if getattr(backbone, "hf_quantizer", None) is not None or any(tensor.is_meta for tensor in tensors.values()):
        return
    config._attn_implementation = backbone.config._attn_implementation
    # A pooler that was dropped has weights here, so that transformers does not report them as missing.
    weights = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in whole.state_dict().items()}
    weights |= {name: tensors[name] for name in built.state_dict()}
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        again = type(backbone).from_pretrained(None, config=config, state_dict=weights, dtype=backbone.dtype)
    except FAILURES as error:
        raise _unreadable(backbone, error) from error
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    ids = _tokens(backbone, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with _evaluating(backbone):
        expected = run_layers(backbone, stack, norm, [1], **inputs, **without_cache(backbone))[0]
    if _differ(expected, _states(again.eval().to(backbone.device), **inputs)):
        raise _refusal(backbone, "its first layer, saved and read again, gives other states")


def _check_tensors(backbone: PreTrainedModel, built: PreTrainedModel, what: str) -> None:
    """ValueError unless the tensors that a folder's code builds are those of the backbone."""
    if type(built) is not type(backbone):
        raise _refusal(backbone, f"a folder{what} would be read as {type(built).__name__}")
    shapes = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    for name, tensor in built.state_dict().items():
        if name not in shapes:
            raise _refusal(backbone, f"{name}{what} has no weights")
        if shapes[name] != tensor.shape:
            raise _refusal(
                backbone, f"{name}{what} has the shape {tuple(tensor.shape)}, but its weights {tuple(shapes[name])}"
            )
    if not what:
        more = sorted(set(shapes) - set(built.state_dict()))
        if more:
            raise _refusal(backbone, f"{more[0]} is not part of the model that its configuration describes")


def _tokens(backbone: PreTrainedModel, length: int) -> torch.Tensor:
    """(1, length) different token ids, without the padding token."""
    pad = getattr(backbone.config, "pad_token_id", None)
    ids = [index for index in range(1, length + 2) if index != pad][:length]
    return torch.tensor([ids], device=execution_device(backbone))


def _states(backbone: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **without_cache(backbone)}
    return backbone(**inputs).last_hidden_state.float()


def _differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    error = (first.float() - second.float()).norm() / first.float().norm()
    return bool(error > _ROUNDING.get(first.dtype, _HALF_ROUNDING)) or bool(error.isnan())


@contextmanager
def _evaluating(backbone: PreTrainedModel) -> Iterator[None]:
    training = backbone.training
    backbone.eval()
    try:
        yield
    finally:
        backbone.train(training)


def _unreadable(backbone: PreTrainedModel, error: Exception) -> ValueError:
    return _refusal(backbone, f"a saved model of it could not be read again: {str(error).splitlines()[0]}")


def _refusal(backbone: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(f"backbone: {type(backbone).__name__} cannot be made elastic: {reason}")
