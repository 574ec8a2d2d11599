"""What every rank reads at every step: a pure function of the corpus, seed, epoch and quarantine. No torch, no ranks.

A unit is a sample, or the part of one that `overlong: split-turns` cut out. Sources are ordered each for itself, merged
at their shares, packed, and packs of similar cost are put into one step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from data.config import DataConfig
from data.stream.pack import Ints, Packs, best_fit, deal, group_steps

PATCHES_PER_TOKEN = 4
"""A token of an image or a video is merge x merge patches, 2 x 2 in every model of the family."""
_SHARD_WINDOW = 8  # shards whose samples are mixed: reads stay near each other


@dataclass(frozen=True, kw_only=True)
class Units:
    """One row for each unit of one source, in order of shard and sample."""

    name: str
    shard: Ints  # number in the corpus's table of shards
    sample: Ints  # number in the shard
    part: Ints  # first and last message of a part as first * 2**31 + last + 1; 0 for a whole sample
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
    """What shapes a plan. All quantities are global: none changes with the number of ranks."""

    seed: int
    packs_per_step: int
    tokens_per_pack: int
    patches_per_pack: int
    mixture: Literal["natural", "tokens", "samples"] = "natural"
    weights: tuple[float, ...] = ()  # one for each source; unused when natural
    balance_steps: int = 32
    remainder: Literal["drop", "keep"] = "drop"
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One epoch: packs in order of use, and which of them each step takes. Unit numbers count through all sources."""

    epoch: int
    packs: Packs
    costs: np.ndarray[Any, np.dtype[np.float64]]
    packs_per_step: int
    steps: int
    tokens: int  # of all packs used
    dropped: int  # units left over by the last, incomplete step
    fill: float

    def step_packs(self, step: int) -> range:
        """Packs of one global step."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside of epoch {self.epoch}, which has steps 0 to {self.steps - 1}")
        first = step * self.packs_per_step
        return range(first, min(first + self.packs_per_step, len(self.packs)))

    def share(self, step: int, data_rank: int, data_size: int) -> list[int | None]:
        """Packs of one rank in one step, as many slots on every rank; None is a slot for a dummy."""
        numbers = self.step_packs(step)
        shares = deal(self.costs[numbers.start : numbers.stop], data_size)
        packs: list[int | None] = [numbers[index] for index in shares[data_rank]]
        return packs + [None] * (-(-len(numbers) // data_size) - len(packs))

    def units(self, pack: int) -> list[int]:
        """Units of one pack, in the order they lie in its row."""
        units: list[int] = self.packs.members[self.packs.starts[pack] : self.packs.starts[pack + 1]].tolist()
        return units


def plan_settings(config: DataConfig, *, seed: int) -> PlanSettings:
    """What shapes the plan of a run."""
    vision = config.vision_tokens_per_pack or config.tokens_per_pack
    return PlanSettings(
        seed=seed,
        packs_per_step=config.packs_per_step,
        tokens_per_pack=config.tokens_per_pack,
        patches_per_pack=vision * PATCHES_PER_TOKEN,
        mixture=config.mixture,
        weights=tuple(source.weight for source in config.sources.values()),
        balance_steps=config.balance_steps,
        remainder=config.remainder,
    )


def rng_for(*key: object) -> np.random.Generator:
    """A generator made from what it is for, never from global state."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(blake2b(repr(key).encode(), digest_size=16).digest())))


def order_units(units: Units, seed: int, turn: int) -> Ints:
    """Order of a source's units in its own `turn`-th epoch: shards permuted, samples mixed inside windows of shards."""
    rng = rng_for("order", units.name, seed, turn)
    numbers, where = np.unique(units.shard, return_inverse=True)
    window = rng.permutation(len(numbers)) // _SHARD_WINDOW
    order: Ints = np.argsort(window[where] + rng.random(len(units)), kind="stable")
    return order


def draw(units: Units, amounts: Ints, quota: int, seed: int, epoch: int) -> Ints:
    """The next `quota` of an endless row of the source's own epochs, each of which holds every unit once."""
    whole = int(amounts.sum())
    start, stop = epoch * quota, (epoch + 1) * quota
    drawn = []
    for turn in range(start // whole, -(-stop // whole)):
        order = order_units(units, seed, turn)
        begins = turn * whole + np.concatenate([[0], np.cumsum(amounts[order])[:-1]])
        drawn.append(order[(begins >= start) & (begins < stop)])
    return np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)


def merge_sources(sources: Sequence[Units], settings: PlanSettings, epoch: int) -> list[Ints]:
    """Each source's units of the epoch, in its order."""
    if settings.mixture == "natural":
        return [order_units(units, settings.seed, epoch) for units in sources]
    by_tokens = settings.mixture == "tokens"
    amounts = [units.tokens if by_tokens else np.ones(len(units), dtype=np.int64) for units in sources]
    total = sum(int(amount.sum()) for amount in amounts)
    share = np.array(settings.weights) / sum(settings.weights)
    quotas = [max(1, round(total * part)) for part in share.tolist()]
    pairs = zip(sources, amounts, quotas, strict=True)
    return [draw(units, amount, quota, settings.seed, epoch) for units, amount, quota in pairs]


def make_plan(sources: Sequence[Units], settings: PlanSettings, *, epoch: int, quarantine: Ints | None = None) -> Plan:
    """The plan of one epoch. `quarantine` lists units (numbered through all sources) that are left out."""
    base = np.concatenate([[0], np.cumsum([len(units) for units in sources])])
    drawn = merge_sources(sources, settings, epoch)
    # every source spread evenly over the epoch; ties keep the order of sources
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
    """Return the steps of so many epochs, counted from the first: all of the whole ones, and a share of the last.

    Every epoch orders its samples anew, so their numbers of packs may differ by a few.
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
            f"data.packs_per_step={per_step} but epoch {epoch} fills only {len(packs)} packs of "
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
