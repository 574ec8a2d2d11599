"""Complete runs against a plain loop of transformers, PEFT and torch, at several layouts, and what each run changes."""

from pathlib import Path
from typing import Any

import pytest
from corpora import write_shards
from parity_session import EVERYTHING, STEPS, apart, losses_of, plain_loop, runs, write_start
from ranks import run_ranks
from safetensors.torch import load_file

from finetune.files.tiny import TinyModel, write_tiny

START = "adapters.start_from=start"
FROZEN = [f"adapters.{name}.mode=frozen" for name in ("attention", "experts", "router", "vision_blocks", "merger")]
FULL = [
    f"adapters.{name}.mode=full"
    for name in (
        "attention",
        "experts",
        "router",
        "vision_blocks",
        "merger",
        "deepstack_mergers",
        "patch_embed",
        "pos_embed",
        "norms",
        "embeddings",
        "head",
    )
]
SHORT = ["schedule.steps=4", "schedule.warmup_steps=0", "data.packs_per_step=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _place(tmp_path_factory.mktemp("parity"), TinyModel())


def _place(folder: Path, model: TinyModel) -> Path:
    """Write a base, a mixed data set (text, image, two images, video), and an adapter to start from."""
    write_tiny(folder / "base", model)
    write_shards(folder / "shards")
    write_start(folder)
    return folder


def _run(place: Path, world: int, jobs: dict[str, list[str]]) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return run_ranks(runs, world, jobs)


@pytest.fixture(scope="module")
def reference(place: Path) -> dict[int, list[float]]:
    return {}


def _check(place: Path, name: str, reference: dict[int, list[float]], packs: int) -> None:
    """Check that a run has the losses of the plain loop and ended with the same adapter."""
    out = place / f"plain-{packs}"
    if packs not in reference:
        reference[packs] = plain_loop(place, packs, out)
    assert len(reference[packs]) == STEPS
    assert losses_of(place, name) == pytest.approx(reference[packs], rel=1e-5)
    assert apart(place, name, out) < (3e-5, "")
    assert apart(place, name, place / "start") > (0.01, "")


@pytest.fixture(scope="module")
def two_ranks(place: Path) -> list[dict[str, Any]]:
    """Run all short jobs in one start of two ranks."""
    four = ["data.packs_per_step=4", START, *EVERYTHING]
    jobs = {
        "everything": four,
        "layer": [*four, *SHORT, "parallel.recompute=layer"],
        "selective": [*four, *SHORT, "parallel.recompute=selective"],
        "none": [*four, *SHORT, "parallel.recompute=none"],
        "attention": [*SHORT, *FROZEN, "adapters.attention.mode=lora", "optim.lr=5e-3"],
        "experts": [*SHORT, *FROZEN, "adapters.experts.mode=lora", "optim.lr=5e-3", "parallel.resident=none"],
        "full": [*SHORT, *FULL],
    }
    return _run(place, 2, jobs)


def test_two_ranks_train_like_a_plain_loop(
    two_ranks: list[dict[str, Any]], place: Path, reference: dict[int, list[float]]
) -> None:
    """Start from an adapter, adapt everything, use two learning rates, and clip over dense and expert groups."""
    _check(place, "everything", reference, 4)


def test_recompute_changes_no_loss(two_ranks: list[dict[str, Any]], place: Path) -> None:
    none = losses_of(place, "none")
    assert len(none) == 4
    for mode in ("layer", "selective"):
        assert losses_of(place, mode) == pytest.approx(none, rel=1e-6)


@pytest.mark.parametrize("name", ["everything", "attention", "experts", "full"])
def test_each_run_learns_and_changes_only_the_chosen_parts(
    name: str, two_ranks: list[dict[str, Any]], place: Path
) -> None:
    losses = losses_of(place, name)
    assert losses[-1] < losses[0] - 0.02
    for rank in two_ranks:
        assert rank[name]["before"] == rank[name]["after"]
        assert len(rank[name]["before"]) > (0 if name == "full" else 20)
    folder = place / "runs" / name
    if name == "full":
        files = sorted((folder / "model").glob("*.safetensors"))
        now = {key: value for file in files for key, value in load_file(file).items()}
        was = {k: v for file in sorted((place / "base").glob("*.safetensors")) for k, v in load_file(file).items()}
        assert set(now) == set(was)
        # after the last decoder layer this level affects image tokens only, and none of them is supervised
        still = [key for key in was if now[key].equal(was[key])]
        assert all(key.startswith("model.visual.deepstack_merger_list.2.") for key in still), still
    elif name != "everything":
        held = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert all((".self_attn." if name == "attention" else ".experts.") in key for key in held)


@pytest.mark.slow  # four ranks on two cores take minutes
@pytest.mark.parametrize(("world", "eps"), [(1, (1,)), (4, (2, 4))])
def test_every_layout_trains_like_a_plain_loop(
    world: int, eps: tuple[int, ...], place: Path, reference: dict[int, list[float]]
) -> None:
    """Use four packs per step: four micro-batches on one rank, or one on each of four, with both sizes of ep groups."""
    jobs = {f"{world}-{ep}": ["data.packs_per_step=4", f"parallel.ep={ep}", START, *EVERYTHING] for ep in eps}
    _run(place, world, jobs)
    for name in jobs:
        _check(place, name, reference, 4)


@pytest.mark.slow  # two starts of four ranks, a plain loop over 128 packs
def test_four_micro_batches_on_each_of_four_ranks(tmp_path: Path) -> None:
    """Send every token to all experts: over this many tokens some choice is always within rounding of a tie, and one
    token with another choice changes an expert by 4e-4. Without a choice nothing hides a difference."""
    place = _place(tmp_path, TinyModel(top_k=8))
    words = ["model.family=''", "data.packs_per_step=16", START, *EVERYTHING]
    jobs = {f"4-{ep}": [f"parallel.ep={ep}", *words] for ep in (2, 4)}
    _run(place, 4, jobs)
    reference: dict[int, list[float]] = {}
    for name in jobs:
        _check(place, name, reference, 16)
        assert apart(place, name, place / "plain-16") < (1e-5, "")
