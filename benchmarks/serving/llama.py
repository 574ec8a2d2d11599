"""llama.cpp: a merged folder as GGUF files, made by llama.cpp's own converter and served by llama-cpp-python."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.serving.cases import GGUF, run_of
from benchmarks.serving.environments import Environment, run_in
from benchmarks.serving.material import Material
from benchmarks.serving.proof import LENGTH, NAME, READY_S, check, control, outcome, said, trained_config
from benchmarks.serving.record import Cell
from benchmarks.serving.rows import write_text_rows
from finetune.ask.open_model import open_speaker
from finetune.serving.process import free_port, running

CONVERTER = Path("vendor", "llama.cpp", "convert_hf_to_gguf.py")
FLOAT32 = "0"
"""The number of GGML's type; without it, keys and values are kept in float16."""
DIFFERS = {"images": "llama.cpp resizes images by its own rules: to other grids, or to other pixels"}
"""Kinds of conversation that it reads otherwise than training did, each with the reason."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """The two GGUF files of a model: the decoder, and the tower with its mergers."""

    model: Path
    tower: Path


def llama_cells(llama: Environment, converter: Environment, material: Material) -> Iterator[Cell]:
    """Serve a merged folder as GGUF and yield a cell for each kind of conversation, with its control."""
    tuned = run_of(GGUF)
    files = _converted(llama, converter, material.merged(tuned), material.folder / "gguf")
    base, adapter = str(material.base(tuned.base)), material.learned(tuned)
    ours, other = open_speaker(base, adapter=adapter, config=trained_config(adapter)), open_speaker(base)
    cell = Cell(
        server="llama.cpp",
        version=llama.version("llama-cpp-python"),
        case="merged, as GGUF in float32",
        outcome="equal",
        expected="equal",
    )
    port = free_port()
    kinds = {"text": write_text_rows(material.folder / "rows"), "images": material.rows()["images"]}
    log = material.folder / "logs" / "llama.cpp.log"
    words = _command(llama, files, port)
    with running(words, port=port, names=[NAME], log=log, environment=llama.variables(), seconds=READY_S) as server:
        for kind, rows in kinds.items():
            known = DIFFERS.get(kind, "")
            own = replace(cell, case=f"{cell.case}: {kind}", expected="differs" if known else "equal")
            card = check(server, ours, [rows])
            yield replace(own, outcome=outcome(card), reason=known or said(card))
            yield control(own, check(server, other, [rows]))


def _converted(llama: Environment, converter: Environment, merged: Path, out: Path) -> Files:
    """Convert a merged folder in float32, by the script that comes with llama-cpp-python's source."""
    (source,) = (llama.folder / "source").glob("llama_cpp_python-*/")
    files = Files(model=out / "model.gguf", tower=out / "mmproj.gguf")
    out.mkdir(parents=True, exist_ok=True)
    for file, part in ((files.model, []), (files.tower, ["--mmproj"])):
        if not file.is_file():
            words = [source / CONVERTER, merged, *part, "--outtype", "f32", "--outfile", file]
            run_in(converter, *map(str, words))
    return files


def _command(llama: Environment, files: Files, port: int) -> list[str]:
    words = [str(llama.python), "-m", "llama_cpp.server", "--model", str(files.model), "--model_alias", NAME]
    words += ["--chat_format", "mtmd", "--clip_model_path", str(files.tower), "--n_ctx", str(LENGTH)]
    return [*words, "--type_k", FLOAT32, "--type_v", FLOAT32, "--host", "127.0.0.1", "--port", str(port)]
