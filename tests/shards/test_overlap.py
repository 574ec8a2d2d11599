"""`moetune shards overlap` and `shards mix`: contamination of an evaluation, and what an epoch contains."""

import json
from collections import Counter

import numpy as np
import pytest
from bases import base
from corpora import renderer, sample_json, write_shards
from media_files import clip, encode, moving
from PIL import Image

from data.config import DataConfig, SourceConfig
from data.format.tar import TarWriter
from data.open import open_corpus, open_stream
from data.prepare.likeness import words_of
from data.prepare.overlap import COMMON
from data.stream.mix import epoch_shares
from data.stream.plan import PATCHES_PER_TOKEN, make_plan, plan_settings
from launchers.cli import main

PROMPT = "Answer the question with a single word or phrase, and nothing else, please."


def text_of(seed, words=40):
    rng = np.random.default_rng(seed)
    return " ".join("".join(chr(97 + letter) for letter in rng.integers(0, 26, 6)) for _ in range(words))


def scene(seed):
    """Draw large blocks of grey, so that reduced copies look alike and two seeds do not."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((160, 120), Image.Resampling.NEAREST)


def sample(answer, images=(), videos=(), question=PROMPT):
    marks = "<image>" * len(images) + "<video>" * len(videos)
    messages = [{"role": "user", "content": marks + question}, {"role": "assistant", "content": answer}]
    named = {f"{at}.jpg": data for at, data in enumerate(images)}
    films = {f"{at + len(images)}.mp4": data for at, data in enumerate(videos)}
    return {"v": 1, "messages": messages, "images": list(named), "videos": list(films)}, named | films


def write(path, samples):
    path.parent.mkdir(exist_ok=True)
    with TarWriter(path) as tar:
        for key, (raw, members) in samples.items():
            tar.add(f"{key}.json", json.dumps(raw).encode())
            for name, data in members.items():
                tar.add(f"{key}.{name}", data)
    return path


def overlap(capsys, *words, code):
    assert main(["shards", "overlap", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_matches_are_found_by_text_image_and_video_and_nothing_else_is(tmp_path, capsys):
    film = moving(24, 64, 96)
    fillers = {f"filler-{n}": sample(text_of(100 + n), [encode(scene(100 + n), "JPEG")]) for n in range(COMMON + 1)}
    train = {
        "copied": sample(text_of(1)),
        "reworded": sample(" ".join(word[::-1] if n % 5 == 0 else word for n, word in enumerate(text_of(2).split()))),
        "picture": sample("yes", [encode(scene(3), "JPEG", quality=95)]),
        "entire": sample("yes", [encode(scene(4), "JPEG", quality=95)]),
        "cut": sample("yes", [encode(scene(5).crop((8, 6, 152, 114)), "JPEG", quality=95)]),
        "film": sample("yes", videos=[clip(film, rate=8)]),
        "other": sample(text_of(6), [encode(scene(6), "JPEG")]),
    } | fillers
    sought = {
        "spelled": sample(text_of(1).upper().replace(" ", ", ")),  # case and punctuation do not count
        "reworded": sample(text_of(2)),  # a paraphrase shares no sequence of 13 words
        "picture": sample("no", [encode(scene(3).resize((80, 60)), "JPEG", quality=30), encode(scene(31), "JPEG")]),
        "crop": sample("no", [encode(scene(4).crop((14, 10, 158, 118)), "JPEG")]),  # of a training image
        "whole": sample("no", [encode(scene(5), "JPEG")]),  # training has a crop of it
        "film": sample("no", videos=[clip(film, rate=8, gop=3)]),
        "flat": sample("no", [encode(Image.new("RGB", (64, 64), "white"))]),
    } | {f"new-{n}": sample(text_of(200 + n), [encode(scene(200 + n), "JPEG")]) for n in range(COMMON)}
    write(tmp_path / "train/a.tar", dict(list(train.items())[:9]))
    write(tmp_path / "train/b.tar", dict(list(train.items())[9:]))
    evaluation = write(tmp_path / "eval/a.tar", sought)
    report = overlap(capsys, tmp_path / "train", evaluation, code=3)
    found = {(m["sample"].split()[-1], m["kind"], m["found_in"].split()[-1]): m["share"] for m in report["matches"]}
    assert found == {
        ("spelled", "text", "copied"): 1.0,
        ("picture", "image", "picture"): 0.5,
        ("crop", "image", "entire"): 1.0,
        ("whole", "image", "cut"): 1.0,
        ("film", "video", "film"): 1.0,
    }
    counts = {key: report[key] for key in ("samples", "matched", "trained", "unreadable", "too_little")}
    assert counts == {"samples": len(sought), "matched": 5, "trained": len(train), "unreadable": [], "too_little": 0}
    assert overlap(capsys, tmp_path / "train", evaluation, "--jobs", 2, "--limit", 0.5, code=0) == report
    assert main(["shards", "overlap", str(tmp_path / "train"), str(evaluation)]) == 3
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "5 of 17 samples of the evaluation (29.4%) match; 18 samples of the training data read"


def test_foreign_shards_of_both_sides_are_read_with_the_map(tmp_path, capsys):
    for side in ("train", "eval"):
        (tmp_path / side).mkdir()
        with TarWriter(tmp_path / side / "a.tar") as tar:
            tar.add("000.note.txt", text_of(9).encode())
            tar.add("000.said.txt", text_of(1).encode())
            tar.add("000.jpg", encode(scene(1), "JPEG"))
    words = (tmp_path / "train", tmp_path / "eval", "--map", "image=jpg", "--map", "text=said.txt")
    report = overlap(capsys, *words, code=3)
    assert (report["samples"], report["trained"], report["unreadable"]) == (1, 1, [])
    assert sorted(match["kind"] for match in report["matches"]) == ["image", "text"]
    assert main(["shards", "overlap", *map(str, words[:2]), "--map", "answer=said.txt"]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    first = f"{tmp_path}/eval/a.tar 000: row has the columns answer, which is no known shape"
    assert shown.startswith(f"not compared, because they cannot be read: 2 samples, the first: {first}")


def test_words_of_all_scripts():
    assert words_of("Ａ  Straße, don't!  第七章") == ["a", "strasse", "don", "t", "第", "七", "章"]


def test_overlap_refuses_one_shard_on_both_sides(tmp_path, capsys):
    (path,) = write_shards(tmp_path / "x", 2)
    assert main(["shards", "overlap", str(tmp_path / "x"), str(path)]) == 2
    assert f"PATH and EVAL both name {path}; give the shards of EVAL a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["shards", "overlap", str(path), str(path), "--limit", "2"])
    assert "--limit: it must be a number from 0 to 1, got '2'" in capsys.readouterr().err


def long_talk(number):
    """Return a sample with an image or a video in its first turn, and with more turns than fit a row."""
    raw = sample_json(number)
    turns = [text_of(10 * number + turn, 12) for turn in range(number % 4)]
    more = [{"role": role, "content": text} for text in turns for role in ("user", "assistant")]
    return raw | {"messages": raw["messages"] + more}


@pytest.mark.parametrize("mixture", ["natural", "tokens"])
def test_the_mix_of_an_epoch_is_what_a_stream_reads(tmp_path, mixture):
    write_shards(tmp_path / "a", 60, make=long_talk)
    write_shards(tmp_path / "b", 12)
    weights = (1.0, 1.0) if mixture == "natural" else (1.0, 2.0)
    sources = {name: SourceConfig(path=str(tmp_path / name), weight=w) for name, w in zip("ab", weights, strict=True)}
    config = DataConfig(
        packs_per_step=2,
        tokens_per_pack=384,
        overlong="split-turns",
        mixture=mixture,
        sources=sources,
    )
    corpus = open_corpus(config, renderer())
    assert any(len(units.part.nonzero()[0]) for units in corpus.sources)  # parts of samples are counted too
    plan = make_plan(corpus.sources, plan_settings(config, seed=4), epoch=0)
    shares = epoch_shares(corpus, plan, patches_per_token=PATCHES_PER_TOKEN, cache_dir=None)
    samples, tokens = Counter(), Counter()
    batches = [b for step in open_stream(config, corpus, renderer(), seed=4, rank=0, size=1) for b in step.batches]
    for batch in batches:
        for number, key in enumerate(batch.keys):
            ids = batch.input_ids[batch.sample_ids == number].tolist()
            samples[key, tuple(ids)] += 1  # parts of a sample have its key
            tokens[key.split("/")[0]] += len(ids)
    for share in shares:
        read = {unit: times for unit, times in samples.items() if unit[0].startswith(f"{share.name}/")}
        assert (share.samples, share.distinct) == (sum(read.values()), len(read))
        assert (share.tokens, share.most_repeats) == (tokens[share.name], max(read.values()))
        assert share.available == len(next(units for units in corpus.sources if units.name == share.name))
    assert sum(share.images for share in shares) == sum(len(batch.image_grids) for batch in batches)
    assert sum(share.videos for share in shares) == sum(len(batch.video_grids) for batch in batches)
    patches = sum(int(g.prod(1).sum()) for b in batches for g in (b.image_grids, b.video_grids) if len(g))
    assert sum(share.vision_tokens for share in shares) == patches // PATCHES_PER_TOKEN
    assert sum(share.seconds for share in shares) == pytest.approx(2.0 * sum(share.videos for share in shares))


def test_the_command_prints_the_mix_of_each_stage(tmp_path, capsys):
    write_shards(tmp_path / "a", 60)
    write_shards(tmp_path / "b", 12)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""
base: tiny-cpu
model: {{path: {base("tiny", None)}}}
data:
  tokens_per_pack: 384
  packs_per_step: 2
  mixture: tokens
  sources: {{general: {{path: {tmp_path}/a}}, b: {{path: {tmp_path}/b, weight: 2}}}}
stages:
  first: {{from_step: 0}}
  second: {{from_step: 2, data: {{weights: {{b: 1}}}}}}
  third: {{from_step: 3, data: {{weights: {{b: 1}}}}}}
"""
    )
    assert main(["shards", "mix", str(recipe), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["stage"] for stage in stages] == ["first", "second"]  # the third reads what the second does
    for stage, ratio in zip(stages, (2, 1), strict=True):
        first, second = stage["sources"]
        assert second["tokens"] / first["tokens"] == pytest.approx(ratio, rel=0.2)
    assert main(["shards", "mix", str(recipe)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stage first: an epoch has ")
    assert " ".join(lines[1].split()) == "source samples of reads each tokens share vision images videos video time"
    assert lines[3].startswith("b  ")
    assert "(up to " in lines[3]
