"""Running a model as it is found: in training mode, with hooks, or with its weights elsewhere."""

import copy
import functools
import types
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized


def execution_device(model: nn.Module) -> torch.device:
    """Where a model's inputs go: its device, or if accelerate offloads its weights, where they run."""
    device = next(model.parameters()).device
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    if device.type != "meta" or not hooks:
        return device
    found = [getattr(hook, "execution_device", None) for several in hooks for hook in hooks_in(several)]
    return torch.device(next((one for one in found if one is not None), "cpu"))


def hooks_in(hook) -> tuple:
    """The hooks of accelerate that a module has: it puts several of them into one SequentialHook."""
    return getattr(hook, "hooks", (hook,))


def inference_twin(model: nn.Module, hooks: bool = True) -> nn.Module:
    """The same model in evaluation mode: itself, if all of it is, else a copy of its modules with the same tensors.

    The model that other threads use, perhaps to train it, keeps its mode. Without `hooks`, it is a copy that does not
    call the hooks that users have registered.

    Raises:
        ValueError: a module in training mode has a forward that would run the module itself instead of its copy.
    """
    if hooks and not any(module.training for module in model.modules()):
        return model
    twins: dict[int, nn.Module] = {}

    def copy_of(module: nn.Module) -> nn.Module:
        if id(module) not in twins:
            _check_forward(module)
            twin = twins[id(module)] = shallow_copy(module)
            twin.training = False
            if not hooks:
                twin.__dict__ |= {"_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
            # A wrapper of torch.compile runs the module that it was made for, whatever its copy holds.
            children = {name: getattr(child, "_orig_mod", child) for name, child in module._modules.items()}
            twin._modules.update({name: None if one is None else copy_of(one) for name, one in children.items()})
        return twins[id(module)]

    return copy_of(model)


def shallow_copy(module: nn.Module) -> nn.Module:
    """A copy with the same submodules and tensors. A forward that was set on the module, as accelerate's hooks do, runs
    the copy."""
    if is_parametrized(module):  # whose class refuses to be copied
        twin = object.__new__(type(module))
        twin.__dict__ |= nn.Module.__getstate__(module)
    else:
        twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    twin.__dict__ |= {name: _rebound(value, module, twin) for name, value in vars(twin).items() if callable(value)}
    return twin


def _rebound(value, module: nn.Module, twin: nn.Module):
    """A method of `module`, or a partial call of one or with one, for its copy; anything else as it is."""
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, twin)
    if isinstance(value, functools.partial):
        args = [twin if arg is module else _rebound(arg, module, twin) for arg in value.args]
        return functools.partial(_rebound(value.func, module, twin), *args, **value.keywords)
    return value


def _check_forward(module: nn.Module) -> None:
    """ValueError if a copy of the module would run the module itself, some of which is in training mode."""
    set_here = [vars(module)[name] for name in ("forward", "_old_forward") if name in vars(module)]
    if any(not _follows(value, module) for value in set_here) and any(part.training for part in module.modules()):
        raise ValueError(
            f"model: the forward of {type(module).__name__} was replaced by a function that runs it in training mode; "
            "call model.eval() first"
        )


def _follows(value, module: nn.Module) -> bool:
    """Whether a forward is bound to its module, so that `_rebound` can bind it to a copy."""
    if isinstance(value, functools.partial):
        return any(arg is module for arg in value.args) or _follows(value.func, module)
    if not isinstance(value, types.MethodType) or value.__self__ is not module:
        return False
    cells = getattr(value.__func__, "__closure__", None) or ()
    return not any(
        isinstance(held, nn.Module) or isinstance(getattr(held, "__self__", None), nn.Module)
        for held in (cell.cell_contents for cell in cells)
    )
