"""A headless Chromium: the one that Playwright has installed, else one of the system."""

import os
import shutil
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def chromium(started: Any) -> Any:
    """Return a browser of a started Playwright; raise ValueError if none is installed."""
    own = started.chromium.executable_path
    program = own if Path(own).exists() else next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        raise ValueError("no Chromium: run `playwright install chromium`, or install it with the system's packages")
    return started.chromium.launch(executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else [])
