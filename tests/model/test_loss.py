"""The loss against torch's own cross entropy on full logits: values, gradients, every way of splitting a step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn

from benchmarks.harness.memory import Allocations
from data.stream.batch import Batch, LossSums, loss_sums
from finetune.model.loss import Losses, TiledHead, factors, normaliser, row_losses, step_loss, step_sums, tile_head
from finetune.model.row import lay_out

VOCAB, HIDDEN = 61, 14
HOW = ("token", "sample", "sqrt")


class Headed(nn.Module):
    """A model that consists of an embedding and a head."""

    def __init__(self, *, dtype=torch.float32, tied=False, frozen=False, bias=False):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embed = nn.Embedding(VOCAB, HIDDEN, dtype=dtype)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=dtype)
        with torch.no_grad():
            self.embed.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator))
            self.lm_head.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator))
        if tied:
            self.lm_head.weight = self.embed.weight
        self.lm_head.weight.requires_grad_(tied or not frozen)


def sample(number, length, supervised):
    """Return tokens and label weights; the first token is never a label, and some weights are not 1."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, VOCAB, (length,), generator=generator)
    weights = torch.zeros(length)
    weights[length - supervised :] = 1.0
    if number % 3 == 0:
        weights *= 0.5
    return ids, weights


def row(samples, padding=2):
    """Return a packed row of samples with padding at its end, filled as far as the loss reads it."""
    lengths = [len(ids) for ids, _ in samples] + [padding]
    empty = torch.zeros(0, 3, dtype=torch.uint8)
    owners = torch.tensor([*range(len(samples)), -1]).repeat_interleave(torch.tensor(lengths))
    return Batch(
        input_ids=torch.cat([*(ids for ids, _ in samples), torch.zeros(padding, dtype=torch.long)])[None],
        loss_weights=torch.cat([*(weights for _, weights in samples), torch.zeros(padding)])[None],
        positions=torch.zeros(4, 1, sum(lengths), dtype=torch.long),
        sample_ids=owners.int()[None],
        cu_seq_lens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        max_length=max(lengths),
        image_patches=empty,
        image_grids=empty.long(),
        video_patches=empty,
        video_grids=empty.long(),
        keys=tuple(f"s/{number}" for number in range(len(samples))),
    )


def reference(model, samples, how):
    """Return the objective of a step by its definition, on full logits in float64, sample by sample."""
    total, divisor = torch.zeros((), dtype=torch.float64), 0.0
    for ids, weights in samples:
        n = float(weights.double().sum())
        if not n:
            continue
        logits = nn.functional.linear(model.embed(ids).double(), model.lm_head.weight.double())
        ce = nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        mean = (ce * weights[1:].double()).sum() / n
        share = {"token": n, "sample": 1.0, "sqrt": n**0.5}[how]
        total, divisor = total + share * mean, divisor + share
    return total / divisor


def step(model, rows, how):
    """Run one step over rows like ranks and micro-batches do: sums first, then each row's share of the objective."""
    sums = LossSums()
    for batch in rows:
        sums += loss_sums(batch)
    total = normaliser(sums, how)
    losses = [row_losses(model.lm_head, model.embed(batch.input_ids[0]), lay_out(batch), how) for batch in rows]
    for each in losses:
        (each.objective / total).backward()
    loss, by_sample = step_loss([Losses(*(part.detach() for part in each)) for each in losses], total)
    assert by_sample == pytest.approx([float(ce) for each in losses for ce in each.ce_S])
    return losses, loss


SAMPLES = [sample(n, length, s) for n, (length, s) in enumerate([(9, 3), (5, 4), (12, 1), (7, 0), (20, 19), (6, 2)])]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", ["trained", "frozen", "tied"])
def test_loss_and_gradients_match_full_logits(how, case):
    build = {"trained": {}, "frozen": {"frozen": True}, "tied": {"tied": True}}[case]
    ours, plain = Headed(**build), Headed(**build)
    tile_head(ours, tile_bytes=VOCAB * 4 * 3)  # tiles of three tokens: several, and the last one is not full
    _, loss = step(ours, [row(SAMPLES)], how)
    expected = reference(plain, SAMPLES, how)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(ours.embed.weight.grad, plain.embed.weight.grad, rtol=1e-5, atol=1e-7)
    if case == "frozen":
        assert ours.lm_head.weight.grad is None
    else:
        torch.testing.assert_close(ours.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=1e-5, atol=1e-7)


def test_bfloat16_is_as_exact_as_its_products_allow():
    ours = Headed(dtype=torch.bfloat16)
    tile_head(ours, tile_bytes=VOCAB * 4 * 3)
    losses, loss = step(ours, [row(SAMPLES)], "token")
    exact = Headed(dtype=torch.bfloat16).float()
    expected = reference(exact, SAMPLES, "token")
    expected.backward()
    assert losses[0].objective.dtype == losses[0].ce_S.dtype == torch.float32
    assert loss == pytest.approx(float(expected.detach()), rel=2e-3)
    for got, want in ((ours.embed, exact.embed), (ours.lm_head, exact.lm_head)):
        assert got.weight.grad.dtype == torch.bfloat16
        assert (got.weight.grad.float() - want.weight.grad).abs().max() < 1e-2 * want.weight.grad.abs().max()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), how=st.sampled_from(HOW))
def test_a_step_does_not_depend_on_how_samples_are_split_over_rows(data, how):
    order = data.draw(st.permutations(range(len(SAMPLES))))
    cuts = data.draw(st.sets(st.integers(1, len(SAMPLES) - 1)))
    borders = [0, *sorted(cuts), len(SAMPLES)]
    split = [[SAMPLES[i] for i in order[a:b]] for a, b in zip(borders, borders[1:], strict=False)]
    dummies = [[]] * data.draw(st.integers(0, 1))  # a rank without a pack
    together, apart = Headed(), Headed()
    for model in (together, apart):
        tile_head(model, tile_bytes=VOCAB * 4 * data.draw(st.integers(1, 8)))
    _, one = step(together, [row(SAMPLES)], how)
    _, many = step(apart, [row(part) for part in [*split, *dummies]], how)
    assert many == pytest.approx(one, rel=1e-6)
    assert one == pytest.approx(float(reference(Headed(), SAMPLES, how).detach()), rel=1e-6)
    for name, parameter in together.named_parameters():
        other = dict(apart.named_parameters())[name]
        assert (parameter.grad - other.grad).abs().max() <= 1e-6 * parameter.grad.abs().max()


def test_the_sums_of_each_sample_are_returned():
    model = Headed()
    tile_head(model)
    losses, _ = step(model, [row(SAMPLES)], "sqrt")
    assert losses[0].weights_S.tolist() == [float(w.sum()) for _, w in SAMPLES]
    for number, one in enumerate(SAMPLES):
        if losses[0].weights_S[number]:
            mean = float((losses[0].ce_S / losses[0].weights_S)[number])
            assert mean == pytest.approx(float(reference(Headed(), [one], "token").detach()), rel=1e-5)
        else:
            assert losses[0].ce_S[number] == 0


def test_a_row_without_supervised_tokens_still_gives_every_gradient():
    for samples in ([], [SAMPLES[3]]):
        model = Headed()
        tile_head(model)
        losses = row_losses(model.lm_head, model.embed(row(samples).input_ids[0]), lay_out(row(samples)), "token")
        losses.objective.backward()
        assert losses.objective == 0
        assert len(losses.ce_S) == len(samples)
        assert [float(p.grad.abs().max()) for p in model.parameters()] == [0.0, 0.0]


def test_the_head_is_called_once_and_keeps_one_gradient_per_token():
    model = Headed(frozen=True)
    tile_head(model, tile_bytes=VOCAB * 4 * 2)
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    hidden = torch.randn(400, HIDDEN, requires_grad=True)
    ids = torch.arange(400) % VOCAB
    weights = torch.zeros(400)
    weights[100:300] = 1
    batch = row([(ids, weights)], padding=0)
    with Allocations() as made:
        losses = row_losses(model.lm_head, hidden, lay_out(batch), "token")
    assert calls == [1]
    assert made.largest_bytes <= 200 * HIDDEN * 4  # the states of the supervised tokens; their logits take 48,800
    losses.objective.backward()
    assert (hidden.grad.abs().sum(1) > 0).nonzero()[:, 0].tolist() == list(range(99, 299))


def test_evaluation_computes_no_gradient_and_the_head_still_returns_logits():
    model = Headed()
    plain = model.lm_head(torch.ones(2, HIDDEN))
    tile_head(model)
    tile_head(model)  # a second call changes nothing
    assert type(model.lm_head) is TiledHead
    assert torch.equal(model.lm_head(torch.ones(2, HIDDEN)), plain)
    with torch.no_grad():
        losses = row_losses(model.lm_head, model.embed(row(SAMPLES).input_ids[0]), lay_out(row(SAMPLES)), "token")
    assert not losses.objective.requires_grad
    assert float(losses.objective / losses.weights_S.sum()) == pytest.approx(
        float(reference(Headed(), SAMPLES, "token").detach()), rel=1e-6
    )


def test_errors_of_the_loss():
    with pytest.raises(ValueError, match=r"loss\.normalise must be one of token, sample, sqrt, got 'mean'"):
        normaliser(LossSums(tokens=1), "mean")
    with pytest.raises(ValueError, match=r"loss\.normalise must be one of token, sample, sqrt, got 'mean'"):
        factors(torch.ones(2), torch.zeros(2, dtype=torch.int32), 1, "mean")
    with pytest.raises(ValueError, match="head is a Linear with a bias, but the tiled loss needs"):
        tile_head(Headed(bias=True))
    model = Headed()
    model.lm_head = nn.Identity()
    with pytest.raises(ValueError, match="head is a Identity, but the tiled loss needs a linear layer"):
        tile_head(model)


def _sums(rank, world_size):
    mine = LossSums(tokens=10.0 * (rank + 1), samples=rank, sqrt=0.5)
    rows = [Losses(torch.tensor(2.0), torch.tensor([1.0, 3.0]), torch.ones(2))]
    rows += [Losses(torch.tensor(float(rank)), torch.tensor([]), torch.tensor([]))]
    return step_sums(mine, torch.device("cpu")), step_loss(rows, 4.0)


def test_the_sums_of_a_step_cover_all_ranks():
    for sums, losses in run_ranks(_sums, 2):
        assert sums == LossSums(tokens=30.0, samples=1.0, sqrt=1.0)
        assert losses == (1.25, [1.0, 3.0])
