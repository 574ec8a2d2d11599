"""What must hold before anything of moetune is imported: a Python that it runs on, and packages that are all its own.

Our packages have common names. Another `data` that Python finds first is imported in place of ours, and another
distribution may write into our folders: half of each would run, often silently. This module's name is nobody else's.
Nothing in it is newer than Python 3.7, for it is what says that a Python is too old.
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
    """Stop unless moetune can run here: a program with one sentence and exit code 2, an import with an ImportError."""
    wrong = misfit()
    if wrong and program:
        stop(wrong)
    if wrong:
        raise ImportError(wrong)


def stop(sentence: str) -> None:
    """End this program as one whose input is wrong."""
    sys.stderr.write(f"moetune: {sentence}\n")
    sys.exit(2)


@lru_cache(maxsize=None)  # noqa: UP033  functools.cache came with Python 3.9
def misfit() -> str:
    """Say what is wrong, what is wanted and what to do, in one sentence; nothing when all is well."""
    return _old_python() or _shadowed() or _mixed()


def _old_python() -> str:
    if sys.version_info >= PYTHON:
        return ""
    found, wanted = (".".join(map(str, version)) for version in (sys.version_info[:3], PYTHON))
    command = f"python{wanted} -m venv .venv && .venv/bin/pip install -e {HOME}"
    return f"{sys.executable} is Python {found}, and moetune needs Python {wanted} or newer: {command}"


def _shadowed() -> str:
    """Whether Python finds another package, or a module of that name, before ours."""
    for name in PACKAGES:
        spec, ours = find_spec(name), HOME / name / "__init__.py"
        if spec is None or not spec.origin:
            return f"moetune's package `{name}` is not whole, {ours} is missing: install moetune again"
        found = Path(spec.origin).resolve()
        if found != ours:
            root = found.parent if spec.submodule_search_locations is None else found.parent.parent
            owner = _owner(found, root)
            cure = OWN if owner else _way_around(root)
            return f"Python imports `{name}` from {found}{owner} in place of moetune's in {ours.parent}: {cure}"
    return ""


def _mixed() -> str:
    """Whether a folder of ours, installed from a wheel, holds modules that the wheel did not bring."""
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
            cure = OWN if owner else "take it away, and install moetune again"
            return f"{found}{owner} is in moetune's package `{package}` and is not moetune's: {cure}"
    return ""


def _digest(path: Path) -> str:
    """As RECORD writes it."""
    return "sha256=" + urlsafe_b64encode(sha256(path.read_bytes()).digest()).decode().rstrip("=")


def _owner(found: Path, root: Path) -> str:
    """The other distribution that brought a file, in brackets; nothing when none did."""
    from importlib.metadata import distributions  # slow, and only wanted when something is wrong

    wanted = found.relative_to(root).as_posix()
    for one in distributions():
        here = Path(str(one.locate_file(""))).resolve() == root and one.metadata["Name"] != "moetune"
        if here and any(str(file) == wanted for file in one.files or ()):
            return f" (of {one.metadata['Name']} {one.version})"
    return ""


def _way_around(root: Path) -> str:
    """What to do about a folder that no distribution brought."""
    path = os.environ.get("PYTHONPATH")
    if path and any(Path(entry).resolve() == root for entry in path.split(os.pathsep)):
        return f"take {root} out of PYTHONPATH"
    if root == Path.cwd():
        return "set PYTHONSAFEPATH=1, or start from another folder"
    return f"take {root} off Python's path, or {OWN}"
