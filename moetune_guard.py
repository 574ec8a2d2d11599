"""Checks made before any package of moetune is imported: a recent Python, and packages that are all our own.

Our packages have common names. Python imports another `data` instead of ours if it finds that first, and another
distribution may write into our folders. Then half of each would run, often silently. No other package has this module's
name. It uses nothing newer than Python 3.7, so that it can report that a Python is too old.
"""

import os
import sys
from base64 import urlsafe_b64encode
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

PYTHON = (3, 11)
PACKAGES = ("configs", "data", "finetune", "launchers", "moe")
HOME = Path(__file__).resolve().parent
OWN = "install moetune into an environment of its own (python3 -m venv moetune-env)"


def require_fit(program: bool) -> None:
    """Stop unless moetune can run here: exit with one sentence and code 2 in a program, else raise ImportError."""
    wrong = misfit()
    if wrong and program:
        stop(wrong)
    if wrong:
        raise ImportError(wrong)


def stop(sentence: str) -> None:
    """Print the sentence and exit with code 2, as for wrong input."""
    sys.stderr.write(f"moetune: {sentence}\n")
    sys.exit(2)


@lru_cache(maxsize=None)  # noqa: UP033  functools.cache came with Python 3.9
def misfit() -> str:
    """Return what is wrong, what is needed and what to do, in one sentence; "" if all is well."""
    return _old_python() or _shadowed() or _mixed()


def _old_python() -> str:
    if sys.version_info >= PYTHON:
        return ""
    found, wanted = (".".join(map(str, version)) for version in (sys.version_info[:3], PYTHON))
    command = f"python{wanted} -m venv .venv && .venv/bin/pip install -e {HOME}"
    return f"{sys.executable} is Python {found}, but moetune needs Python {wanted} or newer: {command}"


def _shadowed() -> str:
    """Describe a package or module of the same name that Python finds before ours; return "" if there is none."""
    for name in PACKAGES:
        spec, ours = find_spec(name), HOME / name / "__init__.py"
        if spec is None or not spec.origin:
            return f"moetune's package `{name}` is incomplete, {ours} is missing: install moetune again"
        found = Path(spec.origin).resolve()
        if found != ours:
            root = found.parent if spec.submodule_search_locations is None else found.parent.parent
            owner = _owner(found, root)
            cure = OWN if owner else _way_around(root)
            return f"Python imports `{name}` from {found}{owner} instead of moetune's from {ours.parent}: {cure}"
    return ""


def _mixed() -> str:
    """Describe a module in our installed folders that is not from our wheel; return "" if there is none."""
    records = list(HOME.glob("moetune-*.dist-info/RECORD"))
    if len(records) != 1:  # a clone has none
        return ""
    rows = (line.rsplit(",", 2) for line in records[0].read_text(encoding="utf-8").splitlines())
    brought = {row[0]: row[1] for row in rows}
    for package in PACKAGES:
        first = f"{package}/__init__.py"
        modules = [
            f"{Path(place).relative_to(HOME).as_posix()}/{name}"
            for place, _, names in os.walk(HOME / package)
            for name in names
            if name.endswith((".py", ".so"))
        ]
        strange = [name for name in sorted(modules) if name not in brought]
        strange += [first] if brought.get(first) != _digest(HOME / first) else []
        if strange:
            found = HOME / strange[0]
            owner = _owner(found, HOME)
            cure = OWN if owner else "remove it, and install moetune again"
            return f"{found}{owner} is in moetune's package `{package}` but does not belong to moetune: {cure}"
    return ""


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file in the form that RECORD uses."""
    return "sha256=" + urlsafe_b64encode(sha256(path.read_bytes()).digest()).decode().rstrip("=")


def _owner(found: Path, root: Path) -> str:
    """Return the other distribution that installed a file, in brackets; "" if none did."""
    from importlib.metadata import distributions  # slow, and only needed if something is wrong

    wanted = found.relative_to(root).as_posix()
    for one in distributions():
        here = Path(str(one.locate_file(""))).resolve() == root and one.metadata["Name"] != "moetune"
        if here and any(str(file) == wanted for file in one.files or ()):
            return f" (of {one.metadata['Name']} {one.version})"
    return ""


def _way_around(root: Path) -> str:
    """Return what to do about a folder that no distribution installed."""
    path = os.environ.get("PYTHONPATH")
    if path and any(Path(entry).resolve() == root for entry in path.split(os.pathsep)):
        return f"remove {root} from PYTHONPATH"
    if root == Path.cwd():
        return "set PYTHONSAFEPATH=1, or start from another folder"
    return f"remove {root} from Python's path, or {OWN}"
