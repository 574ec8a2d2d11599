"""`resume-cost`: from a saved position to the next step, beside a pipeline that has to read its way there again."""

import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset

from benchmarks.data_corpus import write_rows
from benchmarks.figure import Figure, Target
from benchmarks.measure import OutputsDiffer, Side, race, spread, take_turns
from data.config import ChatConfig, DataConfig, ImageConfig, SourceConfig, VideoConfig
from data.corpus import Corpus
from data.open import open_corpus, open_stream
from data.prepare import BuildOptions, build_shards
from data.sample import Renderer
from finetune.tiny import TinyModel, write_tiny

SAMPLES = 4000
CONSTANT = Target(of="value", rule="at most", floor=1.5, goal=1.1)


def run() -> Iterator[Figure]:
    """Yield the time to the first step late in an epoch, beside webdataset's and beside the same early in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny(folder / "base", TinyModel())
        renderer = Renderer(folder / "base", image=ImageConfig(max_tokens=64), video=VideoConfig(), chat=ChatConfig())
        shards = build_shards(write_rows(folder, SAMPLES, pictures=0), folder / "shards", BuildOptions(name="x")).shards
        sources = {"x": SourceConfig(path=str(folder / "shards"))}
        config = DataConfig(packs_per_step=4, tokens_per_pack=2048, balance_steps=0, workers=0, sources=sources)
        corpus = open_corpus(config, renderer)
        states = list(_states(config, corpus, renderer))
        early, late = states[1], states[-2]
        resume = partial(_first_step, config, corpus, renderer)
        consumed = SAMPLES * late["step"] // len(states)
        shown: dict[str, object] = {
            "samples": SAMPLES,
            "consumed before": consumed,
            "workers": 0,
            "samples are": "text",
        }
        against = race(
            Side(name="ours", run=partial(resume, late)),
            Side(name="webdataset, reading up to there", run=partial(_read_up_to, shards, consumed)),
            same=partial(_same_twice, late, resume),
            rounds=5,
        )
        yield against.figure(metric="resume late in an epoch", config=shown)
        first, last = take_turns(
            [Side(name="early", run=partial(resume, early)), Side(name="late", run=partial(resume, late))], rounds=9
        )
        yield Figure(
            metric="late over early",
            value=min(last) / min(first),
            unit="",
            n=len(last),
            spread={"ours": spread(last)},
            config=shown,
            target=CONSTANT,
        )


def _states(config: DataConfig, corpus: Corpus, renderer: Renderer) -> Iterator[dict[str, Any]]:
    """The state before every step of an epoch; a state is a position, so none has to be read for it."""
    stream = open_stream(config, corpus, renderer, seed=0, rank=0, size=1)
    for step in range(stream.plan.steps):
        stream.step = step
        yield stream.state_dict()


def _first_step(config: DataConfig, corpus: Corpus, renderer: Renderer, state: dict[str, Any]) -> tuple[str, ...]:
    stream = open_stream(config, corpus, renderer, seed=0, rank=0, size=1)
    stream.load_state_dict(state)
    step = next(iter(stream))
    return tuple(key for batch in step.batches for key in batch.keys)


def _read_up_to(shards: tuple[Path, ...], consumed: int) -> str:
    samples = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    return str(next(islice(samples, consumed, None))["__key__"])


def _same_twice(late: dict[str, Any], resume: Any, ours: tuple[str, ...], theirs: str) -> None:
    if not ours or resume(late) != ours:
        raise OutputsDiffer("resuming twice at one place gives two different steps")
    if not theirs:
        raise OutputsDiffer("webdataset found no sample there")
