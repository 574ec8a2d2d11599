import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from limits import LIMIT_S
from places import ROOT

from benchmarks.__main__ import OWN, main
from benchmarks.entries import ENTRIES, Entry
from benchmarks.experts import moe_lora_memory, moe_lora_step, scaling_shape
from benchmarks.experts.expert_block import Pair, Shape, same_step
from benchmarks.harness import machine
from benchmarks.harness.figure import Figure, Peer, at_least, at_most, exactly, ratio_at_least
from benchmarks.harness.measure import OutputsDiffer, Side, counted, fastest, race, spread
from benchmarks.harness.memory import Allocations, AnonymousPeak, Saved
from benchmarks.harness.outputs import same_tensors

FIELDS = ["name", "commit", "versions", "machine", "config", "metric", "value", "unit", "n", "spread"]
FIELDS += ["peer", "peer_value", "ratio", "target", "pass"]

GOOD = """
    import time
    from benchmarks.harness.figure import Figure, ratio_at_least
    from benchmarks.harness.measure import OutputsDiffer, Side, counted, race

    def slow():
        time.sleep(0.02)
        return 7

    def equal(ours, peer):
        if ours != peer:
            raise OutputsDiffer(f"{ours} is not {peer}")

    def run():
        raced = race(Side(name="ours", run=lambda: 7), Side(name="sleeper", run=slow), same=equal, rounds=3)
        yield raced.figure("step", config={"size": 3}, target=ratio_at_least(2, goal=1e9))
        yield counted("units", 4, "messages", expected=4, config={})
        yield Figure("for the record", 1.5, "x", config={})
"""
MISSED = """
    from benchmarks.harness.measure import counted

    def run():
        yield counted("units", 6, "messages", expected=4, config={})
"""
WRONG = GOOD.replace("lambda: 7", "lambda: 8")


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """Return a function that makes real benchmark modules from source."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, source):
        module = f"synthetic_{tmp_path.name}_{name}".replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        return Entry(name=name, module=module, about=f"the {name} one")

    return make


def test_a_figure_becomes_a_record_and_a_line(entry, tmp_path, capsys):
    entries = [entry("good", GOOD)]
    assert main(["good", "--json", str(tmp_path / "deep" / "out.json")], entries=entries) == 0
    records = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert [list(record) for record in records] == [FIELDS] * 3
    step, units, plain = records
    assert (step["name"], step["metric"], step["unit"], step["n"], step["peer"]) == ("good", "step", "ms", 3, "sleeper")
    assert step["config"] == {"size": 3, "statistic": "min"}
    assert step["peer_value"] >= 20
    assert step["ratio"] == pytest.approx(step["peer_value"] / step["value"])
    assert step["target"] == {"of": "ratio", "rule": "at least", "floor": 2, "goal": 1e9}
    assert step["pass"] is True
    assert set(step["spread"]) == {"ours", "peer"}
    assert (units["value"], units["config"], units["peer"], units["pass"]) == (4, {"expected": 4}, None, True)
    assert (plain["target"], plain["ratio"], plain["pass"]) == (None, None, None)
    assert step["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # a wheel has no +cu132
    assert set(step["machine"]) == {"cpu", "cores", "memory_gb", "load", "gpu"}
    assert step["machine"]["cores"] >= 1
    assert step["machine"]["memory_gb"] > 0.5
    printed = capsys.readouterr().out
    assert "step: " in printed
    assert "ratio at least 2, goal 1e+09: floor passed" in printed
    assert "value exactly 4: goal met" in printed


def test_a_missed_floor_fails_and_the_other_benchmarks_run(entry, tmp_path, capsys):
    entries = [entry("missed", MISSED), entry("good", GOOD)]
    assert main(["--all", "--json", str(tmp_path / "out.json")], entries=entries) == 1
    records = json.loads((tmp_path / "out.json").read_text())
    assert [(record["name"], record["pass"]) for record in records] == [
        ("missed", False),
        ("good", True),
        ("good", True),
        ("good", None),
    ]
    assert "value exactly 4: FLOOR MISSED" in capsys.readouterr().out


def test_a_faster_wrong_result_is_refused(entry, tmp_path, capsys):
    assert main(["wrong", "--json", str(tmp_path / "out.json")], entries=[entry("wrong", WRONG)]) == 1
    assert capsys.readouterr().err == "wrong: refused, outputs differ: 8 is not 7\n"
    (record,) = json.loads((tmp_path / "out.json").read_text())
    assert list(record) == FIELDS
    assert (record["value"], record["ratio"], record["pass"], record["config"]) == (
        None,
        None,
        False,
        {"refused": "8 is not 7"},
    )


def test_a_crash_keeps_the_records_before_it(entry, tmp_path):
    entries = [entry("good", GOOD), entry("broken", "def run():\n    yield 1 / 0\n")]
    with pytest.raises(ZeroDivisionError):
        main(["--all", "--json", str(tmp_path / "out.json")], entries=entries)
    assert len(json.loads((tmp_path / "out.json").read_text())) == 3


def test_an_unknown_name_gets_a_suggestion(capsys):
    assert main(["config-chek"]) == 2
    assert (
        "no benchmark is called 'config-chek'. Did you mean 'config-check'? Available are: " in capsys.readouterr().err
    )


def test_listing_loads_neither_torch_nor_an_entry():
    script = (
        "import sys; from benchmarks.__main__ import main; code = main(['--list'])\n"
        "heavy = [m for m in sys.modules if m in ('torch', 'numpy', 'transformers', 'benchmarks.steps.config_check')]\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, own = done.stdout.splitlines()
    assert own == f"with options of their own: {', '.join(OWN)}"
    for listed, line in zip(ENTRIES, lines, strict=True):
        assert line.split()[0] == listed.name
        assert line.endswith(listed.about)


def test_every_entry_has_a_module_and_a_unique_name():
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    for listed in ENTRIES:
        assert (ROOT / f"{listed.module.replace('.', '/')}.py").exists()


def test_the_config_check_benchmark_runs(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks", "config-check", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stderr == ""
    (record,) = json.loads(path.read_text())
    assert record["metric"] == "cold start of check"
    assert record["value"] > 0
    assert record["pass"] is (done.returncode == 0)  # tests never assert the seconds themselves


def test_config_check_refuses_a_check_that_fails_or_varies(monkeypatch):
    from benchmarks.steps import config_check

    with pytest.raises(OutputsDiffer, match="(?s)`-c .*` ended with exit code 3:\nbroken"):
        config_check._output([sys.executable, "-c", "import sys; sys.stderr.write('broken'); sys.exit(3)"])
    with pytest.raises(OutputsDiffer, match="printed no effective config, but: 'nothing'"):
        config_check._same_twice("nothing", [sys.executable, "-c", "pass"])
    with pytest.raises(OutputsDiffer, match="(?s)printed two different texts:\nmodel: 1\n---\nmodel: 2"):
        config_check._same_twice("model: 1", [sys.executable, "-c", "print('model: 2')"])


def test_a_race_compares_outputs_and_then_takes_turns():
    calls = []
    sides = [Side(name=name, run=lambda name=name: calls.append(name) or name) for name in ("ours", "peer")]
    raced = race(*sides, same=lambda *outputs: calls.append(outputs), rounds=3, warmup=1)
    assert calls == ["ours", "peer", ("ours", "peer"), "ours", "peer"] + [
        "ours",
        "peer",
        "peer",
        "ours",
        "ours",
        "peer",
    ]
    assert (len(raced.ours_s), len(raced.peer_s), raced.peer) == (3, 3, "peer")


def test_a_race_refuses_before_it_times():
    calls = []

    def differ(ours, peer):
        raise OutputsDiffer("not the same")

    side = Side(name="ours", run=lambda: calls.append(1))
    with pytest.raises(OutputsDiffer, match="not the same"):
        race(side, side, same=differ, rounds=5)
    assert len(calls) == 2


def test_the_statistic_and_its_spread():
    side = Side(name="peer", run=lambda: None)
    raced = race(side, side, same=lambda *_: None, rounds=1, statistic="median")
    object.__setattr__(raced, "ours_s", (0.003, 0.001, 0.002))
    figure = raced.figure("step", config={})
    assert figure.value == pytest.approx(2.0)
    assert figure.spread["ours"] == pytest.approx(1.0)  # the median is twice the fastest
    assert spread((0.5, 0.5)) == 0.0


@pytest.mark.parametrize(
    ("target", "found", "passes", "meets_goal"),
    [
        (at_least(3, goal=4.5), 2.9, False, False),
        (at_least(3, goal=4.5), 3.0, True, False),
        (at_least(3, goal=4.5), 4.5, True, True),
        (at_most(1.3, goal=1.1), 1.31, False, False),
        (at_most(1.3, goal=1.1), 1.2, True, False),
        (exactly(4), 4, True, True),
        (exactly(4), 5, False, False),
        (at_most(1.3), float("nan"), False, False),
    ],
)
def test_floor_and_goal(target, found, passes, meets_goal):
    figure = Figure("m", found, "x", config={}, target=target)
    assert (figure.passed, figure.met_goal) == (passes, meets_goal)


def test_the_ratio_is_how_many_times_better_ours_is():
    half_the_time = Figure("m", 2.0, "ms", config={}, peer=Peer("p", 4.0))
    twice_the_rate = Figure("m", 4.0, "1/s", config={}, better="higher", peer=Peer("p", 2.0))
    assert half_the_time.ratio == twice_the_rate.ratio == 2.0
    target = ratio_at_least(2.5)
    missed = Figure("m", 2.0, "ms", config={}, peer=Peer("p", 4.0), target=target)
    assert missed.passed is False


def test_a_count_passes_only_if_it_is_exact():
    assert counted("m", 4, "x", expected=4, config={}).passed
    assert not counted("m", 5, "x", expected=4, config={}).passed
    assert not counted("m", 3, "x", expected=4, config={}).passed


def test_tensors_are_compared_by_their_largest_value():
    peer = {"out": torch.tensor([100.0, 1.0]), "grad": torch.tensor([1.0])}
    near = {"out": torch.tensor([100.0, 1.0005]), "grad": torch.tensor([1.0])}
    assert same_tensors(near, peer, relative=1e-5) == pytest.approx({"out": 5e-6, "grad": 0.0}, abs=1e-7)
    with pytest.raises(OutputsDiffer, match="relative to the largest value, with 1e-06 allowed: out by 5.0e-06"):
        same_tensors(near, peer, relative=1e-6)
    with pytest.raises(OutputsDiffer, match="grad by nan"):
        same_tensors(peer | {"grad": torch.tensor([float("nan")])}, peer, relative=1.0)
    with pytest.raises(OutputsDiffer, match=r"out has shape \(1,\), the peer's has \(2,\)"):
        same_tensors(peer | {"out": torch.ones(1)}, peer, relative=1.0)
    with pytest.raises(OutputsDiffer, match=r"ours gives \['grad'\], the peer gives \['grad', 'out'\]"):
        same_tensors({"grad": peer["grad"]}, peer, relative=1.0)
    with pytest.raises(OutputsDiffer, match="grad is all zeros on the peer's side"):
        same_tensors(peer, peer | {"grad": torch.zeros(1)}, relative=1.0)


def test_saved_bytes_are_those_kept_for_backward():
    x, w = torch.randn(8, 16), torch.randn(16, 4, requires_grad=True)
    with Saved(beside=[x, w]) as saved:
        h = x @ w  # keeps x, which exists anyway
        y = h.exp()  # keeps its result, 8 x 4 floats
        z = y.view(4, 8) * 2.0  # a view shares its storage, and a constant factor keeps nothing
    assert saved.bytes == 8 * 4 * 4
    with Saved(beside=[]) as everything:
        h = x @ w
    assert everything.bytes == x.nbytes
    del h, y, z
    assert saved.bytes == 0


def test_allocations_count_the_largest_the_live_and_the_peak_bytes():
    x = torch.randn(256)
    with Allocations() as seen:
        big = torch.cat([x, x])  # 2048 bytes
        part = big[:10]  # a view allocates nothing
        x.add_(1.0)  # nor does an in-place operation
        small = part + 1.0
        assert seen.live_bytes == 2048 + 40
        del big, part
        assert seen.live_bytes == 40
        other = x * 2.0  # 1024 bytes
    assert seen.largest_bytes == 2048
    assert seen.largest_by == "aten.cat.default -> (512,)"
    assert seen.peak_bytes == 2048 + 40
    assert seen.live_bytes == small.nbytes + other.nbytes == 40 + 1024


def test_allocations_count_backward_too():
    weight = torch.randn(32, 8, requires_grad=True)
    x = torch.randn(4, 32)
    with Allocations() as forward:
        loss = (x @ weight).sum()
    assert forward.largest_bytes < weight.nbytes
    with Allocations() as backward:
        loss.backward()
    assert backward.largest_bytes == weight.nbytes


def test_the_anonymous_peak_is_sampled():
    megabytes = 64
    with AnonymousPeak() as seen:
        block = bytearray(os.urandom(1 << 20) * megabytes)
        limit = time.monotonic() + LIMIT_S
        while seen.peak_bytes < 0.9 * megabytes * 2**20 and time.monotonic() < limit:
            time.sleep(0.01)
        del block
    assert seen.peak_bytes > 0.9 * megabytes * 2**20
    assert seen.end_bytes - seen.start_bytes < 0.5 * megabytes * 2**20


def test_the_commit_marks_changes_and_ignores_other_clones(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *words],
            check=True,
            capture_output=True,
        )

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    clean = machine.commit(tmp_path.resolve())
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "file").write_text("2")
    assert machine.commit(tmp_path.resolve()) == f"{clean}-dirty"
    inside = tmp_path.resolve() / "site-packages"
    inside.mkdir()
    assert machine.commit(inside).startswith("version ")


TINY = Shape(hidden=32, intermediate=20, experts=12, top_k=3, r=4)  # all different, to reveal mixed-up layouts


def test_our_expert_block_and_pefts_compute_the_same():
    pair = Pair(TINY)
    ours, peer = pair.sides(pair.inputs(24))
    found, theirs = ours.run(), peer.run()
    assert list(found) == ["y", "dx", "dscores"] + [f"d{p}_lora_{f}" for p in ("gate_up", "down") for f in "AB"]
    same_step(found, theirs)
    same_step(found, Pair(TINY, implementation="eager").sides(pair.inputs(24))[1].run())
    with torch.no_grad():
        pair.experts.down_lora_B[5, 7, 2] += 0.1  # one value of one factor
    with pytest.raises(OutputsDiffer, match="y by .*dgate_up_lora_B by"):
        same_step(ours.run(), theirs)


def test_the_fastest_of_some_rounds_is_the_figure():
    figure = fastest("m", [3.0, 2.0, 4.0], "s", config={}, peer=("p", [8.0, 4.0]))
    assert (figure.value, figure.n, figure.peer, figure.ratio) == (2.0, 3, Peer("p", 4.0), 2.0)
    assert figure.spread == {"ours": 0.5, "peer": 0.5}
    alone = fastest("m", [3.0], "s", config={})
    assert (alone.peer, alone.spread) == (None, {"ours": 0.0})


def test_the_lora_step_is_timed_for_both():
    target = ratio_at_least(0.9)
    figure = moe_lora_step._figure(Pair(TINY), 24, 2, target)
    assert (figure.unit, figure.n, figure.target) == ("ms", 2, target)
    assert figure.peer.name == "PEFT ParamWrapper, grouped_mm"
    assert figure.config["hidden"] == 32
    assert figure.config["tokens"] == 24
    assert min(figure.value, figure.peer.value) > 0


def test_the_lora_memory_is_counted_for_both():
    pair = Pair(TINY)
    saved, alive, peak, largest = moe_lora_memory._figures(pair, 24)
    rows = 24 * TINY.top_k
    stacks = 4 * TINY.experts * 3 * TINY.intermediate * TINY.hidden
    assert saved.value * 2**20 >= 4 * rows * (TINY.hidden + 2 * TINY.intermediate)  # at least x and the gate_up output
    assert saved.peer.value * 2**20 >= stacks  # PEFT keeps both merged stacks
    assert saved.value <= alive.value <= peak.value
    assert saved.passed
    assert alive.passed
    assert largest.peer.value * 2**20 == 4 * TINY.experts * 2 * TINY.intermediate * TINY.hidden
    assert 0 < largest.value * 2**20 <= 4 * rows * (2 * TINY.intermediate + TINY.r) == largest.target.goal * 2**20
    assert largest.met_goal


def test_the_growth_with_experts_is_measured_for_both(monkeypatch):
    monkeypatch.setattr(scaling_shape, "FEW", dataclasses.replace(TINY, experts=4))
    monkeypatch.setattr(scaling_shape, "MANY", TINY)
    monkeypatch.setattr(scaling_shape, "CASES", ((24, 2),))
    threads = torch.get_num_threads()
    figure, gemms = scaling_shape.run()
    torch.set_num_threads(threads)
    assert gemms.value > 0
    assert gemms.target is None
    assert figure.config["experts"] == [4, 12]
    assert figure.unit == "x"
    assert min(figure.value, figure.peer.value) > 0
    assert figure.target == at_most(1.3)


@pytest.mark.slow  # five processes that import PEFT and transformers
def test_merge_and_export_are_measured_on_any_size(monkeypatch):
    from benchmarks.weights import export, merge, merge_case

    for name, value in {"GB": 0.01, "LAYERS": 2, "HIDDEN": 192, "INNER": 80}.items():
        monkeypatch.setattr(merge_case, name, value)
    monkeypatch.setattr(merge, "ROUNDS", 1)
    figures = list(merge.run())  # real processes: ours, PEFT's merge and a copy; outputs are compared
    assert [(figure.metric, figure.peer.name) for figure in figures] == [
        ("seconds to merge", merge.PEER),
        ("peak memory above imports", merge.PEER),
        ("seconds to merge", "a plain copy, synced"),
    ]
    assert all(figure.value > 0 for figure in figures)
    assert figures[1].value < figures[1].peer.value / 3  # bytes, not seconds
    monkeypatch.setattr(export, "ROUNDS", 1)
    assert [figure.config["form"] for figure in export.run()] == ["peft", "per-expert"]


def test_a_merge_that_differs_from_the_peer_is_not_measured(tmp_path):
    from benchmarks.weights.merge import _same_outputs
    from finetune.files.tiny import TinyModel, write_tiny

    for name, seed in (("ours", 1), ("same", 1), ("other", 2)):
        write_tiny(tmp_path / name, TinyModel(seed=seed))
    _same_outputs(tmp_path / "ours", tmp_path / "same")
    with pytest.raises(OutputsDiffer):
        _same_outputs(tmp_path / "ours", tmp_path / "other")


@pytest.mark.slow  # two starts of a rank
def test_waits_are_counted_for_both(monkeypatch):
    from benchmarks.device import waits

    monkeypatch.setattr(waits, "LAYERS", (3, 4))
    monkeypatch.setattr(waits, "TOWER_BLOCKS", 4)
    text, text_layer, media, media_layer = waits.run()
    assert all(figure.met_goal for figure in (text, text_layer, media, media_layer))
    assert media.peer.value == sum(media.config["peer"].values()) > 6 * 4, "three lists per block, in both passes"
    assert text_layer.value == media_layer.value == 0
