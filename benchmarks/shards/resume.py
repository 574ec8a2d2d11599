"""`resume-cost`: time from a saved position to the next step, compared with a pipeline that reads its way there."""

import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset

from benchmarks.harness.figure import Figure, at_most
from benchmarks.harness.measure import OutputsDiffer, Side, race, spread, take_turns
from benchmarks.shards.corpus import write_rows
from data.config import ChatConfig, DataConfig, ImageConfig, SourceConfig, VideoConfig
from data.open import open_corpus, open_stream
from data.prepare.build import BuildOptions, build_shards
from data.render.sample import Renderer
from data.stream.corpus import Corpus
from finetune.files.tiny import TinyModel, write_tiny

SAMPLES = 4000
PLACES = 12  # positions at each end of an epoch, as the contents of steps vary more than resuming does
CONSTANT = at_most(1.5, goal=1.1)


def run() -> Iterator[Figure]:
    """Yield the time to the first step late in an epoch, compared with webdataset and with a step early in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny(folder / "base", TinyModel())
        renderer = Renderer(folder / "base", image=ImageConfig(max_tokens=64), video=VideoConfig(), chat=ChatConfig())
        for pictures in (0, 20):
            here = folder / f"with {pictures}"
            here.mkdir()
            yield from _measure(here, renderer, pictures)


def _measure(folder: Path, renderer: Renderer, pictures: int) -> Iterator[Figure]:
    rows = write_rows(folder, SAMPLES, pictures=pictures)
    shards = build_shards(rows, folder / "shards", BuildOptions(name="x")).shards
    sources = {"x": SourceConfig(path=str(folder / "shards"))}
    config = DataConfig(packs_per_step=2, tokens_per_pack=2048, workers=0, sources=sources)
    corpus = open_corpus(config, renderer)
    states = list(_states(config, corpus, renderer))
    resume = partial(_first_steps, config, corpus, renderer)
    consumed = SAMPLES * states[-1]["step"] // len(states)
    samples_are = "text, half of them with a photo" if pictures else "text"
    shown: dict[str, object] = {"samples": SAMPLES, "consumed before": consumed, "workers": 0, "are": samples_are}
    against = race(
        Side(name="ours", run=partial(resume, states[-1:])),
        Side(name="webdataset, reading up to there", run=partial(_read_up_to, shards, consumed)),
        same=partial(_same_twice, states[-1:], resume),
        rounds=5,
    )
    yield against.figure(f"resume late in an epoch, {samples_are}", config=shown)
    ends = [
        Side(name="early", run=partial(resume, states[:PLACES])),
        Side(name="late", run=partial(resume, states[-PLACES:])),
    ]
    first, last = take_turns(ends, rounds=9)
    yield Figure(
        f"late over early, {samples_are}",
        min(last) / min(first),
        "",
        config={**shown, "positions": PLACES},
        n=len(last),
        spread={"ours": spread(last)},
        target=CONSTANT,
    )


def _states(config: DataConfig, corpus: Corpus, renderer: Renderer) -> Iterator[dict[str, Any]]:
    """Yield the state before every step of an epoch; a state is a position, so nothing has to be read."""
    stream = open_stream(config, corpus, renderer, seed=0, rank=0, size=1)
    for step in range(stream.plan.steps):
        stream.step = step
        yield stream.state_dict()


def _first_steps(
    config: DataConfig, corpus: Corpus, renderer: Renderer, states: list[dict[str, Any]]
) -> list[tuple[str, ...]]:
    """Resume at each of these positions, and read one step."""
    keys_of_steps = []
    for state in states:
        stream = open_stream(config, corpus, renderer, seed=0, rank=0, size=1)
        stream.load_state_dict(state)
        step = next(iter(stream))
        keys_of_steps.append(tuple(key for batch in step.batches for key in batch.keys))
    return keys_of_steps


def _read_up_to(shards: tuple[Path, ...], consumed: int) -> str:
    samples = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    return str(next(islice(samples, consumed, None))["__key__"])


def _same_twice(late: list[dict[str, Any]], resume: Any, ours: list[tuple[str, ...]], peer: str) -> None:
    if not ours[0] or resume(late) != ours:
        raise OutputsDiffer("resuming twice at the same position gives two different steps")
    if not peer:
        raise OutputsDiffer("webdataset found no sample at this position")
