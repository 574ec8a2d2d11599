"""Programs that a test writes, and the state of processes that it has started."""

import re
import shlex
import sys
from pathlib import Path


def write_program(path: Path, code: str) -> None:
    """Write a program in Python; a first line with the interpreter would break where its path has a space."""
    script = path.with_name(f"{path.name}.py")
    script.write_text(code)
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
    path.chmod(0o755)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended may wait for whoever reaps it."""
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and not re.search(r"^State:\tZ", status.read_text(), re.MULTILINE)
