"""Ctrl-C in a script: one line instead of a traceback, at any moment, also while libraries are imported."""

import _thread
import os
import signal
import sys
import threading
import time
from types import TracebackType

# Until Ctrl-C is raised again, if Python could not raise it; by then, what could not be interrupted has returned.
_DELAY_S = 0.05


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
    earlier = sys.unraisablehook

    def raise_again(lost: "sys.UnraisableHookArgs") -> None:
        # During a callback of the garbage collector or of a weak reference, Python cannot raise an exception: it would
        # print a traceback and let the program run on. Imports have thousands of such callbacks.
        if lost.exc_type is None or not issubclass(lost.exc_type, KeyboardInterrupt):
            earlier(lost)
            return
        # Not threading.Timer: its start waits for the new thread, and an interrupt in here would be lost again.
        _thread.start_new_thread(_interrupt_later, ())

    sys.unraisablehook = raise_again


def _interrupt_later() -> None:
    time.sleep(_DELAY_S)
    if hasattr(signal, "pthread_kill"):  # unlike interrupt_main, it ends what the main thread waits for
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        _thread.interrupt_main()
