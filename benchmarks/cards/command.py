"""`python -m benchmarks cards`: train the cards that are not recorded yet, and write results/cards.json. See --help."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.cards.record import PARTS, RESULTS, Numbers, keep_numbers, read_numbers

SEEDS = (0, 1, 2)
MINUTES = 45
SECONDS = {"base": 240.0, "card": 75.0}
"""Time of a base and of a card on one free core, with shards and scores."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training that is not recorded yet."""

    kind: str
    name: str
    run: Callable[[Numbers], Numbers]


def main(argv: Sequence[str]) -> int:
    """Train what is missing, seed by seed, until the time is over."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # the numbers are of a CPU, wherever they are made
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cards",
        description="Train tiny models on six tasks, with LoRA on attention, on experts and on both. What is recorded "
        "is not trained again, so an interrupted command continues when it is called again.",
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"start nothing after this (default {MINUTES})")
    parser.add_argument("--all", action="store_true", help="train everything, however long it takes")
    parser.add_argument("--work", type=Path, default=Path("runs/cards"), metavar="DIR", help="folder of the trainings")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where the numbers are kept")
    args = parser.parse_args(argv)
    numbers = read_numbers(args.results)
    jobs = list(missing(numbers, args.work))
    seconds = sum(SECONDS[job.kind] for job in jobs)
    limit = "" if args.all else f"; stops after {args.minutes:g} minutes, call again to continue"
    print(f"{len(jobs)} trainings are missing, about {seconds / 60:.0f} minutes on one free core{limit}", flush=True)
    began = time.monotonic()
    for job in jobs:
        if not args.all and time.monotonic() - began > 60 * args.minutes:
            break
        print(f"{job.name}: from minute {(time.monotonic() - began) / 60:.1f}", flush=True)
        numbers = job.run(numbers)
        keep_numbers(numbers, args.results)
    print(f"recorded: {len(numbers.cards)} cards, {len(numbers.bases)} bases, in {args.results}")
    return 0


def missing(numbers: Numbers, work: Path) -> Iterator[Job]:
    """Yield the trainings that are not recorded: all of one seed, then of the next, and at last the switches."""
    from benchmarks.cards.course import SWITCHES, Held, train_base, train_card
    from benchmarks.cards.tasks import KEPT, TASKS, Task

    known = {(card.task, card.parts, card.seed) for card in numbers.cards}
    bases = {(base.switch, base.seed): base for base in numbers.bases}
    plain, *switched = SWITCHES

    def base(switch: str, seed: int) -> Job:
        folder = work / f"{switch.replace(': ', '-').replace(' ', '-')}-{seed}"

        def run(numbers: Numbers) -> Numbers:
            trained, _ = train_base(switch, seed=seed, folder=folder)
            others = [one for one in numbers.bases if (one.switch, one.seed) != (switch, seed)]
            return replace(numbers, bases=[*others, trained])

        return Job(kind="base", name=f"base, {switch}, seed {seed}", run=run)

    def card(task: Task, parts: str, seed: int) -> Job:
        folder = work / f"{plain.replace(' ', '-')}-{seed}"

        def run(numbers: Numbers) -> Numbers:
            (own,) = (one for one in numbers.bases if (one.switch, one.seed) == (plain, seed))
            held = Held(model=folder / "runs" / "base" / "model", kept=own.scores[KEPT.__name__])
            return replace(numbers, cards=[*numbers.cards, train_card(task, parts, held, seed=seed, folder=folder)])

        return Job(kind="card", name=f"{task.name}, LoRA on {parts}, seed {seed}", run=run)

    for seed in SEEDS:
        cards = [(task, parts) for task in TASKS for parts in PARTS if (task.name, parts, seed) not in known]
        is_there = (work / f"{plain.replace(' ', '-')}-{seed}" / "runs" / "base" / "model").is_dir()
        if (plain, seed) not in bases or (cards and not is_there):
            yield base(plain, seed)
        yield from (card(task, parts, seed) for task, parts in cards)
    yield from (base(switch, seed) for seed in SEEDS for switch in switched if (switch, seed) not in bases)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
