"""The kind and the source of each token of real rows, told by the spelling of tokens and the keys of samples."""

from pathlib import Path

from bases import base
from corpora import renderer, write_shards

from data.config import DataConfig, SourceConfig
from data.open import open_corpus, open_stream
from finetune.files.hubconfig import read_family
from finetune.tracking.token_groups import KINDS, TokenGroups


def test_each_token_of_a_row_is_counted_by_its_kind_and_its_source(tmp_path: Path) -> None:
    sources = {name: SourceConfig(path=str(write_shards(tmp_path / name, 12)[0])) for name in ("one", "two")}
    config = DataConfig(packs_per_step=2, tokens_per_pack=384, pad_multiple=64, workers=0, sources=sources)
    family, spelling = read_family(base("tiny", None)), renderer()
    groups = TokenGroups(
        ["one", "two"],
        image_id=family.image_token_id,
        video_id=family.video_token_id,
        control_ids=spelling.control_ids,
    )
    kinds = {"<|image_pad|>": "image", "<|video_pad|>": "video"}
    seen = set()
    for step in open_stream(config, open_corpus(config, spelling), spelling, seed=1, rank=0, size=1):
        for batch in step.batches:
            kinds_T, sources_T = groups(batch).tolist()
            owners_T = batch.sample_ids[0].tolist()
            for token, owner, kind, source in zip(
                batch.input_ids[0].tolist(), owners_T, kinds_T, sources_T, strict=True
            ):
                if owner < 0:
                    continue
                text = spelling.spell(token)
                assert KINDS[kind] == kinds.get(text, "other" if text.startswith("<|") else "text"), text
                assert ["one", "two"][source - len(KINDS)] == batch.keys[owner].split("/")[0]
                seen.add((KINDS[kind], source))
    assert {kind for kind, _ in seen} == set(KINDS)
    assert {source for _, source in seen} == {len(KINDS), len(KINDS) + 1}
