"""Reads per rank, at sizes that cannot be loaded here: each byte is read once, and no rank keeps more than expected."""

from math import prod

import pytest

from finetune.architecture.families import family, family_names
from finetune.architecture.rank_shares import rank_shares
from finetune.architecture.shapes import is_expert_stack, parameter_counts, parameter_shapes
from launchers.cli import main

LARGE = "qwen3-vl-235b-a22b"


def test_235b_on_64_ranks_is_read_once_and_no_rank_keeps_more_than_the_formula() -> None:
    counts = parameter_counts(family(LARGE))
    dense = counts.total - counts.experts
    for ep, resident in ((64, True), (64, False), (8, True), (8, False)):
        shares = rank_shares(parameter_shapes(family(LARGE)), world_size=64, ep_size=ep, itemsize=2, resident=resident)
        assert sum(share.read for share in shares) == 2 * 235_670_022_896
        assert [share.read for share in shares[ep:]] == [0] * (64 - ep)
        if resident:
            assert {share.kept for share in shares} == {2 * (dense + counts.experts // ep)}
        else:
            exact = 2 * (dense / 64 + counts.experts / 64)
            assert all(exact <= share.kept <= exact + 2 * 64 * 2000 for share in shares), "rounded up per tensor"


@pytest.mark.parametrize("name", family_names())
def test_each_family_is_read_once(name: str) -> None:
    base = family(name)
    experts = base.text.experts
    for ep in (1, 2, 4) if experts else (1,):
        shares = rank_shares(parameter_shapes(base), world_size=8, ep_size=ep, itemsize=4, resident=False)
        assert sum(share.read for share in shares) == 4 * parameter_counts(base).total
        cut = (prod(s) // (ep if is_expert_stack(n) else 1) for n, s in parameter_shapes(base).items())
        assert shares[0].largest == 4 * max(cut)


def test_check_prints_the_reads_of_each_rank(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", "qwen3-vl-30b-a3b-lora", f"model.family={LARGE}", "data.packs_per_step=64", "--ranks", "64"]
    assert main([*command, "--reads"]) == 0
    printed = capsys.readouterr().out
    assert "loading, resident: all ranks together read 471,340,045,792 bytes, each once" in printed
    assert "loading, partitioned: each of ranks 8 to 63 reads 0 bytes and keeps 7,3" in printed
    assert "loading, resident: each of ranks 1 to 7 reads 56,774,098,944 bytes" in printed
