"""Opening a stream from the `data:` section, and the policies for samples that do not fit."""

import json
import logging

import numpy as np
import pytest
from corpora import corpus_of, renderer, write_shards
from hypothesis import given
from hypothesis import strategies as st
from media_files import clip, moving

from data.checks import data_problems
from data.config import DataConfig, SourceConfig
from data.format.record import parse_record
from data.format.tar import TarWriter
from data.format.turns import cut_record, split_turns
from data.open import open_corpus, open_stream
from data.prepare.build import BuildOptions, build_shards
from data.shards.find import find_shards
from data.shards.lengths import load_lengths
from data.shards.reader import SampleReader, load_index
from data.stream.corpus import Limits, decode_part, encode_part
from data.stream.plan import plan_settings
from data.stream.stats import corpus_lines


def config_of(path, **changes):
    return DataConfig(
        **(
            {"packs_per_step": 2, "tokens_per_pack": 384, "workers": 0, "sources": {"a": SourceConfig(path=str(path))}}
            | changes
        )
    )


def keys_of(config):
    corpus = open_corpus(config, renderer())
    return [
        key
        for step in open_stream(config, corpus, renderer(), seed=1, rank=0, size=1)
        for b in step.batches
        for key in b.keys
    ]


def test_shards_and_rows_open_alike(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes " * (n % 9 + 1)}]}
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_rows = keys_of(config_of(tmp_path / "rows.jsonl", remainder="keep"))
    assert len(set(from_rows)) == len(from_rows) == 40
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    from_shards = keys_of(config_of(folder, remainder="keep"))
    assert from_shards == from_rows


def test_lines_of_a_corpus_show_its_vision_tokens(tmp_path):
    write_shards(tmp_path / "x", 40)
    corpus = open_corpus(config_of(tmp_path / "x"), renderer())
    whole, vision = corpus_lines(corpus, patches_per_token=4)
    (units,) = corpus.sources
    assert whole.startswith(f"source a: 40 samples, {int(units.tokens.sum()):,} tokens (median ")
    seeing = units.patches[units.patches > 0] // 4
    assert vision.startswith(f"  vision tokens of its {len(seeing)} samples with images or videos: ")
    below = int((seeing < 64).sum())
    assert f" 0 to 64: {below}" in vision
    assert f" 64 to 128: {int(((seeing >= 64) & (seeing < 128)).sum())}" in vision or (seeing < 64).all()


def test_shards_are_found_by_file_folder_pattern_and_braces(tmp_path):
    paths = write_shards(tmp_path / "x", 12, per_shard=2)
    base = tmp_path / "x"
    assert find_shards(str(paths[0]), "k") == paths[:1]
    assert find_shards(str(base), "k") == paths
    assert find_shards(f"{base}/part-*.tar", "k") == paths
    assert find_shards(f"{base}/part-{{001..003}}.tar", "k") == paths[1:4]
    assert find_shards(f"{base}/part-{{000,004}}.tar", "k") == [paths[0], paths[4]]
    for path, message in (
        (f"{base}/gone.tar", "k names .*gone.tar', which does not exist"),
        (f"{base}/*.zip", r"k is .*\*.zip', which contains no \*.tar file"),
        (f"{base}/part-00{{0,0}}.tar", "names a shard twice"),
        ("x/{0..99999999}.tar", r"names more than 1,000,000 shards; narrow \{0..99999999\}"),
        ("x/{0..9999}-{0..9999}.tar", "names more than 1,000,000 shards; narrow its braces"),
        ("pipe:cat x.tar", "k is 'pipe:cat x.tar'; commands are never run"),
    ):
        with pytest.raises(ValueError, match=message):
            find_shards(path, "k")


def test_a_missing_shard_of_a_build_is_reported(tmp_path):
    rows = [{"messages": [{"role": "assistant", "content": str(n)}]} for n in range(6)] + [{"text": "bad"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shards = build_shards(tmp_path / "rows.jsonl", tmp_path / "out", BuildOptions(name="t", samples_per_shard=2)).shards
    assert find_shards(str(tmp_path / "out"), "k") == list(shards)  # the fourth had only refused rows
    shards[1].unlink()
    with pytest.raises(
        ValueError, match=r"data.sources.a.path is .*, but 1 shard of the build in .* is missing: t-000001.tar"
    ):
        open_corpus(config_of(tmp_path / "out"), renderer())
    assert find_shards(str(tmp_path / "out/*.tar"), "k") == [shards[0], shards[2]]


def test_problems_of_the_section_are_raised_together(tmp_path):
    sources = {"a": SourceConfig(path="x", weight=2.0), "b": SourceConfig(path="x", weight=-1.0)}
    config = DataConfig(packs_per_step=0, prefetch=0, sources=sources)
    assert [problem.key for problem in data_problems(config)] == [
        "data.packs_per_step",
        "data.prefetch",
        "data.sources.a.weight",
        "data.sources.b.weight",
    ]
    with pytest.raises(
        ValueError, match="(?s)data.packs_per_step = 0: it must be at least 1.*no effect with data.mixture=natural"
    ):
        open_corpus(config, renderer())
    with pytest.raises(ValueError, match="data.sources = {}: there is nothing to train on. Add data.sources"):
        open_corpus(DataConfig(), renderer())
    assert not data_problems(DataConfig(mixture="tokens", sources={"a": SourceConfig(path="x", weight=2.0)}))
    budget = {"a": SourceConfig(path="x", max_tokens=0), "b": SourceConfig(path="y", max_tokens=9)}
    one, other = map(str, data_problems(DataConfig(mixture="samples", sources=budget)))
    assert one.startswith("data.sources.a.max_tokens = 0: it must be at least 1. Set")
    assert other.startswith("data.sources.b.max_tokens = 9: it counts tokens, and data.mixture=samples draws samples")
    (problem,) = data_problems(DataConfig(sources={"a": SourceConfig(path="x", map={"answers2": "y"})}))
    assert str(problem).startswith("data.sources.a.map = {'answers2': 'y'}: it maps to 'answers2', which nothing")


def test_vision_tokens_limit_patches():
    assert plan_settings(config_of("x"), seed=0).patches_per_pack == 4 * 384
    assert plan_settings(config_of("x", vision_tokens_per_pack=100), seed=0).patches_per_pack == 400


def broken_shard(folder):
    folder.mkdir()
    with TarWriter(folder / "x.tar") as tar:
        for n in range(30):
            good = {"v": 1, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 40}]}
            tar.add(f"{n:03d}.json", json.dumps(good if n > 2 else {"v": 1}).encode())
    return folder


def test_unusable_samples_are_named_counted_and_limited(tmp_path, caplog):
    folder = broken_shard(tmp_path / "a")
    with caplog.at_level(logging.WARNING):
        corpus = open_corpus(config_of(folder), renderer())
    assert [item.key for item in corpus.unusable] == ["000", "001", "002"]
    assert (
        "left out: source a, shard x.tar, sample 001: messages is missing" in caplog.text or len(caplog.messages) == 3
    )
    assert len(corpus.sources[0]) == 27
    with pytest.raises(
        ValueError, match="3 samples cannot be used, but data.max_bad_samples is 2: source a, shard x.tar, sample 000"
    ):
        open_corpus(config_of(folder, max_bad_samples=2), renderer())


def test_a_source_without_a_usable_sample_is_refused(tmp_path):
    with TarWriter(tmp_path / "x.tar") as tar:
        tar.add("k.json", b"{")
    with pytest.raises(ValueError, match="data.sources.a has no usable sample: sample k: Expecting"):
        open_corpus(config_of(tmp_path), renderer())
    with TarWriter(tmp_path / "x.tar"):
        pass
    with pytest.raises(ValueError, match="data.sources.a has no usable sample: its shards are empty"):
        open_corpus(config_of(tmp_path), renderer())


def long_talk(turns, system=True):
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for n in range(turns):
        messages += [
            {"role": "user", "content": f"<image>question {n} " + "word " * 20},
            {"role": "assistant", "content": f"answer {n} at <bbox>"},
        ]
    boxes = [[n, n, n + 5, n + 5] for n in range(turns)]
    objects = {"bbox": boxes, "image_id": list(range(turns))}
    return {"v": 1, "messages": messages, "images": [f"{n}.png" for n in range(turns)], "objects": objects}


def talk_shard(folder, turns=9):
    from corpora import media

    folder.mkdir()
    with TarWriter(folder / "x.tar") as tar:
        tar.add("talk.json", json.dumps(long_talk(turns)).encode())
        for n in range(turns):
            tar.add(f"talk.{n}.png", media()["0.png"])
        for n in range(12):
            text = {"v": 1, "messages": [{"role": "assistant", "content": "b " * 60}]}
            tar.add(f"{n:03d}.json", json.dumps(text).encode())
    return folder


def test_a_sample_over_the_budget_is_refused_skipped_or_split(tmp_path, caplog):
    folder = talk_shard(tmp_path / "a")
    with pytest.raises(
        ValueError, match="1 sample cannot fit in a pack: shard x.tar, sample talk: .* tokens and .*set data.overlong"
    ):
        open_corpus(config_of(folder), renderer())
    with caplog.at_level(logging.WARNING):
        assert len(keys_of(config_of(folder, overlong="skip", remainder="keep"))) == 12
    assert "data.overlong=skip left out 1 sample" in caplog.text
    keys = keys_of(config_of(folder, overlong="split-turns", remainder="keep"))
    parts = [key for key in keys if key.endswith("talk")]
    assert len(parts) >= 2
    assert len(keys) == 12 + len(parts)


def test_a_part_counts_the_seconds_of_its_own_video(tmp_path):
    messages = []
    for words in (150, 100):
        messages += [{"role": "user", "content": "<video>" + "word " * words}, {"role": "assistant", "content": "yes"}]
    record = {"v": 1, "messages": messages, "videos": ["0.mp4", "1.mp4"]}
    with TarWriter(tmp_path / "x.tar") as tar:
        tar.add("talk.json", json.dumps(record).encode())
        for number, frames in enumerate((20, 10)):
            tar.add(f"talk.{number}.mp4", clip(moving(frames, 64, 64), rate=10))
    config = config_of(tmp_path, overlong="split-turns", packs_per_step=1)
    steps = list(open_stream(config, open_corpus(config, renderer()), renderer(), seed=1, rank=0, size=1))
    assert sorted(step.video_seconds for step in steps) == pytest.approx([1.0, 2.0])


def test_split_turns_keeps_every_turn_once_with_its_images_and_boxes():
    record = parse_record(long_talk(7), shard="s", key="k")
    parts = split_turns(record, lambda cut: len(cut.images) <= 3)
    assert parts == [(1, 6), (7, 12), (13, 14)]
    cuts = [cut_record(record, *part) for part in parts]
    assert [cut.images for cut in cuts] == [(0, 1, 2), (3, 4, 5), (6,)]
    assert [message for cut in cuts for message in cut.record.messages[1:]] == list(record.messages[1:])
    assert all(cut.record.messages[0].role == "system" for cut in cuts)
    assert cuts[1].record.objects.boxes == record.objects.boxes[3:6]
    assert cuts[1].record.objects.image_id == (0, 1, 2)
    with pytest.raises(ValueError, match="messages 1 to 2 alone do not fit a pack; turns are never cut"):
        split_turns(record, lambda cut: False)


def test_split_turns_keeps_tools_with_their_question_and_drops_unsupervised_parts():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "loss": False},
    ]
    record = parse_record({"v": 1, "messages": messages}, shard="s", key="k")
    assert split_turns(record, lambda cut: len(cut.record.messages) <= 4) == [(0, 3)]


def test_boxes_on_an_image_of_an_earlier_part_cannot_be_split():
    raw = long_talk(2)
    raw["objects"]["image_id"] = [0, 0]
    record = parse_record(raw, shard="s", key="k")
    with pytest.raises(ValueError, match="boxes of a later turn belong to image 0, which an earlier one shows"):
        split_turns(record, lambda cut: len(cut.images) <= 1)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_parts_survive_as_one_number(first, more):
    assert decode_part(encode_part(first, first + more)) == (first, first + more)
    assert decode_part(0) is None


def test_lengths_are_exact_and_kept(tmp_path):
    (path,) = write_shards(tmp_path, 12, per_shard=12)
    reader = SampleReader()
    found = load_lengths(path, renderer(), reader=reader, cache_dir=None)
    for number in range(12):
        record, members = reader.sample(path, number)
        sample = renderer().build(record, *reader.media(record, members, tmp_path), key="k")
        assert len(sample.input_ids) == found.tokens[number]
        assert len(sample.image_patches) + len(sample.video_patches) == found.patches[number]

    class Counting:
        def __init__(self, text, full):
            self.text_fingerprint, self.fingerprint, self.counted = text, full, []
            self.files_fingerprint = "files"

        def count_text(self, *args):
            self.counted.append("text")
            return renderer().count_text(*args)

        def count_vision(self, *args):
            self.counted.append("vision")
            return renderer().count_vision(*args)

    same = Counting(renderer().text_fingerprint, renderer().fingerprint)
    assert np.array_equal(load_lengths(path, same, reader=reader, cache_dir=None).tokens, found.tokens)
    assert same.counted == []
    limits = Counting(renderer().text_fingerprint, "other limits")
    assert np.array_equal(load_lengths(path, limits, reader=reader, cache_dir=None).tokens, found.tokens)
    assert set(limits.counted) == {"vision"}  # other image limits do not cause tokenising again
    load_index(path, force=True)
    load_lengths(path, same, reader=reader, cache_dir=None)
    assert same.counted.count("text") == 12  # a new index is counted again
    words = Counting("other words", "other")
    load_lengths(path, words, reader=reader, cache_dir=None)
    assert words.counted.count("text") == 12


def test_measuring_in_processes_changes_nothing(tmp_path):
    paths = write_shards(tmp_path / "a", 30, per_shard=10)
    one = corpus_of({"a": paths}, Limits(tokens=384, patches=1536), cache_dir=tmp_path / "one")
    two = corpus_of({"a": paths}, Limits(tokens=384, patches=1536), cache_dir=tmp_path / "two", jobs=2)
    assert one.digest == two.digest
    assert np.array_equal(one.sources[0].tokens, two.sources[0].tokens)
