"""The modules on a second device: the CPU's results, no operation with tensors of two devices, and no waits.

A host that waits for its device queues nothing meanwhile. So a new `.item()` in a layer fails here, without a GPU.
"""

import functools

import pytest
import torch
from device_session import Case, Outcome, rules, session
from ranks import run_ranks

LIMITS = {"segments": 0, "varlen": 0, "sdpa": 1}
"""Waits per micro-batch, whatever its media and however many layers there are; sdpa looks for its mask once."""

CASES = {
    "recomputed by layer, the tower frozen": Case(),
    "nothing recomputed, the tower adapted": Case(recompute="none", tower="lora", attention="segments"),
    "selective, the tower adapted": Case(recompute="selective", tower="lora"),
    "selective, a mask": Case(recompute="selective", tower="lora", attention="sdpa"),
    "selective, tiled, kept by the host": Case(recompute="selective", tile=5, offload=True),
    "all of the tower trains, dropout": Case(tower="all", dropout=0.3, balance="off"),
    "a dense model": Case(kind="dense", tower="all"),
    "text only": Case(kind="text", recompute="selective"),
}
SLOW = {
    f"{recompute}, {attention}{', ' * bool(words)}{', '.join(words)}": Case(
        recompute=recompute, attention=attention, tower="lora" if not words else "nothing", **words
    )
    for recompute, attention, words in [
        *(
            (recompute, attention, {})
            for recompute in ("none", "layer", "selective")
            for attention in ("segments", "varlen", "sdpa")
            if (recompute, attention) not in (("none", "segments"), ("selective", "varlen"), ("selective", "sdpa"))
        ),
        *(("layer", attention, {"tile": 5}) for attention in ("segments", "varlen", "sdpa")),
        *(("layer", attention, {"offload": True}) for attention in ("segments", "varlen", "sdpa")),
        ("selective", "segments", {"dropout": 0.5}),
    ]
}


@functools.cache
def outcomes(*, slow: bool) -> dict[str, tuple[Outcome, Outcome]]:
    """Run all cases in one process, because torch's spare device can be named only once per process."""
    cases = SLOW if slow else CASES
    return dict(zip(cases, run_ranks(session, 1, list(cases.values()))[0], strict=True))


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_step_on_a_device_equals_the_cpus_and_never_waits(name: str) -> None:
    case = CASES.get(name) or SLOW[name]
    here, there = outcomes(slow=name in SLOW)[name]
    assert there.convolutions == 0, "patches are embedded by a product"
    assert there.losses.keys() == here.losses.keys()
    for row, losses in here.losses.items():
        assert there.losses[row] == pytest.approx(losses, rel=1e-5, abs=1e-6), row
    assert there.grads.keys() == here.grads.keys() != set()
    for key, grad in here.grads.items():
        assert (there.grads[key] - grad).abs().max() <= 2e-5 * grad.abs().max(), key
    assert there.counts == here.counts
    for mine, wanted in zip(there.evaluated, here.evaluated, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    for row, waits in there.waits.items():
        # on CUDA, activations go to page-locked memory, so these copies do not wait
        counted = {place: n for place, n in waits.items() if not (case.offload and "moe/host.py" in place)}
        passes = 2 if row == "evaluation" else 1
        assert sum(counted.values()) <= passes * LIMITS[case.attention], (row, counted)


WAITS = (
    "item",
    "tolist",
    "cpu",
    "bool",
    "nonzero",
    "boolean index",
    "boolean store",
    "blocking copy",
    "copy of pageable memory",
    "a list made a tensor",
)
NO_WAITS = (
    "page-locked copy there",
    "page-locked copy back",
    "known repeats",
    "integer index",
    "masked fill",
    "a number",
    "grouped",
    "convolution",
)


def test_waits_of_a_real_device_are_counted_and_its_errors_are_raised() -> None:
    found = run_ranks(rules, 1)[0]
    assert {name: found[name] for name in WAITS} == dict.fromkeys(WAITS, 1)
    assert found["repeats"] == 2, "one for the copy of the list, one for the unknown length"
    assert {name: found[name] for name in NO_WAITS} == dict.fromkeys(NO_WAITS, 0)
    assert found["convolutions"] == 1
    for name, why in {
        "mixed": "are on the CPU, not on second",
        "mixed weights": "are on the CPU, not on second",
        "rows 12 bytes apart": "rows of [4, 3] lie 12 bytes apart",
        "long offsets": "ffsets",
        "shifted": "starts 1 elements into its memory",
    }.items():
        assert why in str(found[name]), (name, found[name])
