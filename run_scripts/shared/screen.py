"""What other libraries show on the screen that a user of the scripts can do nothing about is hidden here.

Only scripts call this, when they have read their flags; importing the library changes nothing.
"""

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging

# Lines of a logger that are like this. The second says that a resumed run has other flags than its checkpoint: wrongly
# for those that Trainer or LogShortRuns turn into steps, the default of logging_steps and fractions of the run.
_LINES = {
    "transformers.trainer_utils": (
        re.compile("The tokenizer has new PAD/BOS/EOS tokens that differ from the model config"),
        re.compile(
            r"Warning: The following arguments do not match the ones in the `trainer_state.json`[^\n]*"
            r"(\n\t(logging_steps: 500|(logging|eval|save)_steps: 0\.\d+) \(from args\)[^\n]*)+$"
        ),
    ),
}
# Warnings that start like this.
_WARNINGS = (
    "'pin_memory' argument is set as true but no accelerator is found",
    "Detected pickle protocol",  # an error that says what to do follows
)
# Bars that appear only if the work takes seconds, and only for more than one item.
_BARS, _SECONDS = ("Loading weights", "Writing model shards"), 2


def hide_noise() -> None:
    """Hide known lines, warnings and bars of other libraries; calling it again changes nothing."""
    for name in _LINES:
        logging.getLogger(name).addFilter(_is_shown)
    for start in _WARNINGS:
        warnings.filterwarnings("ignore", message=start.replace("'", "."))
    transformers_logging.set_tqdm_hook(_make_bar)


def show_any_text() -> None:
    """Let standard output show a character that it cannot encode as an escape, instead of ending the program.

    A file name of other bytes than UTF-8 has such characters, and on Windows many texts have.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def without_bars(hide: bool = True) -> Iterator[None]:
    """Hide the bars of `datasets` if `hide`: for work that is one step, whose bar would tell nothing."""
    import datasets

    hide = hide and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _is_shown(record: logging.LogRecord) -> bool:
    return not any(line.match(record.getMessage()) for line in _LINES[record.name])


def _make_bar(factory, args, kwargs):
    if kwargs.get("desc") in _BARS:
        kwargs |= {"delay": _SECONDS, "disable": len(args[0]) < 2}
    return factory(*args, **kwargs)
