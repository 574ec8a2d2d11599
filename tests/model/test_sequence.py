"""Rows in slices over sequence groups: losses, gradients, load and norms equal those of rows that are not sliced."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_rows import row, sample
from ranks import run_ranks
from sequence_session import PACKS, Case, Outcome, adapted_model, session
from tiny_moe import END, IMAGE, START, VIDEO
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.long_rows.long_ranks import RankResult, Setup, run_setups
from finetune.model.row import lay_out
from finetune.model.sequence import SequenceGroup, divisible, own_part, sequence_group
from finetune.model.sequence_attention import NAMES, key_copies, use_sequence
from finetune.model.sequence_vision import shares
from moe.parallel import LayerOptions, replace_moe_blocks

CASES = {
    (2, "sp 2, ep 1"): Case(sp=2, how="sqrt"),
    (2, "sp 2, ep 2, recompute selective"): Case(sp=2, ep=2, recompute="selective", length=10),
    (2, "sp 2, partitioned, sdpa, recompute by layer"): Case(
        sp=2, ep=2, resident=False, backend="sdpa", recompute="layer", balance="micro"
    ),
    (2, "sp 2, tiled and offloaded, recompute by layer"): Case(
        sp=2, ep=2, tile=5, offload=True, recompute="layer", how="sqrt"
    ),
    (2, "sp 2, partitioned, tiled and offloaded, selective"): Case(
        sp=2, ep=2, tile=7, offload=True, recompute="selective", resident=False, length=10
    ),
    (4, "sp 2, ep 2"): Case(sp=2, ep=2, how="sample"),
    (4, "sp 4, ep 4, more slices than key heads"): Case(sp=4, ep=4, recompute="selective"),
    (4, "sp 2, ep 4"): Case(sp=2, ep=4, recompute="selective", length=10),
    (4, "sp 4, ep 2, partitioned"): Case(sp=4, ep=2, resident=False, balance="micro"),
}


@functools.cache
def outcomes(world: int) -> dict[str, list[Outcome]]:
    """Run all cases for `world` ranks in one start."""
    cases = {name: case for (size, name), case in CASES.items() if size == world}
    results = run_ranks(session, world, list(cases.values()))
    return {name: [rank[number] for rank in results] for number, name in enumerate(cases)}


@functools.cache
def whole(world: int, sp: int, how: str, balance: str, length: int) -> Outcome:
    """Run the same steps without slices: equally many data ranks, no sequence groups, no expert parallelism."""
    case = Case(how=how, balance=balance, length=length)
    return run_ranks(session, world // sp, [case])[0][0]


def full_grads(ranks: list[Outcome], step: int, ep: int) -> dict[str, torch.Tensor]:
    """Return one rank's gradients, with those of experts concatenated over an expert-parallel group."""
    names = ranks[0].grads[step]
    return {n: torch.cat([r.grads[step][n] for r in ranks[:ep]]) if ".experts." in n else names[n] for n in names}


SLOW = [pytest.param(*key, marks=[pytest.mark.slow] if key[0] == 4 else []) for key in CASES]


@pytest.mark.parametrize(("world", "name"), SLOW)
def test_slices_train_like_whole_rows(world: int, name: str) -> None:
    case, ranks = CASES[world, name], outcomes(world)[name]
    expected = whole(world, case.sp, case.how, case.balance, case.length)
    for rank in ranks:
        assert rank.losses == pytest.approx(expected.losses, rel=1e-5)
        assert rank.balance == pytest.approx(expected.balance, rel=1e-5)
        assert rank.norms == pytest.approx(expected.norms, rel=1e-5)
        assert rank.counts == expected.counts
        assert rank.groups == expected.groups
        assert rank.ce == pytest.approx(expected.ce, rel=1e-5) if world == case.sp else rank.ce == []
        assert rank.tower_calls == 3 * (2 // (world // case.sp)), "one call of the tower per micro-batch, on every rank"
    for step in range(3):
        found = full_grads(ranks, step, case.ep)
        assert found.keys() == expected.grads[step].keys()
        for key, grad in found.items():
            wanted = expected.grads[step][key]
            assert grad.shape == wanted.shape
            assert (grad - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (key, step)


def test_the_load_by_kind_and_the_load_by_source_add_up_to_the_load() -> None:
    for step, groups in enumerate(whole(2, 2, "sqrt", "global", 9).groups):
        counts = torch.tensor(whole(2, 2, "sqrt", "global", 9).counts[step])
        text, image, video, other, none, source = torch.tensor(groups)
        assert torch.equal(text + image + video + other, counts)
        assert torch.equal(none + source, counts)
        assert not none.any()
        samples = [sample(mix, length=9 + at) for pack in PACKS[step] for at, mix in enumerate(pack)]
        ids = torch.cat([torch.from_numpy(each.input_ids) for each in samples])
        for kind, tokens in ((image, (IMAGE,)), (video, (VIDEO,)), (other, (START, END))):
            assert kind.sum(1).tolist() == [2 * int(torch.isin(ids, torch.tensor(tokens)).sum())] * len(counts)


def group(size: int, rank: int = 0) -> SequenceGroup:
    return SequenceGroup(size=size, rank=rank, ranks=None)


def test_a_row_is_padded_until_it_divides_and_loses_nothing() -> None:
    batch, text = row("i", "v", length=10), row("", "")
    tokens = batch.input_ids.shape[1]
    for size in (1, 2, 3, 5, 7):
        longer = divisible(batch, group(size))
        assert longer.input_ids.shape[1] == -(-tokens // size) * size
        assert all(longer.sample_ids[0, tokens:] == -1)
        assert not longer.loss_weights[0, tokens:].any()
        assert int(longer.cu_seq_lens[-1]) == longer.input_ids.shape[1]
        assert torch.equal(longer.positions[..., :tokens], batch.positions)
        parts = [own_part(longer, group(size, rank)) for rank in range(size)]
        assert len({part.stop - part.start for part in parts}) == 1
        valid = torch.cat([lay_out(text, group(size, rank)).valid_T for rank in range(size)])
        assert torch.equal(valid[: text.input_ids.shape[1]], text.sample_ids[0] >= 0)
    assert divisible(batch, None) is batch


@given(
    grids=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([2, 4, 6]), st.sampled_from([2, 8])), max_size=6),
    size=st.integers(1, 5),
)
def test_frames_are_divided_in_order_and_evenly(grids: list[tuple[int, int, int]], size: int) -> None:
    runs = shares(grids, size)
    frames = [(h, w) for t, h, w in grids for _ in range(t)]
    assert [(h, w) for run in runs for t, h, w in run.grids for _ in range(t)] == frames
    total, largest = sum(h * w for h, w in frames), max((h * w for h, w in frames), default=0)
    assert [run.first for run in runs] == [0, *(run.last for run in runs[:-1])]
    assert all(run.last - run.first == sum(t * h * w for t, h, w in run.grids) for run in runs)
    assert all(run.last - run.first <= total / size + largest for run in runs)


def test_keys_are_repeated_only_if_slices_outnumber_them() -> None:
    copies = {(4, 2): 1, (4, 4): 1, (4, 8): 2, (2, 4): 2, (8, 12): 3, (1, 3): 3}
    assert {pair: key_copies(*pair) for pair in copies} == copies


def test_errors_of_sequence_parallelism() -> None:
    with pytest.raises(ValueError, match=r"parallel\.sp: 2 must divide the 1 ranks"):
        sequence_group(2)
    model = adapted_model()
    with pytest.raises(ValueError, match=r"parallel\.sp: 3 must divide the 4 attention heads"):
        use_sequence(model, [1, 3], "segments")
    use_sequence(model, [2], "segments")
    assert model.model.visual.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="called without the borders of its samples"):
        model.model(input_ids=torch.arange(8)[None])
    use_sequence(model, [2], "sdpa")
    with pytest.raises(ValueError, match="called without the borders of its samples"):
        model.model(input_ids=torch.arange(8)[None])
    with pytest.raises(ValueError, match="tile_tokens exchanges rows tile by tile, but moe.dispatch: deepep"):
        replace_moe_blocks(adapted_model(), ep_size=1, options=LayerOptions(tiles=2, dispatch="deepep"))


def test_each_attention_computes_the_same_over_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare their results with borders, in a group of one rank. A function replaces flash-attention's own kernel."""
    use_sequence(adapted_model(), [1], "segments")
    monkeypatch.setattr("finetune.model.sequence_attention.exchange", lambda x, *_: x)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=_by_hand))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 21, 8, generator=generator) for heads in (4, 2, 2))
    cuts = torch.tensor([0, 6, 7, 21], dtype=torch.int32)
    module = SimpleNamespace(is_causal=True)
    found = {
        name: ALL_ATTENTION_FUNCTIONS[NAMES[name]](
            module, query, key, value, None, sequence=group(1), scaling=0.3, cu_seq_lens_q=cuts, max_length_q=14
        )[0]
        for name in ("segments", "sdpa", "flash_attention_2")
    }
    for name, out in found.items():
        torch.testing.assert_close(out, found["segments"], rtol=1e-5, atol=1e-6, msg=name)


def _by_hand(q, k, v, cuts, _cuts, longest, _longest, *, dropout_p, softmax_scale, causal):  # type: ignore[no-untyped-def]
    """Softmax attention by its definition, with the arguments of flash-attention's function."""
    assert (dropout_p, causal, longest) == (0.0, True, 14)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = torch.empty_like(q)
    for first, last in zip(cuts.tolist(), cuts.tolist()[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[first:last], k[first:last]) * softmax_scale
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[first:last])
    return out


def _peaks(rank: int, world: int, setups: list[Setup]) -> list[RankResult]:
    return run_setups(setups)


@pytest.mark.slow
def test_peak_memory_grows_with_the_slice_only() -> None:
    """Count it tensor by tensor: it is linear in the row's length, and half as steep with twice the ranks."""
    lengths = (768, 1536, 3072)
    setups = [Setup(tokens=tokens, sp=sp) for sp in (2, 4) for tokens in lengths]
    ranks = run_ranks(_peaks, 4, setups)
    peaks = [max(rank[at].peak for rank in ranks) for at in range(len(setups))]
    slopes = {}
    for sp, mine in ((2, peaks[:3]), (4, peaks[3:])):
        first, second = ((b - a) / (n - m) for a, b, m, n in zip(mine, mine[1:], lengths, lengths[1:], strict=False))
        assert second == pytest.approx(first, rel=0.05), (sp, mine)
        slopes[sp] = second
    assert slopes[2] / slopes[4] == pytest.approx(2.0, rel=0.15)
