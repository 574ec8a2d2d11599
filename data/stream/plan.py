"""Plans the packs of every step: a pure function of the corpus, seed, epoch and quarantine. No torch.

A unit is a sample, or a part that `overlong: split-turns` cut from one. Each source is ordered by itself; the sources
are then merged by their shares and packed, and packs of similar cost form a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from data.config import DataConfig
from data.format.printable import count_of
from data.stream.pack import Ints, Packs, best_fit, deal, group_steps

PATCHES_PER_TOKEN = 4
"""Patches behind one token of an image or a video: 2 x 2 in every model of the family."""
_SHARD_WINDOW = 8  # shards whose samples are mixed: few, so that reads stay close together


@dataclass(frozen=True, kw_only=True)
class Units:
    """One row for each unit of one source, in order of shard and sample."""

    name: str
    shard: Ints  # number in the corpus's table of shards
    sample: Ints  # number in the shard
    part: Ints  # first and last message of a part as first * 2**31 + last + 1; 0 for an entire sample
    tokens: Ints
    patches: Ints

    def __len__(self) -> int:
        """Number of units."""
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Modelled cost of a pack in units of one token's dense work. Defaults: 3.3 G active parameters, 48 layers."""

    squared: float = 6e-5  # attention, for each squared token of a sample
    patch: float = 0.16  # the vision tower, for each patch


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings of a plan. All quantities are global: none depends on the number of ranks."""

    seed: int
    packs_per_step: int
    tokens_per_pack: int
    patches_per_pack: int
    mixture: Literal["natural", "tokens", "samples"] = "natural"
    weights: tuple[float, ...] = ()  # one for each source; unused when natural
    budgets: tuple[int | None, ...] = ()  # tokens of each source in an epoch; empty: none has a budget
    balance_steps: int = 32
    remainder: Literal["drop", "keep"] = "drop"
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The packs of one epoch in order of use, and the steps that they form. Units are numbered through all sources."""

    epoch: int
    packs: Packs
    costs: np.ndarray[Any, np.dtype[np.float64]]
    packs_per_step: int
    steps: int
    tokens: int  # in all packs used
    dropped: int  # units left over by the last, incomplete step
    fill: float

    def step_packs(self, step: int) -> range:
        """Return the packs of one global step."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside epoch {self.epoch}, which has steps 0 to {self.steps - 1}")
        first = step * self.packs_per_step
        return range(first, min(first + self.packs_per_step, len(self.packs)))

    def share(self, step: int, data_rank: int, data_size: int) -> list[int | None]:
        """Return the packs of one rank in one step. Every rank has the same number of slots; None means a dummy."""
        numbers = self.step_packs(step)
        shares = deal(self.costs[numbers.start : numbers.stop], data_size)
        packs: list[int | None] = [numbers[index] for index in shares[data_rank]]
        return packs + [None] * (-(-len(numbers) // data_size) - len(packs))

    def units(self, pack: int) -> list[int]:
        """Return the units of one pack, in the order of its row."""
        units: list[int] = self.packs.members[self.packs.starts[pack] : self.packs.starts[pack + 1]].tolist()
        return units


def plan_settings(config: DataConfig, *, seed: int) -> PlanSettings:
    """Return the settings of a run's plan."""
    vision = config.vision_tokens_per_pack or config.tokens_per_pack
    budgets = tuple(source.max_tokens for source in config.sources.values())
    return PlanSettings(
        seed=seed,
        packs_per_step=config.packs_per_step,
        tokens_per_pack=config.tokens_per_pack,
        patches_per_pack=vision * PATCHES_PER_TOKEN,
        mixture=config.mixture,
        weights=tuple(source.weight for source in config.sources.values()),
        budgets=budgets if any(budgets) else (),
        balance_steps=config.balance_steps,
        remainder=config.remainder,
    )


def rng_for(*key: object) -> np.random.Generator:
    """Return a generator seeded by its purpose, never by global state."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(blake2b(repr(key).encode(), digest_size=16).digest())))


def order_units(units: Units, seed: int, turn: int) -> Ints:
    """Order the units of a source's own epoch `turn`: permute the shards, mix samples inside windows of shards."""
    rng = rng_for("order", units.name, seed, turn)
    numbers, where = np.unique(units.shard, return_inverse=True)
    window = rng.permutation(len(numbers)) // _SHARD_WINDOW
    order: Ints = np.argsort(window[where] + rng.random(len(units)), kind="stable")
    return order


def draw(units: Units, amounts: Ints, quota: int, seed: int, epoch: int) -> Ints:
    """Draw the units of one epoch from the source's own epochs, one after another; each of them has every unit once."""
    total = int(amounts.sum())
    start, stop = epoch * quota, (epoch + 1) * quota
    drawn = []
    for turn in range(start // total, -(-stop // total)):
        order = order_units(units, seed, turn)
        begins = turn * total + np.concatenate([[0], np.cumsum(amounts[order])[:-1]])
        drawn.append(order[(begins >= start) & (begins < stop)])
    return np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)


def merge_sources(sources: Sequence[Units], settings: PlanSettings, epoch: int) -> list[Ints]:
    """Return the units that each source gives to the epoch, in order."""
    budgets = settings.budgets or (None,) * len(sources)
    if settings.mixture == "natural":
        return [_within(units, budget, settings.seed, epoch) for units, budget in zip(sources, budgets, strict=True)]
    by_tokens = settings.mixture == "tokens"
    amounts = [units.tokens if by_tokens else np.ones(len(units), dtype=np.int64) for units in sources]
    total = sum(int(amount.sum()) for amount in amounts)
    share = np.array(settings.weights) / sum(settings.weights)
    quotas = [max(1, round(total * part)) for part in share.tolist()]
    if by_tokens:
        quotas = [min(quota, budget or quota) for quota, budget in zip(quotas, budgets, strict=True)]
    pairs = zip(sources, amounts, quotas, strict=True)
    return [draw(units, amount, quota, settings.seed, epoch) for units, amount, quota in pairs]


def _within(units: Units, budget: int | None, seed: int, epoch: int) -> Ints:
    """Return all units of a source, or as many as its budget allows, going on where the last epoch ended."""
    if budget is None or units.tokens.sum() <= budget:
        return order_units(units, seed, epoch)
    return draw(units, units.tokens, budget, seed, epoch)


def make_plan(sources: Sequence[Units], settings: PlanSettings, *, epoch: int, quarantine: Ints | None = None) -> Plan:
    """Plan one epoch. `quarantine` lists units (numbered through all sources) that are left out."""
    base = np.concatenate([[0], np.cumsum([len(units) for units in sources])])
    drawn = merge_sources(sources, settings, epoch)
    # spread every source evenly over the epoch; ties keep the order of sources
    places = np.concatenate([(np.arange(len(rows)) + 0.5) / max(1, len(rows)) for rows in drawn])
    rows = np.concatenate([part + base[number] for number, part in enumerate(drawn)])
    rows = rows[np.argsort(places, kind="stable")]
    if quarantine is not None and len(quarantine):
        allowed = np.ones(int(base[-1]), dtype=bool)
        allowed[quarantine] = False
        rows = rows[allowed[rows]]
    tokens = np.concatenate([units.tokens for units in sources])[rows]
    patches = np.concatenate([units.patches for units in sources])[rows]
    packs = best_fit(tokens, patches, token_budget=settings.tokens_per_pack, patch_budget=settings.patches_per_pack)
    return _arrange(packs, rows, tokens, patches, settings, epoch)


def steps_of_epochs(plan: Callable[[int], Plan], epochs: float) -> int:
    """Return the number of steps in this many epochs from the first one on; part of an epoch counts in proportion.

    Every epoch has another order of samples, so the numbers of packs may differ by a few.
    """
    whole = int(epochs)
    steps = sum(plan(epoch).steps for epoch in range(whole))
    part = epochs - whole
    return max(1, steps + (round(part * plan(whole).steps) if part else 0))


def _arrange(packs: Packs, rows: Ints, tokens: Ints, patches: Ints, settings: PlanSettings, epoch: int) -> Plan:
    per_step = settings.packs_per_step
    steps = len(packs) // per_step if settings.remainder == "drop" else -(-len(packs) // per_step)
    if steps == 0:
        raise ValueError(
            f"data.packs_per_step={per_step}, but epoch {epoch} fills only {count_of(len(packs), 'pack')} of "
            f"{settings.tokens_per_pack} tokens; lower data.packs_per_step or data.tokens_per_pack, add data, or set "
            "data.remainder=keep"
        )
    sums = packs.sums(tokens)
    costs = sums + settings.cost.squared * packs.sums(tokens * tokens) + settings.cost.patch * packs.sums(patches)
    order = group_steps(costs, per_step, window=settings.balance_steps, rng=rng_for("steps", settings.seed, epoch))
    order = order[: steps * per_step]
    used = packs.take(order)
    return Plan(
        epoch=epoch,
        packs=Packs(members=rows[used.members], starts=used.starts),
        costs=costs[order],
        packs_per_step=per_step,
        steps=steps,
        tokens=int(sums[order].sum()),
        dropped=len(rows) - len(used.members),
        fill=float(sums[order].sum()) / (len(order) * settings.tokens_per_pack),
    )
