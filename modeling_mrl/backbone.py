"""Where a transformers backbone keeps its layers and its final norm, and how to run or keep only some of them."""

import copy
import inspect
import sys
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from .running import execution_device, hooks_in, inference_twin, shallow_copy

# What running a backbone that cannot be run may end with.
FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with random weights, without the pooling head that no size uses."""
    return drop_pooler(AutoModel.from_config(config, trust_remote_code=False))


def drop_pooler(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone itself, with its `pooler` set to None."""
    # BERT's tanh pooler gets no gradient here, which would stop DistributedDataParallel.
    if isinstance(getattr(backbone, "pooler", None), nn.Module):
        backbone.register_module("pooler", None)
    return backbone


def find_layer_stack(backbone: PreTrainedModel) -> str:
    """Path of the one `nn.ModuleList` that holds the transformer layers, for example `encoder.layer`.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    depth = getattr(backbone.config, "num_hidden_layers", None)
    stacks = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({type(layer) for layer in module}) == 1
    ]
    stacks = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(stacks) != 1:
        found = "none" if not stacks else ", ".join(stacks)
        raise ValueError(
            f"backbone: {type(backbone).__name__} cannot be made elastic: it needs exactly one list of "
            f"{depth} layers of one class, found {found}"
        )
    return stacks[0]


def find_final_norms(backbone: PreTrainedModel, stack: str) -> list[str]:
    """Paths that may be the norm after the last layer, most likely first; `""` (no norm) comes last."""
    norms, parent = [], stack
    while parent:
        parent = parent.rpartition(".")[0]
        for name, module in backbone.get_submodule(parent).named_children():
            if type(module).__name__.endswith("Norm"):
                norms.append(f"{parent}.{name}" if parent else name)
    names = [name for name, _ in backbone.named_modules()]
    norms.sort(key=lambda norm: names.index(norm) < names.index(stack))  # norms of embeddings are mostly made first
    return [*norms, ""]


@torch.no_grad()
def _final_norms_by_trial(backbone: PreTrainedModel, stack: str) -> list[str]:
    """`find_final_norms` without those that run before the last layer only, found with hooks on a copy in one pass."""
    norms, twin = find_final_norms(backbone, stack), inference_twin(backbone, hooks=False)
    ran: list[str] = []
    watched = {norm: twin.get_submodule(norm) for norm in norms if norm} | {stack: layers_of(twin, stack)[-1]}
    for path, module in watched.items():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    twin(**_trial_inputs(backbone))
    return [*ran[ran.index(stack) + 1 :], *(norm for norm in norms if norm not in ran)]


def _trial_inputs(backbone: PreTrainedModel) -> dict:
    """Two texts of six tokens."""
    ids = torch.arange(12, device=execution_device(backbone)).reshape(2, 6)
    ids = ids % max(2, backbone.config.vocab_size - 1) + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **without_cache(backbone)}


def check_layer_stack(backbone: PreTrainedModel, path: str | None) -> str:
    """The path of the list of layers, found by search if it is None; ValueError if there is no such list."""
    if path is None:
        return find_layer_stack(backbone)
    depth, lists = backbone.config.num_hidden_layers, dict(backbone.named_modules())
    found = lists.get(path) if isinstance(path, str) else None
    if not isinstance(found, nn.ModuleList) or len(found) != depth:
        raise ValueError(f"layer_stack: {path!r} is not the list of the {depth} layers of {type(backbone).__name__}")
    return path


def check_final_norm(backbone: PreTrainedModel, stack: str, path: str | None) -> str:
    """The path of the final norm, the most likely one if it is None; ValueError if it cannot be this one."""
    norms = find_final_norms(backbone, stack)
    if path is None:
        try:
            return norms[0] if norms == [""] else _final_norms_by_trial(backbone, stack)[0]
        except FAILURES:  # as on the meta device, where there are no weights
            return norms[0]
    if path not in norms:
        raise ValueError(f"final_norm: {path!r} is not a norm of {type(backbone).__name__}; use one of {norms}")
    return path


def check_one_stack(backbone: PreTrainedModel) -> None:
    """ValueError if a model has an encoder and a decoder. The configuration that T5EncoderModel saves denies it."""
    config = backbone.config
    both = getattr(type(config), "is_encoder_decoder", False) and hasattr(backbone, "decoder")
    if both or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"backbone: {type(backbone).__name__} has an encoder and a decoder, which is not supported; use a model "
            "with one stack of layers, such as BERT or Qwen3"
        )


def check_device_map(backbone: PreTrainedModel, name: object) -> None:
    """ValueError if weights were sent to the meta device, not to be offloaded; `name` is the model."""
    devices = getattr(backbone, "hf_device_map", {"": backbone.device}).values()
    if any(str(device) == "meta" for device in devices):
        raise ValueError(f"device_map: {name} is on the meta device, which keeps no values; name another device")


def layers_of(backbone: nn.Module, stack: str) -> nn.ModuleList:
    """The list of transformer layers at the path `stack`; ValueError if other modules are around it or in its place."""
    if not isinstance(backbone, PreTrainedModel):
        raise ValueError(
            f"backbone: {type(backbone).__name__} is not a model of transformers; wrap the whole model instead, as in "
            "torch.compile(model)"
        )
    advice = "wrap the layers or the whole model instead of a part"
    try:
        layers = backbone.get_submodule(stack)
    except AttributeError as error:
        raise ValueError(f"backbone: {type(backbone).__name__} has no {stack}; {advice}") from error
    depth = backbone.config.num_hidden_layers
    if not isinstance(layers, (nn.ModuleList, nn.Sequential)) or len(layers) != depth:
        raise ValueError(f"backbone: {stack} is {type(layers).__name__}, not a list of {depth} layers; {advice}")
    return cast(nn.ModuleList, layers)


def apply_norm(backbone: nn.Module, norm: str, state: torch.Tensor) -> torch.Tensor:
    """`state` through the norm at the path `norm`, or unchanged if the path is `""`."""
    return backbone.get_submodule(norm)(state) if norm else state


class LayerStandIn(nn.Module):
    """Takes a layer's place in a `view`, and answers for the layer's attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)  # ModernBERT reads `attention_type` from its layers


class Tap(LayerStandIn):
    """Calls its layer, and appends the returned state to `states`."""

    def __init__(self, layer: nn.Module, states: list[torch.Tensor]):
        super().__init__(layer)
        self._states = states

    def forward(self, *args, **kwargs):
        output = self.layer(*args, **kwargs)
        self._states.append(output[0] if isinstance(output, tuple) else output)
        return output


def view(backbone: nn.Module, stack: str, layers: Sequence[nn.Module]) -> nn.Module:
    """The same backbone with another list of layers.

    Only the containers on the path to the list are copied; every module with weights is the original one. The view
    therefore costs no memory, follows whatever wraps or replaces those modules, and leaves the backbone untouched:
    several threads may run different depths at once.
    """
    twin = _container(backbone)
    *path, last = stack.split(".")
    parent = twin
    for name in path:
        child = _container(getattr(parent, name))
        parent._modules[name] = child
        parent = child
    parent._modules[last] = nn.ModuleList(layers)
    return twin


def _container(module: nn.Module) -> nn.Module:
    """A shallow copy of a module around the layers; ValueError if a hook on it would look for all of them."""
    hooks = hooks_in(getattr(module, "_hf_hook", None))
    if any(getattr(one, "offload", False) and getattr(one, "place_submodules", False) for one in hooks):
        raise ValueError(
            f"backbone: a hook of accelerate offloads {type(module).__name__} as a whole, and cannot load some of its "
            "layers only; offload the layers one by one"
        )
    return shallow_copy(module)


def run_layers(backbone: nn.Module, stack: str, norm: str, depths: Sequence[int], **inputs) -> list[torch.Tensor]:
    """state(n) for each n of the ascending `depths`, from one pass that runs max(depths) layers.

    Args:
        backbone: a text encoder.
        stack: path of its list of layers.
        norm: path of its final norm, `""` for none.
        depths: numbers of layers, ascending.
        inputs: arguments of the backbone's forward.

    Returns:
        One (batch, length, hidden) tensor per depth, after the backbone's own final norm.

    Raises:
        ValueError: the backbone, or a module around its layers, is wrapped so that it would run all its layers.
    """
    layers = layers_of(backbone, stack)
    deepest = depths[-1]
    states: list[torch.Tensor] = []
    if list(depths) == [len(layers)]:
        return [backbone(**inputs).last_hidden_state]
    wanted = set(depths)
    chosen = [Tap(layer, states) if n in wanted else layer for n, layer in enumerate(layers[:deepest], start=1)]
    last = view(backbone, stack, chosen)(**inputs).last_hidden_state
    if len(states) != len(wanted):
        raise ValueError(
            f"backbone: the forward of {type(backbone).__name__}, or of a module around its layers, is wrapped, and "
            f"runs all {len(layers)} layers; wrap the layers or the whole model instead"
        )
    return [*(apply_norm(backbone, norm, state) for state in states[:-1]), last]


def accepted_inputs(backbone: nn.Module) -> set[str]:
    """Which of a text encoder's usual optional inputs the backbone's forward accepts, by name."""
    return {"attention_mask", "token_type_ids", "position_ids", "use_cache"} & _forward_inputs(backbone)


def without_cache(backbone: nn.Module) -> dict[str, bool]:
    """The argument that keeps a decoder from filling a cache, which nothing here reads; empty for encoders."""
    return {"use_cache": False} if "use_cache" in accepted_inputs(backbone) else {}


def _forward_inputs(backbone: nn.Module) -> set[str]:
    """Names in the signature of the forward of a backbone's class and of those that it inherits from: a wrapper around
    a forward may have no names."""
    forwards = [kind.__dict__["forward"] for kind in type(backbone).__mro__ if "forward" in kind.__dict__]
    return {name for forward in forwards for name in inspect.signature(forward).parameters}


def is_decoder(backbone: PreTrainedModel) -> bool:
    """Whether the backbone's tokens attend only to the tokens before them."""
    causal = any(getattr(module, "is_causal", False) for module in backbone.modules())
    return bool(getattr(backbone.config, "is_decoder", False) or causal)


def supports_inputs_embeds(backbone: nn.Module) -> bool:
    """Whether the backbone's output for `inputs_embeds` equals that for the `input_ids` they were looked up from."""
    # RoBERTa-style models give a padding token no position, even where it appears among real tokens.
    accepted = "inputs_embeds" in _forward_inputs(backbone)
    return accepted and not _padding_indices(backbone)


def count_positions(backbone: PreTrainedModel) -> int:
    """Longest input that the backbone has positions for, in tokens."""
    positions = getattr(backbone.config, "max_position_embeddings", None) or sys.maxsize
    return positions - first_position(backbone)


def first_position(backbone: nn.Module) -> int:
    """The position of a text's first token: RoBERTa-style models count from after the padding index, others from 0."""
    return sum(index + 1 for index in _padding_indices(backbone))


def _padding_indices(backbone: nn.Module) -> list[int]:
    """The padding index of each table of position embeddings that has one."""
    tables = (module for name, module in backbone.named_modules() if name.endswith("position_embeddings"))
    indices = [getattr(table, "padding_idx", None) for table in tables]
    return [index for index in indices if index is not None]


def cut_config(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """A copy of a backbone's configuration for its first `num_layers` layers, with per-layer lists cut as well."""
    depth = config.num_hidden_layers
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_layers
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            setattr(config, name, value[:num_layers])
    return config


@torch.no_grad()
def check_exits(backbone: PreTrainedModel, stack: str) -> str:
    """Find the final norm by trying: state(1) taken during a deeper pass must equal the output of a one-layer cut.

    Returns:
        Path of the final norm, `""` for none.

    Raises:
        ValueError: no choice of norm makes the two equal, or one layer cannot be run by itself.
    """
    name = type(backbone).__name__
    training = backbone.training
    backbone.eval()
    try:
        norms, inputs = _final_norms_by_trial(backbone, stack), _trial_inputs(backbone)
        if len(layers_of(backbone, stack)) == 1:
            return norms[0]
        cut = run_layers(backbone, stack, "", [1], **inputs)[0]
        for norm in norms:
            tapped = run_layers(backbone, stack, norm, [1, 2], **inputs)[0]
            if torch.allclose(tapped.float(), cut.float(), atol=1e-4, rtol=1e-3):
                return norm
    except FAILURES as error:
        raise ValueError(f"backbone: {name} cannot be made elastic: running 1 of its layers failed: {error}") from error
    finally:
        backbone.train(training)
    raise ValueError(
        f"backbone: {name} cannot be made elastic: its states change outside of its layers and its final norm"
    )
