"""Code that a model's folder or repository contains: the flag that allows it, and the error without the flag."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import field

# Characters shown of a reason, which may contain a whole file.
_SHOWN = 300
# What errors name that comes from the files of a model, not from a flag.
_FIELDS = ("backbone", "dim", "final_norm", "layer_stack", "name_or_path", "num_layers", "prompts", "tokenizer")


_DEFAULT = "model_name_or_path"


def trust_flag() -> bool:
    """The field `trust_remote_code` of a script's arguments."""
    return field(default=False, metadata={"help": "Run code that the model's own folder or repository contains, if "
                 "the model needs it. Read it first."})  # fmt: skip


@contextlib.contextmanager
def named(name_or_path: str, argument: str = _DEFAULT) -> Iterator[None]:
    """Around a load: what the libraries raise for a folder that is damaged becomes one ValueError that names it.

    A model that needs code of its own gives an error that names the flag, if the code may not be run. Errors of this
    project, which name an argument, stay as they are, except that `argument` stands for `model_name_or_path`.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    # Tables of missing tensors and the like, which would come before the error.
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:
        # The types are a list. `Exception` itself, without its subclasses, is what tokenizers raises for a damaged
        # tokenizer.json; it has no class for that, and a list in `except` cannot leave out subclasses.
        if not isinstance(error, _load_errors()) and type(error) is not Exception:
            raise
        reason = " ".join(str(error).split())
        if isinstance(error, ValueError) and "trust_remote_code" in reason:
            raise ValueError(
                f"{argument}: {name_or_path} needs code of its own, which was not run; read it, and pass "
                "--trust_remote_code true if you trust it"
            ) from error
        if isinstance(error, ValueError) and re.match(r"\w+: ", reason):
            head, _, rest = reason.partition(": ")
            if head == _DEFAULT != argument or (head == "name_or_path" and rest.startswith(name_or_path)):
                raise ValueError(f"{argument}: {rest}") from error
            if head not in _FIELDS:
                raise
            raise ValueError(f"{argument}: {name_or_path}: {reason}") from error
        if reason.startswith("Weights only load failed"):  # what follows advises to run the file's code
            reason = "its weights are a pickle that torch does not read, because it could run code; use safetensors"
        reason = reason or type(error).__name__
        raise ValueError(f"{argument}: {name_or_path} does not load: {reason[:_SHOWN]}") from error
    finally:
        logging.set_verbosity(verbosity)


def _load_errors() -> tuple[type[Exception], ...]:
    """What transformers, tokenizers, safetensors, huggingface_hub and torch raise for files of a model that are damaged
    or of another kind: they use what they read without checks of their own."""
    import pickle

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    libraries = (SafetensorError, StrictDataclassError, pickle.UnpicklingError)
    language = (ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, RuntimeError)
    return (*libraries, *language, OSError, TypeError, ValueError)
