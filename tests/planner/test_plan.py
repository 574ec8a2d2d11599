"""Tests of the planner: published numbers, fit of the shipped recipes, proposals, and the output of the command."""

import json
import os
import re
import subprocess
import sys

import pytest
from places import ROOT

from finetune.architecture.families import family
from finetune.architecture.flops import FlopMeter, Training, Work
from finetune.architecture.trained import trained_tensors
from finetune.planner.fit import resolve_auto
from finetune.planner.foresight import resident_here
from finetune.planner.gpus import cluster, gpu_names, peak_flops
from finetune.planner.plan import plan
from finetune.planner.time import Assumed
from finetune.planner.wire import traffic
from finetune.settings.checks import base_family
from finetune.settings.recipes import effective, load_recipe
from launchers.cli import main

GIB = 2**30


def _config(*words: str, recipe: str = "qwen3-vl-30b-a3b-lora"):
    config, problems = load_recipe(recipe, words)
    assert not problems
    return config


def _plan(recipe: str, *words: str, gpus: int, gpu: str = "h100-80gb", per_node: int | None = None):
    config = _config(*words, recipe=recipe)
    return plan(config, base_family(config), cluster(gpu, gpus=gpus, per_node=per_node, price=None))


@pytest.mark.parametrize(
    ("name", "attention", "experts", "active"),
    [("qwen3-vl-30b-a3b", 13.4e6, 629e6, 39.3e6), ("qwen3-vl-235b-a22b", 50.8e6, 2464e6, 154e6)],
)
def test_trained_parameters_match_published_numbers(name, attention, experts, active) -> None:
    words = ("adapters.attention.r=16", "adapters.experts.r=16", f"model.family={name}")
    tensors = trained_tensors(family(name), _config(*words).adapters, ep=1)
    parts = {part: sum(t.elements for t in tensors if t.part == part) for part in ("attention", "experts")}
    assert parts["attention"] == pytest.approx(attention, rel=0.01)
    assert parts["experts"] == pytest.approx(experts, rel=0.01)
    assert parts["experts"] * 8 / 128 == pytest.approx(active, rel=0.01)
    eight = trained_tensors(family(name), _config(*words).adapters, ep=8)
    assert sum(t.elements for t in eight if t.expert) * 8 == parts["experts"]


@pytest.mark.parametrize(("name", "active"), [("qwen3-vl-30b-a3b", 3.04e9), ("qwen3-vl-235b-a22b", 21.57e9)])
def test_operations_of_a_token_are_twice_its_active_parameters(name, active) -> None:
    meter = FlopMeter(family(name), {"attention": Training(mode="full")})
    forward = {part: flops.forward for part, flops in meter.count(Work(tokens=1, supervised=1)).items()}
    assert sum(forward.values()) / 2 == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "ep", "megabytes"),
    [("qwen3-vl-30b-a3b-lora", 2, 4.7), ("qwen3-vl-30b-a3b-lora", 8, 8.3), ("qwen3-vl-235b-a22b-lora", 8, 32.3)],
)
def test_bytes_of_rows_to_experts_match_published_numbers(recipe, ep, megabytes) -> None:
    """Count bytes per token, with all of a layer recomputed and without rows that stay on their rank."""
    planned = _plan(recipe, f"parallel.ep={ep}", "parallel.recompute=layer", "data.packs_per_step=8", gpus=8)
    rows = next(kind for kind in planned.traffic if kind.kind == "expert rows")
    assert rows.bytes / 8192 * (ep - 1) / ep / 1e6 == pytest.approx(megabytes, rel=0.015)


def test_resident_weights_match_published_numbers() -> None:
    always = _plan("qwen3-vl-30b-a3b-lora", gpus=8).memory.always
    weights = sum(size for name, size in always.items() if name.endswith("resident"))
    spare = 48 * 16 * 8 * 2 * 2048 * 2  # rows and columns for the adapters
    assert (weights - spare) / 1e9 == pytest.approx(11.4, rel=0.01)
    assert always["masters"] * 3 == always["masters"] + always["optimiser"]


@pytest.mark.parametrize(("recipe", "gpus"), [("qwen3-vl-30b-a3b-lora", 8), ("qwen3-vl-235b-a22b-lora", 64)])
def test_the_shipped_recipes_fit_80_gb_with_a_margin(recipe, gpus, capsys) -> None:
    assert main(["plan", recipe, "--gpus", str(gpus), "--gpu", "h100-80gb", "--price", "2.5"]) == 0
    printed = capsys.readouterr().out
    assert "GB free" in printed
    assert "at 2.5 per hour" in printed
    planned = _plan(recipe, gpus=gpus)
    assert planned.margin > 0.1 * planned.cluster.gpu.memory_bytes
    assert planned.memory.total == sum(planned.memory.components.values())


def test_every_part_gives_the_same_answer_for_30b_on_one_card_of_80_gb(monkeypatch, capsys) -> None:
    """The plan, its search, both `auto`s of a run and the page agree."""
    recipe, words = "qwen3-vl-30b-a3b-lora", ("parallel.ep=1", "parallel.recompute=layer", "data.packs_per_step=8")
    planned = _plan(recipe, *words, gpus=1)
    assert planned.fits
    assert planned.layout.resident
    assert main(["plan", recipe, "data.packs_per_step=8", "--gpus", "1", "--gpu", "h100-80gb", "--fit", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["fit"]["proposals"][0]["changes"]
    assert best.items() >= {"parallel.ep": 1, "parallel.resident": "frozen", "parallel.recompute": "layer"}.items()
    memory, base = planned.cluster.gpu.memory_bytes, base_family(_config())
    open_config = _config("parallel.ep=auto", "parallel.recompute=auto", "data.packs_per_step=8")
    resolved = resolve_auto(open_config, base, ranks=1, per_node=1, memory_bytes=memory, device=True)
    assert (resolved.parallel.ep, resolved.parallel.recompute) == (1, "layer")
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}.__getitem__)
    here = resident_here(resolved, base)
    assert (here.resident, here.reason) == (True, planned.resident_reason)
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert f"{planned.memory.total / 1e9:.1f} of {memory / 1e9:.1f} GB are foreseen, and 5 % have to stay free" in page
    assert "\nmoetune plan qwen3-vl-30b-a3b-one-gpu --gpus 1 --gpu h100-80gb\n" in page
    assert _plan("qwen3-vl-30b-a3b-one-gpu", gpus=1).memory == planned.memory


def test_a_run_that_leaves_less_than_5_percent_free_does_not_fit(capsys) -> None:
    words = ["data.packs_per_step=8", "parallel.ep=1", "parallel.recompute=layer", "data.tokens_per_pack=22528"]
    assert main(["plan", "qwen3-vl-30b-a3b-lora", *words, "--gpus", "1", "--gpu", "h100-80gb"]) == 3
    printed = capsys.readouterr().out
    assert re.search(r"GB of 84\.93: [0-4]\.\d+ GB free, LESS than the margin of 5%", printed)
    assert re.search(
        r"frozen weights partitioned \(auto: with resident .* needs 8\d\.\d GB of 84.9 GB, of which 5% must stay free",
        printed,
    )


@pytest.mark.parametrize(
    ("recipe", "gpus", "resident"),
    [("qwen3-vl-30b-a3b-lora", 8, True), ("qwen3-vl-30b-a3b-long", 16, True), ("qwen3-vl-235b-a22b-lora", 64, False)],
)
def test_shipped_recipes_place_weights_as_auto_would(recipe, gpus, resident) -> None:
    asked = _plan(recipe, gpus=gpus)
    assert asked.fits
    assert asked.layout.resident == _plan(recipe, "parallel.resident=auto", gpus=gpus).layout.resident == resident


def test_a_plan_that_does_not_fit_exits_with_3_and_names_one_that_does(capsys) -> None:
    words = ["plan", "qwen3-vl-235b-a22b-lora", "--gpus", "64", "--gpu", "h100-80gb"]
    assert main([*words, "parallel.resident=frozen", "parallel.recompute=none"]) == 3
    printed = capsys.readouterr().out
    assert "GB MISSING" in printed
    assert "It does not fit as it is; this does: parallel." in printed


def test_fit_proposes_with_reasons_and_runners_up(capsys) -> None:
    words = ["plan", "qwen3-vl-30b-a3b-lora", "--gpus", "16", "--gpu", "a100-80gb", "--fit", "--json"]
    assert main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    proposals = answer["fit"]["proposals"]
    assert 2 <= len(proposals) <= 4
    assert all("tokens/s per GPU" in proposal["reason"] and proposal["margin"] > 0 for proposal in proposals)
    assert answer["layout"]["resident"]  # 30B stays resident on GPUs of this size
    assert answer["cluster"]["nodes"] == 2


DENSE = ("parallel.ep=1", "adapters.experts.mode=frozen", "adapters.router.mode=frozen")
DENSE_FULL = ("model.family=qwen3-vl-32b", *DENSE, "adapters.attention.mode=full", "adapters.mlp.mode=full")


@pytest.mark.parametrize(
    ("recipe", "gpus", "gpu", "words"),
    [
        ("qwen3-vl-30b-a3b-lora", 1, "l4-24gb", ()),
        ("qwen3-vl-235b-a22b-lora", 1, "h200-141gb", ()),
        ("tiny-cpu", 8, "l40s-48gb", DENSE_FULL),
        ("qwen3-vl-30b-a3b-lora", 2, "a100-40gb", ("data.tokens_per_pack=262144", "data.packs_per_step=2")),
    ],
)
def test_fit_names_a_change_that_helps_when_nothing_fits(recipe, gpus, gpu, words, capsys) -> None:
    words = [*words, "data.packs_per_step=64"] if "data.packs_per_step=2" not in words else [*words]
    line = ["plan", recipe, *words, "--gpu", gpu, "--fit"]
    assert main([*line, "--gpus", str(gpus)]) == 3
    change = capsys.readouterr().out.partition("The smallest change that helps: ")[2].strip().removesuffix(".")
    if change.endswith(" GPUs of this kind"):
        assert main([*line, "--gpus", change.split()[0]]) == 0
    else:
        assert main([*line, "--gpus", str(gpus), change]) == 0
    assert main([*line, "--gpus", str(gpus), "--json"]) == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fit"]["proposals"] == []


def test_fit_accepts_recipes_that_need_a_sequence_group(capsys) -> None:
    """A group of ranks must share each row if there are fewer packs than ranks, whatever the recipe says."""
    words = ["plan", "qwen3-vl-30b-a3b-lora", "--gpus", "8", "--gpu", "h100-80gb", "--fit", "--json"]
    assert main([*words, "data.packs_per_step=4"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["sp"] in (2, 4, 8)
    assert main([*words, "--gpus", "16", "data.packs_per_step=3"]) == 2
    assert "it must be divisible by the 16 data ranks" in capsys.readouterr().err


def test_a_recipe_with_the_proposed_values_needs_no_change(capsys) -> None:
    words = ["plan", "qwen3-vl-30b-a3b-lora", "--gpus", "8", "--gpu", "h100-80gb", "--fit", "--json"]
    assert main(words) == 0
    best = json.loads(capsys.readouterr().out)["fit"]["proposals"][0]["changes"]
    again = [f"{key}={value}" for key, value in best.items()]
    assert main([*words, *again]) == 0
    assert json.loads(capsys.readouterr().out)["fit"]["proposals"][0]["changes"] == {}


def test_an_update_takes_one_group_of_weights_at_a_time() -> None:
    """The gradients, 15 GB per rank when all of 30B trains on eight GPUs, do not exist twice."""
    full = (*(f"adapters.{family}.mode=full" for family in ("attention", "experts", "router")), "parallel.ep=8")
    planned = _plan("qwen3-vl-30b-a3b-lora", *full, "parallel.recompute=layer", gpus=8)
    update = next(moment for moment in planned.memory.moments if moment.name == "update")
    assert planned.memory.always["gradients"] > 14e9
    assert 4e9 < update.total < 5e9
    assert planned.fits


def test_auto_is_resolved_for_the_machine_and_refused_if_nothing_fits() -> None:
    config = _config("parallel.ep=auto", "parallel.recompute=auto")
    assert effective(config)["parallel"]["ep"] == "auto"
    base = base_family(config)
    resolved = resolve_auto(config, base, ranks=8, per_node=8, memory_bytes=80 * GIB, device=True)
    assert resolved.parallel.ep in (1, 2, 4, 8)
    assert resolved.parallel.recompute in ("none", "selective", "layer")
    assert resolve_auto(resolved, base, ranks=8, per_node=8, memory_bytes=1, device=True) == resolved  # no auto left
    with pytest.raises(
        ValueError, match="parallel.ep: auto and parallel.recompute: auto: nothing fits 8 ranks of 4 GB"
    ):
        resolve_auto(config, base, ranks=8, per_node=8, memory_bytes=4 * 10**9, device=True)
    with pytest.raises(ValueError, match="must be resolved before a run is planned"):
        plan(config, base, cluster("h100-80gb", gpus=8, per_node=None, price=None))
    with pytest.raises(ValueError, match="auto must be resolved before operations are counted"):
        FlopMeter(base, {}, recompute="auto")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8", "--gpu", "h100"], "Did you mean `h100-80gb`"),
        (["--gpus", "12", "--gpu", "h100-80gb"], "12 do not fill nodes of 8; take 8 or 16"),
        (["--gpus", "8", "--gpu", "h100-80gb", "--price", "-1"], "is below 0"),
        (["--gpus", "3", "--gpu", "h100-80gb"], "it must divide the number of ranks, 3"),
    ],
)
def test_errors_name_the_wrong_input(words, message, capsys) -> None:
    assert main(["plan", "qwen3-vl-30b-a3b-lora", *words]) == 2
    assert message in capsys.readouterr().err


def test_peak_rates_are_found_by_device_names() -> None:
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("NVIDIA H20") == 148e12
    assert peak_flops("Intel(R) Xeon(R)") is None


@pytest.mark.parametrize("flag", ["--vision-share=2", "--skew=0.5"])
def test_shares_have_ranges(flag, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "tiny-cpu", "--gpus", "2", "--gpu", "h100-80gb", flag])
    assert ", found" in capsys.readouterr().err


def test_a_slow_host_delays_the_step_and_is_named(capsys) -> None:
    words = ["plan", "qwen3-vl-30b-a3b-lora", "--gpus", "8", "--gpu", "h100-80gb", "--json"]
    times = []
    for microseconds in ("16", "500"):
        assert main([*words, "--launch-us", microseconds]) == 0
        times.append(json.loads(capsys.readouterr().out)["time"])
    fast, slow = times
    assert fast["limit"] == "memory"
    assert fast["step"] == pytest.approx(sum(fast["limits"].values()))
    assert slow["limit"] == "host"
    assert slow["step"] == pytest.approx(slow["host"])
    assert slow["limits"] == fast["limits"]
    assert main([*words[:-1], "--launch-us", "500"]) == 0
    assert "the host decides: " in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--launch-us", "0"), ("--image-tokens", "0"), ("--efficiency", "0.3")])
def test_values_that_the_time_model_cannot_use_are_refused(words, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "tiny-cpu", "--gpus", "2", "--gpu", "h100-80gb", *words])
    assert words[0] in capsys.readouterr().err


def test_a_row_of_text_skips_a_resident_frozen_tower() -> None:
    def operations(*words: str, share: float) -> int:
        config, machines = _config(*words), cluster("h100-80gb", gpus=8, per_node=None, price=None)
        return plan(config, base_family(config), machines, assumed=Assumed(vision_share=share)).time.launches

    blocks = 27 * 24  # operations of the tower's blocks
    assert operations(share=0.5) - operations(share=0.0) > blocks
    # every rank calls a tower that is gathered or that needs gradients
    assert operations("parallel.resident=none", share=0.0) - operations(share=0.0) > blocks
    assert operations("adapters.vision_blocks.mode=lora", share=0.0) - operations(share=0.0) > 2 * blocks


def test_gathered_weights_cost_the_host_time_for_hooks() -> None:
    whole = _plan("qwen3-vl-30b-a3b-lora", "parallel.resident=frozen", gpus=8).time
    cut = _plan("qwen3-vl-30b-a3b-lora", "parallel.resident=none", gpus=8).time
    assert cut.host > 1.2 * whole.host * cut.launches / whole.launches


def test_larger_settings_need_more_resources() -> None:
    """Check directions that no change of a formula may reverse."""
    shipped = _plan("qwen3-vl-30b-a3b-lora", gpus=8)
    assert _plan("qwen3-vl-30b-a3b-lora", "data.tokens_per_pack=16384", gpus=8).memory.peak > shipped.memory.peak
    assert _plan("qwen3-vl-30b-a3b-lora", "parallel.recompute=layer", gpus=8).memory.peak < shipped.memory.peak
    assert _plan("qwen3-vl-30b-a3b-lora", "parallel.recompute=none", gpus=8).memory.peak > shipped.memory.peak
    assert _plan("qwen3-vl-30b-a3b-lora", "parallel.ep=4", gpus=8).memory.static > shipped.memory.static
    assert _plan("qwen3-vl-30b-a3b-lora", "adapters.experts.r=16", gpus=8).memory.static > shipped.memory.static
    sliced = _plan("qwen3-vl-30b-a3b-lora", "parallel.sp=2", gpus=8)
    assert sliced.memory.peak < shipped.memory.peak
    assert "sequence slices" in {kind.kind for kind in sliced.traffic}
    wide = _plan("qwen3-vl-30b-a3b-lora", "parallel.ep=16", gpus=16)
    assert next(t for t in wide.traffic if t.kind == "expert rows").link == "network"
    assert wide.time.seconds["expert rows"] > 2 * shipped.time.seconds["expert rows"]


def test_a_dense_model_fits_every_gpu_of_the_table() -> None:
    for name in gpu_names():
        planned = _plan("tiny-cpu", "model.family=tiny-dense", *DENSE, gpus=1, gpu=name)
        assert planned.fits
        assert not planned.traffic


def test_a_plan_needs_no_torch() -> None:
    code = "import sys; from launchers.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    words = ["plan", "tiny-cpu", "--gpus", "2", "--gpu", "h100-80gb"]
    subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=ROOT, capture_output=True)


def test_a_single_rank_has_no_traffic() -> None:
    config = _config("parallel.ep=1", "data.packs_per_step=1")
    machine = cluster("h200-141gb", gpus=1, per_node=None, price=None)
    layout = plan(config, base_family(config), machine).layout
    assert traffic(config, base_family(config), layout, machine, micro_batches=1) == []


def test_tiles_and_activations_in_host_memory_save_memory_for_long_rows() -> None:
    long = ("data.tokens_per_pack=131072", "data.packs_per_step=8", "parallel.recompute=layer")
    plain = _plan("qwen3-vl-30b-a3b-lora", *long, gpus=8)
    tiled = _plan("qwen3-vl-30b-a3b-lora", *long, "parallel.tile_tokens=8192", gpus=8)
    waiting = _plan("qwen3-vl-30b-a3b-lora", *long, "parallel.offload_activations=true", gpus=8)
    assert tiled.memory.peak < 0.8 * plain.memory.peak
    kept, stays = (planned.memory.components["activations kept"] for planned in (plain, waiting))
    assert stays < 0.02 * kept  # the router's choices
    assert waiting.memory.peak < plain.memory.peak - 0.9 * kept
    assert waiting.host.memory["activations that wait"] == 8 * (kept - stays)
    rows = [next(t.bytes for t in planned.traffic if t.kind == "expert rows") for planned in (plain, tiled)]
    assert rows[1] == rows[0] * (8 - 2 / 16) / 6  # the second pass of a layer ends before its last tile of 16
