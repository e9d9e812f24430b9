"""Ctrl-C and SIGTERM in a script: one line, without a traceback, at any moment, also while libraries are imported."""

import _thread
import contextlib
import os
import select
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

# Until Ctrl-C is raised again, if Python could not raise it; by then, what could not be interrupted has returned.
_DELAY_S = 0.05


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a script as Ctrl-C does."""


def install() -> None:
    """Print one line for a KeyboardInterrupt that ends the program; its message, if any, says what to do next.

    The process then ends by SIGINT, as Python does, so that a shell shows exit code 130 and stops a loop of commands;
    or by SIGTERM, if that came, and the exit code is 143. SIGTERM keeps another handler than the default, and its
    default in one of several processes, which whoever has started them ends at once when one fails.

    Output that nobody reads any more, as after `| head`, ends the process without a line, by SIGPIPE (141).
    """
    before = sys.excepthook
    if getattr(before, "shows_one_line", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _end_if_unread(kind)
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
        elif int(os.environ.get("RANK", "0")) == 0:
            advice = f"; {error}" if str(error) else ""
            name = "SIGTERM" if issubclass(kind, Terminated) else "Ctrl-C"
            print(f"{os.path.basename(sys.argv[0])}: stopped by {name}{advice}", file=sys.stderr)
        if issubclass(kind, Terminated):
            _end_by_default(signal.SIGTERM)

    hook.shows_one_line = True  # type: ignore[attr-defined]
    sys.excepthook = hook
    earlier = sys.unraisablehook

    def raise_again(lost: "sys.UnraisableHookArgs") -> None:
        # During a callback of the garbage collector or of a weak reference, Python cannot raise an exception: it would
        # print a traceback and let the program run on. Imports have thousands of such callbacks.
        _end_if_unread(lost.exc_type)  # the last lines, when Python ends
        if lost.exc_type is None or not issubclass(lost.exc_type, KeyboardInterrupt):
            earlier(lost)
            return
        # Not threading.Timer: its start waits for the new thread, and an interrupt in here would be lost again.
        number = signal.SIGTERM if issubclass(lost.exc_type, Terminated) else signal.SIGINT
        _thread.start_new_thread(_interrupt_later, (number,))

    sys.unraisablehook = raise_again
    owner = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Terminated
        _end_by_default(number)  # a process that was forked, such as a worker of a pool

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread()
    if alone and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)


def _end_if_unread(kind: type[BaseException] | None) -> None:
    """End the process by SIGPIPE if an error of this class came because nobody reads standard output any more."""
    if kind is None or not issubclass(kind, BrokenPipeError) or not hasattr(signal, "SIGPIPE"):
        return
    poll = select.poll()
    poll.register(1, 0)
    if poll.poll(0):  # an error or an end, which are the events that are always reported
        _end_by_default(signal.SIGPIPE)


def _end_by_default(number: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _interrupt_later(number: int) -> None:
    time.sleep(_DELAY_S)
    if hasattr(signal, "pthread_kill"):  # unlike interrupt_main, it ends what the main thread waits for
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        _thread.interrupt_main(number)
