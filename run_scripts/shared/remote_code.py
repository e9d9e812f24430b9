"""Code that a model's folder or repository contains: the flag that allows it, and the error without the flag."""

import contextlib
from collections.abc import Iterator
from dataclasses import field


def trust_flag() -> bool:
    """The field `trust_remote_code` of a script's arguments."""
    return field(default=False, metadata={"help": "Run code that the model's own folder or repository contains, if "
                 "the model needs it. Read it first."})  # fmt: skip


@contextlib.contextmanager
def named(name_or_path: str, argument: str = "model_name_or_path") -> Iterator[None]:
    """Around a load: a model that needs code of its own gives an error that names the flag, if it may not be run."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{argument}: {name_or_path} needs code of its own, which was not run; read it, and pass "
            "--trust_remote_code true if you trust it"
        ) from error
