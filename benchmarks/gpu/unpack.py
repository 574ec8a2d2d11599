"""Unzip the kit's wheels into a folder for PYTHONPATH. Runs before any package is there: only the standard library."""

import sys
import zipfile
from pathlib import Path

NEEDED = ("torch", "numpy")
"""What the machine has itself, and the kit does not carry."""


def main(kit: Path, into: Path) -> int:
    """Unzip; 2 where this Python is not the kit's, or lacks torch."""
    expected = (kit / "python").read_text().strip()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if version != expected:
        return _refuse(
            f"{sys.executable} is Python {version}, the kit's packages are for {expected}. Give another one: "
            f"PYTHON=/path/to/python{expected} bash benchmarks/gpu/run.sh"
        )
    unpack(sorted((kit / "wheels").glob("*.whl")), into)
    missing = [name for name in NEEDED if not _can_import(name)]
    if missing:
        return _refuse(f"{sys.executable} has no {' and no '.join(missing)}, which the kit takes from the machine")
    return 0


def unpack(wheels: list[Path], into: Path) -> None:
    """Put each wheel's modules and metadata into one folder; what it has in `.data` but scripts goes there too."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                first, _, rest = name.partition("/")
                kind, _, inside = rest.partition("/")
                if not first.endswith(".data"):
                    archive.extract(name, into)
                elif kind in ("purelib", "platlib") and inside and not inside.endswith("/"):
                    target = into / inside
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))


def _can_import(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _refuse(why: str) -> int:
    print(f"gpu-kit: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
