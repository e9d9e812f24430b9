"""A headless browser for tests, and the reason to skip them without one."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Screenshots are kept here for a person to look at.
SCREENSHOTS = Path(__file__).resolve().parents[2] / "out" / "screenshots"
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# For a machine with other work; an idle one needs a second for what is waited for.
_PATIENCE_MS = 240_000
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


def program() -> str | None:
    """The path of Chromium, `$CHROMIUM` or one that is installed."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _PROGRAMS)), None)


def missing(*modules: str) -> str:
    """Why a test in the browser cannot run: names of what is missing; empty if nothing is."""
    absent = [name for name in ("playwright", *modules) if importlib.util.find_spec(name) is None]
    return ", ".join([*absent, *([] if program() else ["chromium"])]) and f"needs {', '.join(absent) or 'chromium'}"


@contextmanager
def open_page(**options) -> Iterator:
    """A new page that notes down errors in `page.errors` and requests to other machines in `page.outside`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program(), args=list(_FLAGS), timeout=_PATIENCE_MS)
        page = chromium.new_page(**options)
        page.set_default_timeout(_PATIENCE_MS)
        page.errors, page.outside = [], []
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("request", lambda request: page.outside.append(request.url) if _is_outside(request.url) else None)
        yield page
        chromium.close()


def _is_outside(url: str) -> bool:
    return url.startswith(("http", "ws")) and "//127.0.0.1:" not in url
