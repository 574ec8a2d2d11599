"""Foreign packages with our names and untested versions get one sentence, in environments like those of users."""

import ast
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import pytest
from limits import LIMIT_S
from places import ROOT

import moetune_guard
from finetune.ranks.versions import TESTED, untested
from launchers.cli import main

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSOLE, CLI, TRAIN = ["moetune", "check"], ["-m", "launchers.cli", "check"], ["-m", "finetune.train"]
TOOLBOX = {"data/__init__.py": "", "data/loader.py": "rows = []\n"}
"""The files of another distribution."""


def _wheel(folder: Path, name: str, files: Mapping[str, str], entry: str = "") -> Path:
    info = f"{name}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **({f"{info}/entry_points.txt": f"[console_scripts]\n{entry}\n"} if entry else {}),
    }
    digests = {path: hashlib.sha256(text.encode()).digest() for path, text in files.items()}
    rows = [
        f"{path},sha256={base64.urlsafe_b64encode(digests[path]).decode().rstrip('=')},{len(text.encode())}"
        for path, text in files.items()
    ]
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,", ""]))
    return wheel


def _our_files() -> dict[str, str]:
    """Return the files that `pip wheel` packs, according to pyproject.toml."""
    packing = PROJECT["tool"]["setuptools"]
    paths = [ROOT / f"{name}.py" for name in packing["py-modules"]]
    patterns = packing["packages"]["find"]["include"]
    for folder in (path.parent for path in ROOT.glob("*/**/__init__.py")):
        package = ".".join(folder.relative_to(ROOT).parts)
        if any(fnmatchcase(package, pattern) for pattern in patterns):
            for pattern in ("*.py", *packing["package-data"].get(package, ())):
                paths += folder.glob(pattern)
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def _environment(folder: Path, files: Mapping[str, str]) -> Path:
    """Create a virtual environment with our requirements, and install moetune by pip from a wheel with these files."""
    venv.create(folder, symlinks=True)
    (_site(folder) / "needs.pth").write_text(sysconfig.get_path("purelib"))
    wheel = _wheel(folder, "moetune", files, f"moetune = {PROJECT['project']['scripts']['moetune']}")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin" / "python"),
        "install",
        "--no-index",
        "--no-deps",
    ]
    subprocess.run([*pip, "--quiet", str(wheel)], check=True, env=os.environ | {"PYTHONPATH": ""}, timeout=LIMIT_S)
    return folder


def _site(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Environments by the way moetune was installed; an editable install is a path file."""
    ways = {"wheel": _our_files(), "editable": {"moetune.pth": str(ROOT)}}
    return {way: _environment(tmp_path_factory.mktemp(way), files) for way, files in ways.items()}


@pytest.fixture
def here(made: dict[str, Path], tmp_path: Path):  # type: ignore[no-untyped-def]
    """A copy of an environment, with files of another distribution extracted over the existing ones."""

    def copy(way: str, foreign: Mapping[str, str]) -> Path:
        folder = shutil.copytree(made[way], tmp_path / way, symlinks=True)
        if foreign:
            with zipfile.ZipFile(_wheel(tmp_path, "toolbox", foreign)) as archive:
                archive.extractall(_site(folder))
        return folder

    return copy


def _run(folder: Path, words: list[str], place: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Start the console command or a module with the environment's Python; `place` is the current folder."""
    start = [str(folder / "bin" / "moetune"), *words[1:]] if words[0] == "moetune" else words
    place.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    kept |= {"DS_ACCELERATOR": "cpu"} | settings
    return subprocess.run(
        [str(folder / "bin" / "python"), *start, "tiny-cpu"],
        cwd=place,
        env=kept,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def _refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Check that it exited with 2 and one sentence that has these parts."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("moetune: ")
    assert [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize("way", ["wheel", "editable"])
def test_alone_in_its_environment_it_runs_with_recipes_of_the_user_s_beside_ours(way, here, tmp_path) -> None:
    folder = here(way, {})
    if way == "wheel":
        (_site(folder) / "configs" / "mine.yaml").write_text("base: tiny-cpu\n")
    first, second = (_run(folder, CONSOLE, tmp_path / "place") for _ in range(2))  # the second finds compiled modules
    assert [(done.returncode, done.stderr) for done in (first, second)] == [(0, "")] * 2


def test_a_clone_that_is_not_installed_runs(here) -> None:
    folder = here("editable", {})
    (_site(folder) / "moetune.pth").unlink()
    done = _run(folder, CLI, ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("start", [CONSOLE, CLI, TRAIN], ids=["console", "cli", "train"])
@pytest.mark.parametrize("way", ["wheel", "editable"])
def test_another_distribution_s_package_is_named_with_its_owner(way, start, here, tmp_path) -> None:
    folder = here(way, TOOLBOX)
    foreign = _site(folder) / "data" / "__init__.py"
    loader, ours = foreign.with_name("loader.py"), ROOT / "data"
    said = {
        "wheel": f"{loader} (of toolbox 1.0) is in moetune's package `data` but does not belong to moetune: ",
        "editable": f"Python imports `data` from {foreign} (of toolbox 1.0) instead of moetune's from {ours}: ",
    }
    _refused(_run(folder, start, tmp_path / "place"), f"{said[way]}install moetune into an environment of its own")


@pytest.mark.parametrize(
    ("way", "foreign", "start"),
    [
        ("wheel", {"moe/__init__.py": ""}, CONSOLE),  # came later, and wrote over ours
        ("wheel", {"configs/more/site.py": ""}, CLI),  # came earlier or later
        ("wheel", {"finetune/__init__.py": ""}, CONSOLE),
        pytest.param("wheel", {"finetune/__init__.py": ""}, TRAIN, marks=pytest.mark.slow),  # after all imports
        ("editable", {"finetune/__init__.py": ""}, CONSOLE),
    ],
)
def test_any_of_our_packages_may_be_the_one(way, foreign, start, here, tmp_path) -> None:
    (path,) = foreign
    folder = here(way, foreign)
    done = _run(folder, start, tmp_path / "place")
    _refused(done, str(_site(folder) / path), "(of toolbox 1.0)", "install moetune into an environment of its own")


def test_a_module_that_no_distribution_installed_must_be_removed(here, tmp_path) -> None:
    folder = here("wheel", {})
    (_site(folder) / "moe" / "mine.py").write_text("")
    said = f"{_site(folder)}/moe/mine.py is in moetune's package `moe` but does not belong to moetune: remove it"
    _refused(_run(folder, CONSOLE, tmp_path / "place"), said)


def test_a_package_removed_together_with_another_distribution_is_reported(here, tmp_path) -> None:
    folder = here("wheel", {})
    gone = _site(folder) / "data" / "__init__.py"
    gone.unlink()
    _refused(_run(folder, CONSOLE, tmp_path / "place"), f"{gone} is missing: install moetune again")


def test_a_package_in_the_current_folder_matters_only_to_starts_that_look_there(here, tmp_path) -> None:
    folder, place = here("editable", {}), tmp_path / "place"
    (place / "data").mkdir(parents=True)
    assert _run(folder, CLI, place).returncode == 0  # no package: Python goes on to ours
    (place / "data" / "__init__.py").write_text("")
    assert _run(folder, CONSOLE, place).returncode == 0
    for start in (CLI, TRAIN):
        _refused(_run(folder, start, place), f"from {place}/data/__init__.py", ": set PYTHONSAFEPATH=1, or start from")
    assert _run(folder, CLI, place, PYTHONSAFEPATH="1").returncode == 0
    _refused(_run(folder, CONSOLE, tmp_path, PYTHONPATH=str(place)), f": remove {place} from PYTHONPATH")
    shutil.rmtree(place / "data")
    (place / "moe.py").write_text("")
    _refused(
        _run(folder, TRAIN, place), f"Python imports `moe` from {place}/moe.py", ": set PYTHONSAFEPATH=1, or start"
    )
    (_site(folder) / "a.pth").write_text(str(place))  # like another clone's editable install
    _refused(
        _run(folder, CONSOLE, tmp_path), f"from {place}/moe.py instead of", f": remove {place} from Python's path, or"
    )


def test_an_import_raises_an_import_error(here, tmp_path) -> None:
    folder = here("editable", TOOLBOX)
    done = _run(folder, ["-c", "import finetune"], tmp_path / "place")
    assert done.returncode == 1
    assert re.search(r"ImportError: Python imports `data` from \S+ \(of toolbox 1.0\)", done.stderr)


# --- versions


def test_the_tested_versions_are_those_of_pyproject() -> None:
    said = {re.split("[><=]", text)[0]: text for text in PROJECT["project"]["dependencies"]}
    assert {name: said[name] for name in TESTED} == {name: f"{name}{allowed}" for name, allowed in TESTED.items()}
    assert PROJECT["project"]["requires-python"] == f">={'.'.join(map(str, moetune_guard.PYTHON))}"


def test_a_version_outside_its_range() -> None:
    good = {"torch": "2.11.0a0+git", "deepspeed": "0.19.8", "transformers": "5.99.1", "peft": "0.21.2"}
    assert list(untested(good)) == []
    assert list(untested({})) == []
    for found in ("2.10.1", "2.16.0.dev20270101+cu132", "2.9", "3.0", "unknown"):
        assert list(untested(good | {"torch": found})) == [("torch", found)]


def test_check_names_it_and_train_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, found in (("torch", "2.10.0+cu128"), ("peft", "0.18.0")):
        info = tmp_path / f"{name}-{found}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n")
    before = version("torch")
    monkeypatch.syspath_prepend(tmp_path)
    assert version("torch") != before
    assert main(["check", "tiny-cpu"]) == 0
    torch, peft = capsys.readouterr().err.splitlines()
    assert torch == (
        "warning: torch = '2.10.0+cu128' (installed here): moetune is tested with torch>=2.11,<2.16. "
        "Run pip install 'torch>=2.11,<2.16'."
    )
    assert peft.startswith("warning: peft = '0.18.0' (installed here): moetune is tested with peft>=0.21,<1")
    sentence = (
        "torch 2.10.0+cu128 is installed, and moetune is tested with torch>=2.11,<2.16: "
        "pip install 'torch>=2.11,<2.16'\n"
    )
    assert main(["train", "tiny-cpu"]) == 2
    assert capsys.readouterr().err == f"moetune train: {sentence}"
    start = [sys.executable, *TRAIN, "tiny-cpu"]
    settings = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(start, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (2, f"moetune: {sentence}")


def test_what_every_start_runs_first_compiles_on_an_old_python() -> None:
    for name in ("moetune_guard.py", "launchers/__init__.py", "finetune/__init__.py"):
        ast.parse((ROOT / name).read_text(), feature_version=(3, 7))


@pytest.mark.parametrize("module", ["launchers.cli", "finetune.train"])
def test_an_old_python_is_refused_with_the_version_that_is_needed(module: str) -> None:
    """Use this Python with a changed version_info; the test above covers that an older one can read the first files."""
    script = f"import runpy, sys; sys.version_info = (3, 10, 13); sys.argv = ['-m']; runpy.run_module({module!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    _refused(done, "is Python 3.10.13, but moetune needs Python 3.11 or newer: python3.11 -m venv .venv && ")
