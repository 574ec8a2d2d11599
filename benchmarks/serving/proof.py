"""Starts one server on one folder, compares it with our own computation, and says what came out."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.serving.cases import BY_KIND, DIFFERS, Case, Outcome, run_of
from benchmarks.serving.environments import Environment
from benchmarks.serving.material import Material
from benchmarks.serving.record import CONTROL, Cell
from finetune.adapters.provenance import seen_settings
from finetune.ask.answers import find_questions, with_media
from finetune.ask.exchange import EndpointError
from finetune.ask.open_model import open_speaker
from finetune.ask.serve_check import Card, serve_check
from finetune.ask.speaker import Speaker
from finetune.config import RunConfig
from finetune.serving import commands
from finetune.serving.commands import ServerName, command, find_served
from finetune.serving.process import Server, free_port, running
from finetune.settings.recipes import load_recipe

TOLERANCE = 1e-3
"""The largest difference allowed between log-probabilities in float32."""
TOKENS = 16
LENGTH = 1024
READY_S = 900.0
ANSWER_S = 300.0
NAME = "proof"
STOCK = Path(commands.__file__).with_name("stock.py")
FLAGS = {"vllm": {"enforce-eager": "", "max-num-seqs": "4"}, "sglang": {}, "transformers": {}}


@dataclass(frozen=True, kw_only=True)
class Proof:
    """One server, installed, and what it is asked to serve."""

    environment: Environment
    server: ServerName
    version: str
    material: Material

    def cells(self, case: Case) -> Iterator[Cell]:
        """Serve a case and yield its cells: equal to ours, and different from what it must differ from."""
        cell = Cell(server=self.server, version=self.version, case=case.name, outcome="equal", expected="equal")
        refusal = case.refused.get(self.server)
        if refusal is not None:
            cell = replace(cell, expected="refused")
        try:
            with self.running(case) as server:
                yield from self._compared(case, server, cell)
        except EndpointError as error:
            proved = refusal is not None and refusal.is_proved_by(self._log(case).read_text(errors="replace"))
            if refusal is not None and proved:
                yield replace(cell, outcome="refused", reason=refusal.reason)
            else:
                print(f"  {error}", flush=True)
                first = str(error).splitlines()[0]
                yield replace(cell, outcome="refused", expected="equal", reason=f"not for a known reason: {first}")

    def _log(self, case: Case) -> Path:
        name = f"{self.server}-{case.name}".replace(" ", "-").replace(",", "")
        return self.material.folder / "logs" / f"{name}.log"

    def running(self, case: Case) -> AbstractContextManager[Server]:
        """Start the server on a case, and end it after the block."""
        model, adapter = self.material.served(case)
        served = find_served(model, adapter, name=NAME)
        port = free_port()
        words = command(served, self.server, port=port, length=LENGTH, dtype="float32", more=FLAGS[self.server])
        words = self._in_environment(words)
        return running(
            words,
            port=port,
            names=[NAME],
            log=self._log(case),
            environment=self.environment.variables(),
            seconds=READY_S,
        )

    def _in_environment(self, words: list[str]) -> list[str]:
        """Return the command with the programs of the server's environment, which knows nothing of ours."""
        if self.server == "transformers":
            return [str(self.environment.python), str(STOCK), *words[words.index("finetune.serving.stock") + 1 :]]
        return [str(self.environment.folder / "bin" / words[0]), *words[1:]]

    def _compared(self, case: Case, server: Server, cell: Cell) -> Iterator[Cell]:
        rows = self.material.rows()
        ours, other = self._ours(case), self._other(case)
        for kinds in [[kind] for kind in case.kinds] if case.name == BY_KIND else [case.kinds]:
            files = [rows[kind] for kind in kinds]
            own = replace(cell, case=f"{case.name}: {kinds[0]}") if case.name == BY_KIND else cell
            known = DIFFERS.get((self.server, kinds[0]), "")
            own = replace(own, expected="differs") if known else own
            card = check(server, ours, files)
            yield replace(own, outcome=outcome(card), reason=known or said(card))
            yield control(own, check(server, other, files))

    def _ours(self, case: Case) -> Speaker:
        """Return the base with the adapter beside it, as training computed, also where the server has them merged."""
        base = str(self.material.base(case.base))
        if case.form == "base":
            return open_speaker(base)
        tuned = run_of(case.tuned)
        learned = self.material.learned(tuned)
        if not tuned.lora:
            return open_speaker(str(learned))
        return open_speaker(base, adapter=learned, config=trained_config(learned))

    def _other(self, case: Case) -> Speaker:
        """Return what the server must not agree with."""
        base = str(self.material.base(case.base))
        if case.control == "base":
            return open_speaker(base)
        if case.control == "tuned":
            return open_speaker(str(self.material.merged(run_of("dense" if case.base == "dense" else "all-ep2"))))
        adapter = self.material.learned(run_of(case.tuned))
        if case.control == "template":
            plain = self.material.without_thinking(run_of(case.tuned))
            return open_speaker(str(plain))
        return open_speaker(base, adapter=adapter)  # without the configuration of training


def check(server: Server, speaker: Speaker, files: Sequence[Path]) -> Card:
    """Return the comparison of a server with our own computation, on all rows of some files."""
    questions, reader = find_questions([str(file) for file in files])
    shown = with_media(questions, reader, control="kept", seed=0)
    endpoint = server.endpoint(NAME, timeout=ANSWER_S)
    *_, card = serve_check(speaker, endpoint, shown, tolerance=TOLERANCE, max_tokens=TOKENS)
    return card


def trained_config(adapter: Path) -> RunConfig:
    """Return the configuration that an adapter was trained with, as far as it decides an answer."""
    from finetune.files.tensorfile import read_header

    seen = seen_settings(read_header(adapter / "adapter_model.safetensors")[1])
    config, problems = load_recipe("", below=(seen, str(adapter)))
    assert not problems, problems
    return config


def outcome(card: Card) -> Outcome:
    """Return whether all that was compared is equal."""
    return "differs" if card.differences or not card.compared["log-probabilities"] else "equal"


def control(cell: Cell, card: Card) -> Cell:
    """Return the cell of a comparison that must fail."""
    what = card.differences[0].topic if card.differences else "nothing differs"
    reason = f"control: {len(card.differences)} differences, the first in {what}" if card.differences else said(card)
    return replace(cell, case=f"{CONTROL}{cell.case}", outcome=outcome(card), expected="differs", reason=reason)


def said(card: Card) -> str:
    """Return a comparison in a line."""
    if card.differences:
        return str(card.differences[0])
    counts = card.compared
    return (
        f"{counts['token ids']} prompts, {counts['image grids']} grids, {counts['greedy text']} tokens equal, "
        f"farthest log-probability {card.farthest:.4f}"
    )
