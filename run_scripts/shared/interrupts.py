"""Ctrl-C in a script: one line instead of a traceback, at any moment, also while libraries are imported."""

import os
import sys
from types import TracebackType


def install() -> None:
    """Print one line for a KeyboardInterrupt that ends the program; its message, if any, says what to do next.

    The process then ends by SIGINT, as Python does, so that a shell shows exit code 130 and stops a loop of commands.
    """
    before = sys.excepthook
    if getattr(before, "shows_one_line", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
        elif int(os.environ.get("RANK", "0")) == 0:
            advice = f"; {error}" if str(error) else ""
            print(f"{os.path.basename(sys.argv[0])}: stopped by Ctrl-C{advice}", file=sys.stderr)

    hook.shows_one_line = True  # type: ignore[attr-defined]
    sys.excepthook = hook
