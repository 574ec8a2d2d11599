"""The stream: the same global steps for any ranks and workers, resume at any step, bad samples named and left out."""

import hashlib
import json
from collections import Counter

import pytest
import torch
from corpora import LIMITS, corpus_of, digest, renderer, sample_json, write_sample, write_shards

from data.format.tar import TarWriter
from data.stream.batch import DUMMY_TOKENS, LossSums
from data.stream.plan import PlanSettings
from data.stream.stream import DataStream, StreamSettings, TooManyBadSamples, WaitIsOver

PLAN = PlanSettings(seed=5, packs_per_step=5, tokens_per_pack=LIMITS.tokens, patches_per_pack=LIMITS.patches)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return corpus_of({"one": write_shards(folder / "one"), "two": write_shards(folder / "two", 40)})


def stream(corpus, rank=0, size=1, plan=PLAN, **options):
    return DataStream(corpus, renderer(), plan, StreamSettings(**options), data_rank=rank, data_size=size)


def read(corpus, size, *, workers=0, epochs=1, state=None):
    """Return {(epoch, step): md5 of the packs of all ranks}; check that all ranks take the same steps."""
    found, states = {}, []
    for rank in range(size):
        mine = stream(corpus, rank, size, workers=workers)
        if state:
            mine.load_state_dict(state)
        slots = {}
        for _ in range(epochs):
            for step in mine:
                place = (step.epoch, step.step)
                slots[place] = len(step.batches)
                found.setdefault(place, []).extend(digest(batch) for batch in step.batches if batch.keys)
            mine.next_epoch()
        states.append((slots, json.dumps(mine.state_dict())))
    assert all(other == states[0] for other in states)  # steps, slots and state are equal on all ranks
    return {place: hashlib.md5("".join(sorted(packs)).encode()).hexdigest() for place, packs in found.items()}


@pytest.fixture(scope="module")
def whole(corpus):
    """Two epochs, read by one rank without workers."""
    return read(corpus, 1, epochs=2)


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_global_steps_are_the_same_for_any_number_of_ranks(corpus, whole, size):
    assert read(corpus, size, epochs=2) == whole


@pytest.mark.parametrize(("size", "workers"), [(1, 1), (1, 2), (2, 2), (3, 1)])
def test_global_steps_are_the_same_for_any_number_of_workers(corpus, whole, size, workers):
    found = read(corpus, size, workers=workers)
    assert found == {place: packs for place, packs in whole.items() if place[0] == 0}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("workers", [1, 2])
def test_global_steps_are_the_same_for_every_layout(corpus, whole, size, workers):
    assert read(corpus, size, workers=workers, epochs=2) == whole


def test_every_sample_comes_once_per_epoch_except_the_counted_remainder(corpus):
    mine = stream(corpus, plan=PlanSettings(**{**vars(PLAN), "packs_per_step": 4}))
    for _ in range(2):
        keys = Counter(key for step in mine for batch in step.batches for key in batch.keys)
        assert set(keys.values()) == {1}
        assert len(keys) == 130 - mine.plan.dropped
        assert mine.plan.dropped < 30
        mine.next_epoch()


def test_epochs_differ_in_order(whole):
    first = [packs for (epoch, _), packs in whole.items() if epoch == 0]
    second = [packs for (epoch, _), packs in whole.items() if epoch == 1]
    assert len(first) >= 4
    assert not set(first) & set(second)


@pytest.mark.parametrize("size", [2, 6])
def test_resume_at_any_step_and_layout_continues_exactly(corpus, whole, size):
    mine = stream(corpus, size - 1, size)
    states = [mine.state_dict()]
    for step in mine:
        states.append(json.loads(json.dumps(mine.state_dict())))
        assert (states[-1]["epoch"], states[-1]["step"]) == (0, step.step + 1)
    for number, state in enumerate(states):
        after = (1, 3, 4, 8, 6, 2)[(number + size) % 6]
        tail = {place: packs for place, packs in whole.items() if place[0] == 0 and place[1] >= number}
        assert read(corpus, after, state=state) == tail
    assert not tail  # the last state is the end of the epoch


def test_resume_at_the_end_of_an_epoch_continues_with_the_next(corpus, whole):
    mine = stream(corpus)
    list(mine)
    mine.next_epoch()
    found = read(corpus, 3, state=mine.state_dict())
    assert found == {place: packs for place, packs in whole.items() if place[0] == 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_draws_nothing_from_the_random_state_of_dropout(corpus, workers):
    """A resume restores this state and then reads on: a draw in between would change dropout."""
    before = torch.get_rng_state()
    next(iter(stream(corpus, workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_state_is_small_and_independent_of_the_layout(corpus):
    one, other = stream(corpus), stream(corpus, 2, 3, workers=2)
    assert one.state_dict() == other.state_dict()
    assert len(json.dumps(one.state_dict())) < 400


def test_batches_contain_the_inputs_of_the_model(corpus):
    for step in stream(corpus, pad_multiple=16):
        sums = LossSums()
        for batch in step.batches:
            length = batch.input_ids.shape[1]
            assert length % 16 == 0
            assert length <= LIMITS.tokens + 15
            assert batch.positions.shape == (4, 1, length)
            cuts = batch.cu_seq_lens.tolist()
            assert cuts[0] == 0
            assert cuts[-1] == length
            assert batch.max_length == max(b - a for a, b in zip(cuts, cuts[1:], strict=False))
            for number, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
                owner = number if number < len(batch.keys) else -1
                assert batch.sample_ids[0, a:b].unique().tolist() == [owner]
                assert batch.positions[0, 0, a:b].tolist() == list(range(b - a))
                assert batch.loss_weights[0, a] == 0
                weight = batch.loss_weights[0, a:b].double().sum().item()
                assert (weight > 0) == (owner >= 0)
                sums += LossSums(tokens=weight, samples=float(weight > 0), sqrt=weight**0.5)
            assert batch.image_patches.dtype == batch.video_patches.dtype == torch.uint8
            assert len(batch.image_patches) == batch.image_grids.prod(1).sum()
            assert len(batch.video_patches) == batch.video_grids.prod(1).sum()
            assert set(batch.attention) == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
        assert vars(step.sums) == pytest.approx(vars(sums))
        assert step.tokens == sum(int((batch.sample_ids >= 0).sum()) for batch in step.batches)
        assert step.images == sum(len(batch.image_grids) for batch in step.batches)
        assert step.video_seconds == pytest.approx(2.0 * sum(len(batch.video_grids) for batch in step.batches))
        assert step.wait_seconds > 0


def test_ranks_without_a_pack_get_a_dummy_of_zero_weight(corpus):
    shares = [next(iter(stream(corpus, rank, 7))) for rank in range(7)]  # 5 packs for 7 ranks
    dummies = [step for step in shares if not step.batches[0].keys]
    assert len(dummies) == 2
    for step in dummies:
        (batch,) = step.batches
        assert batch.input_ids.shape == (1, DUMMY_TOKENS)
        assert batch.loss_weights.abs().sum() == 0
        assert vars(step.sums) == {"tokens": 0, "samples": 0, "sqrt": 0}
        assert batch.image_patches.shape == (0, 768)
        assert batch.video_patches.shape == (0, 1536)


def damaged(folder):
    """A corpus with three samples that fail only in decoding, because the headers of their images are intact."""

    def make(number):
        return sample_json(number)

    path = write_shards(folder, 40, per_shard=40, make=make)[0]
    with TarWriter(path) as tar:
        for number in range(40):
            if number in (1, 7, 8):
                raw = sample_json(number) | {"images": [], "videos": []}
                content = raw["messages"][0]["content"]
                names = ["9.jpg", "8.jpg"][: content.count("<image>")]
                tar.add(f"{number:05d}.json", json.dumps(raw | {"images": names}).encode())
                for name in names:
                    tar.add(f"{number:05d}.{name}", broken_jpeg())
            else:
                write_sample(tar, f"{number:05d}", sample_json(number))
    return corpus_of({"one": [path]})


def broken_jpeg():
    from corpora import media

    data = media()["1.jpg"]
    return data[: len(data) // 2]


def test_bad_samples_shrink_their_packs_and_are_left_out_from_the_next_epoch(tmp_path):
    corpus = damaged(tmp_path)
    assert not corpus.unusable
    plan = PlanSettings(**{**vars(PLAN), "packs_per_step": 2, "remainder": "keep"})
    ranks = [stream(corpus, rank, 2, plan=plan) for rank in range(2)]
    seen, bad = Counter(), []
    for steps in zip(*ranks, strict=True):  # ranks take steps together
        assert len({len(step.batches) for step in steps}) == 1
        seen += Counter(key for step in steps for batch in step.batches for key in batch.keys)
        found = [item for step in steps for item in step.bad]
        for rank in ranks:
            rank.quarantine(found)
        bad += found
    assert sorted(item.key for item in bad) == ["00001", "00007", "00008"]
    assert str(bad[0]).startswith(f"source one, shard part-000.tar, sample {bad[0].key}: image 1 (9.jpg)")
    assert len(seen) == 37
    assert ranks[0].state_dict() == ranks[1].state_dict()
    fresh = stream(corpus, plan=plan)
    fresh.load_state_dict(json.loads(json.dumps(ranks[0].state_dict())))
    for each in (*ranks, fresh):
        each.next_epoch()
        assert sorted(each.plan.packs.members.tolist()) == [n for n in range(40) if n not in (1, 7, 8)]
    keys = [key for step in fresh for batch in step.batches for key in batch.keys]
    assert len(set(keys)) == len(keys) == 37


def test_quarantine_does_not_affect_the_current_epoch(tmp_path):
    corpus = damaged(tmp_path)
    plan = PlanSettings(**{**vars(PLAN), "packs_per_step": 2, "remainder": "keep"})
    mine = stream(corpus, plan=plan)
    before = mine.plan.packs.members.tolist()
    mine.quarantine([item for step in mine for item in step.bad])
    mine._plan = None  # planned again, as after a resume
    assert mine.plan.packs.members.tolist() == before


def test_too_many_bad_samples_stop_the_run_on_every_rank(tmp_path):
    mine = stream(damaged(tmp_path), max_bad_samples=2, plan=PlanSettings(**{**vars(PLAN), "packs_per_step": 1}))
    bad = [item for step in mine for item in step.bad]
    mine.quarantine(bad[:2])
    mine.quarantine(bad[:1])  # reported twice, counted once
    with pytest.raises(
        TooManyBadSamples, match="3 samples could not be read, but data.max_bad_samples is 2: source one, shard"
    ):
        mine.quarantine(bad)


def test_a_file_that_changed_under_the_plan_is_a_bad_sample(tmp_path):
    (path,) = write_shards(tmp_path, 20, per_shard=20)
    corpus = corpus_of({"one": [path]})
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # in the first sample's record
    path.write_bytes(data)
    mine = stream(corpus, plan=PlanSettings(**{**vars(PLAN), "packs_per_step": 1, "remainder": "keep"}), workers=1)
    bad = [item for step in mine for item in step.bad]
    assert len(bad) == 20 or [item.key for item in bad] == ["00000"]


def test_a_missing_shard_gives_bad_samples_not_a_failed_rank(tmp_path):
    paths = write_shards(tmp_path, 20, per_shard=10)
    corpus = corpus_of({"one": paths})
    paths[0].unlink()
    mine = stream(corpus, plan=PlanSettings(**{**vars(PLAN), "packs_per_step": 1, "remainder": "keep"}))
    steps = list(mine)
    bad = [item for step in steps for item in step.bad]
    assert len(bad) == 10
    assert all("part-000.tar" in str(item) and "does not exist" in str(item) for item in bad)
    assert sum(len(batch.keys) for step in steps for batch in step.batches) == 10


def test_a_changed_corpus_or_plan_is_refused_unless_allowed(corpus, tmp_path):
    state = stream(corpus).state_dict()
    other = PlanSettings(**{**vars(PLAN), "seed": 6, "packs_per_step": 4})
    with pytest.raises(ValueError, match="not that of the checkpoint: packing and mixture, run.seed changed"):
        stream(corpus, plan=other).load_state_dict(state)
    smaller = corpus_of({"one": write_shards(tmp_path, 60)})
    mine = stream(smaller)
    with pytest.raises(ValueError, match="not that of the checkpoint: data changed"):
        mine.load_state_dict(state)
    assert mine.load_state_dict({**state, "step": 1}, changed=True) == ["data"]
    assert mine.step == 1
    with pytest.raises(ValueError, match="the data state has version 0; this moetune reads 1"):
        mine.load_state_dict({**state, "version": 0})
    assert stream(corpus, plan=PLAN).load_state_dict(state) == []


def test_a_stalled_worker_is_named(corpus, monkeypatch):
    import time

    from data.shards.reader import SampleReader

    monkeypatch.setattr(SampleReader, "sample", lambda *_: time.sleep(5))
    mine = stream(corpus, workers=1, stall_seconds=3)  # the worker must start within this time
    with pytest.raises(TimeoutError, match=r"data stall on data rank 0: no pack for step 0 of epoch 0 .*part-00"):
        next(iter(mine))
    mine.is_over = lambda: True
    with pytest.raises(WaitIsOver, match="step 0"):
        next(iter(mine))
