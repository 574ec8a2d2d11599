"""Tars of other tools, read in place: written by webdataset, GNU tar and tarfile, in the layouts that people have."""

import gzip
import io
import json
import pickle
import re
import subprocess
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from corpora import renderer
from media_files import clip, encode, moving, picture
from PIL import Image
from row_files import CAPTIONING, DOC, JPG, MP4, PNG, json_bytes, said, write_energon, write_tar

from data.config import DataConfig, SourceConfig
from data.format.tar import ShardError
from data.open import find_sources, open_corpus, open_stream
from data.peek import peek
from data.prepare.build import BuildOptions, build_shards
from data.prepare.found import find_data
from data.rows.columns import Columns
from data.shards.bytes import Places, places_of
from data.shards.find import find_shards
from data.shards.reader import SampleReader, load_index
from launchers.cli import main

CAPTION = "u: <image> | a+: A horse."


def read(shard, **options):
    """Return the turns of every sample of a shard; problems are an error."""
    reader = SampleReader(**options)
    index = reader.index(shard)
    assert not index.problems, index.problems
    out = []
    for number, key in enumerate(index.keys):
        record, members = reader.sample(shard, number)
        assert reader.record(shard, number) == record
        built = renderer().build(record, *reader.media(record, members, shard.parent), key=key)
        assert built.loss_weights.any()
        out.append(said(record))
    return out


TURNS = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A horse."}]
ASKED = "u: <image>What is it? | a+: A horse."
ALONE = {
    "LAION": (
        {"jpg": JPG, "txt": b"A horse.", "json": json_bytes({"caption": "other", "url": "x", "width": 64})},
        CAPTION,
    ),
    "DataComp": ({"png": PNG, "json": json_bytes({"caption": "A horse.", "uid": "1"})}, CAPTION),
    "video": ({"mp4": MP4, "txt": b"It slides."}, "u: <video> | a+: It slides."),
    "LLaVA by name": ({"jpg": JPG, "png": PNG, "json": json_bytes({"image": "jpg", "conversations": TURNS})}, ASKED),
    "LLaVA by path": ({"jpg": JPG, "json": json_bytes({"image": "coco/7.jpg", "conversations": TURNS})}, ASKED),
    "turns alone": ({"jpg": JPG, "json": json_bytes(TURNS)}, ASKED),
    "several": (
        {"1.jpg": JPG, "2.png": PNG, "json": json_bytes({"question": "Same?", "answer": "No."}), "cls": b"3"},
        "u: <image><image>Same? | a+: No.",
    ),
    "interleaved": (
        {
            "0.jpg": JPG,
            "1.jpg": JPG,
            "json": json_bytes({"texts": [None, "to", None], "images": ["0.jpg", None, "1.jpg"]}),
        },
        "a+: <image>to<image>",
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_tar_whose_members_speak_for_themselves_is_read_as_it_is(name, tmp_path):
    members, expected = ALONE[name]
    shard = write_tar(tmp_path / "x.tar", [members, members])
    assert read(shard) == [expected] * 2
    looked = peek(SourceConfig(path=str(shard)), "k", DataConfig(), enough=1)
    assert (looked.refused, looked.at_least) == ((), 2)
    assert find_data(shard).samples == 2


def test_pixels_are_those_of_the_members(tmp_path):
    shard = write_tar(tmp_path / "x.tar", [{"jpg": JPG, "txt": b"A horse.", "json": b"{}"}])
    reader = SampleReader()
    record, members = reader.sample(shard, 0)
    assert members == {"jpg": JPG}
    assert reader.media(record, members, shard.parent) == ([JPG], [])


MAPPED = {
    "members": ({"images": ["left.jpg", "1.png"], "text": "txt"}, CAPTION.replace("<image>", "<image><image>")),
    "keys": ({"image": "left.jpg", "question": "json.ask", "answer": "json.said.short"}, ASKED),
    "arrays": (
        {"video": "mp4", "timestamps": "times.npy", "sentences": "json.lines"},
        "u: <video> | a+: 0.0 - 1.0 seconds: It slides.",
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_map_names_members_and_keys_inside_them(name, tmp_path, capsys):
    mapped, expected = MAPPED[name]
    times = io.BytesIO()
    np.save(times, np.array([[0.0, 1.0]]))
    notes = {"ask": "What is it?", "said": {"short": "A horse."}, "lines": ["It slides."]}
    members = {"left.jpg": JPG, "1.png": PNG, "mp4": MP4, "txt": b"A horse.", "times.npy": times.getvalue()}
    shard = write_tar(tmp_path / "x.tar", [members | {"json": json_bytes(notes)}])
    config = DataConfig(sources={"a": SourceConfig(path=str(shard), map=mapped)})
    assert read(shard, places=places_of(config)) == [expected]
    words = [f"{ours}={theirs if isinstance(theirs, str) else ','.join(theirs)}" for ours, theirs in mapped.items()]
    assert main(["shards", "check", str(shard), *(one for word in words for one in ("--map", word))]) == 0
    assert "0 errors" in capsys.readouterr().out


def test_another_map_has_another_index_and_another_digest(tmp_path):
    members = {"a.jpg": JPG, "b.jpg": JPG, "txt": b"A horse.", "json": json_bytes({"caption": "A cow."})}
    shard = write_tar(tmp_path / "x.tar", [members])
    maps = [{"image": "a.jpg", "text": "txt"}, {"image": "a.jpg", "text": "json.caption"}]
    places = [Places(maps=((str(tmp_path), Columns.of(one).text),)) for one in maps]
    assert [read(shard, places=one) for one in places] == [[CAPTION], [CAPTION.replace("horse", "cow")]]
    assert len({load_index(shard, places=one).digest for one in (*places, Places())}) == 3
    assert len(list(tmp_path.glob("*.idx"))) == 3, "a run with one map does not disturb a run with another"
    both = Places(
        maps=tuple((path, one.maps[0][1]) for path, one in zip((str(shard), str(tmp_path)), places, strict=True))
    )
    with pytest.raises(ValueError, match="x.tar belongs to two sources with different maps"):
        load_index(shard, places=both)


def test_foreign_shards_train_as_shards_built_from_the_same_rows_do(tmp_path):
    folder = tmp_path / "laion"
    pictures = [encode(Image.fromarray(picture(64, 64 + 32 * (n % 3), n)), "JPEG") for n in range(12)]
    for first in (0, 6):
        samples = [
            {"jpg": data, "txt": f"Picture {first + n}.".encode()} for n, data in enumerate(pictures[first:][:6])
        ]
        write_tar(folder / f"{first:05d}.tar", samples)
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"image": f"{n}.jpg", "text": f"Picture {n}."}) for n in range(12)]
    rows.write_text("\n".join(lines))
    for n, data in enumerate(pictures):
        (tmp_path / f"{n}.jpg").write_bytes(data)
    build_shards(rows, tmp_path / "ours", BuildOptions(name="t", samples_per_shard=6))

    def rows_of_an_epoch(path, *, ranks, workers=0, stop=None):
        config = DataConfig(
            packs_per_step=2,
            tokens_per_pack=48,
            workers=workers,
            remainder="keep",
            sources={"a": SourceConfig(path=str(path))},
        )
        corpus = open_corpus(config, renderer())
        seen = set()
        for rank in range(ranks):
            first = open_stream(config, corpus, renderer(), seed=1, rank=rank, size=ranks)
            steps = [step for step in first if stop is None or step.step < stop]
            if stop is not None:
                state = {**first.state_dict(), "step": stop}
                again = open_stream(config, corpus, renderer(), seed=1, rank=rank, size=ranks)
                again.load_state_dict(state)
                steps += list(again)
            seen |= {
                (step.step, tuple(batch.input_ids[0].tolist()))
                for step in steps
                for batch in step.batches
                if batch.keys
            }
        return seen

    def samples(packs):
        return sum(len(row) for _, row in packs)

    one = rows_of_an_epoch(f"{folder}/{{00000,00006}}.tar", ranks=1)
    assert rows_of_an_epoch(folder, ranks=2) == one == rows_of_an_epoch(folder, ranks=1, stop=2)
    assert samples(rows_of_an_epoch(tmp_path / "ours", ranks=1)) == samples(one)
    reader = SampleReader()
    ours, theirs = find_shards(str(tmp_path / "ours"), "k"), find_shards(str(folder), "k")
    for mine, other in zip(ours, theirs, strict=True):
        for number in range(6):
            assert replace(reader.record(mine, number), id="", images=()) == replace(
                reader.record(other, number), id="", images=()
            )


def test_names_of_every_tar_are_read(tmp_path):
    long = "d" * 90 + "/" + "k" * 120
    for style in ("gnu", "pax", "ustar"):
        folder = tmp_path / style
        name = long if style != "ustar" else "a/b/00000"
        for ending, data in (("jpg", JPG), ("txt", b"A horse.")):
            (folder / f"{name}.{ending}").parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.{ending}").write_bytes(data)
        shard = tmp_path / f"{style}.tar"
        words = ["tar", f"--format={style}", "--sort=name", "-cf", str(shard), "-C", str(folder), "."]
        subprocess.run(words, check=True)
        assert read(shard) == [CAPTION]
        assert load_index(shard).keys == (name,)


def test_a_packed_tar_is_unpacked_once(tmp_path, caplog):
    shard = write_tar(tmp_path / "data/x.tar", [{"left.jpg": JPG, "txt": b"A horse."}])
    (tmp_path / "data/x.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    shard.unlink()
    for cache in (None, tmp_path / "cache"):
        path = str(tmp_path / "data")
        sources = {"a": SourceConfig(path=path, map={"image": "left.jpg", "text": "txt"})}
        config = DataConfig(sources=sources, cache_dir=str(cache or ""))
        (tar,) = find_sources(config)["a"]
        assert find_sources(config)["a"] == [tar]
        assert tar.is_relative_to(cache or tmp_path / "data/.unpacked")
        assert read(tar, places=places_of(config)) == [CAPTION], "its map is that of the packed one"
    assert caplog.text.count("unpacking ") == 2
    (tmp_path / "data/x.tar.gz").write_bytes((tmp_path / "data/x.tar.gz").read_bytes()[:-20])
    with pytest.raises(ShardError, match="x.tar.gz: cannot be unpacked"):
        find_shards(str(tmp_path / "data"), "k")
    assert not [path for path in (tmp_path / "data/.unpacked").iterdir() if path.name.endswith(".part")]


def test_energon_folders_are_read_by_their_own_notes(tmp_path):
    folder = write_energon(tmp_path / "set", CAPTIONING)
    config = DataConfig(sources={"a": SourceConfig(path=str(folder))})
    shards = find_sources(config)["a"]
    assert [shard.name for shard in shards] == ["a.tar", "b.tar"]
    assert [shard.name for shard in find_shards(str(folder), "k", split="val")] == ["b.tar"]
    assert read(shards[0]) == [CAPTION]
    vqa = "sample_type: {__module__: megatron.energon, __class__: VQASample}\n"
    (folder / ".nv-meta/dataset.yaml").write_text(
        vqa + "field_map: {image: jpg, context: 'json[question]', answers: 'json[answer]'}"
    )
    assert read(shards[0]) == [ASKED], "other notes make another index"
    with pytest.raises(ValueError, match=r"split.yaml has no part 'tests' \(known: train, val\)"):
        find_shards(str(folder), "k", split="tests")


@pytest.mark.parametrize(
    ("notes", "reason"),
    [
        ("sample_type: {__class__: CaptioningSample}\nsample_loader: my.py:load", "which is Python, and no code"),
        ("__class__: CrudeWebdataset\n", "declares samples of Crude without a field_map; read are Captioning"),
        ("[", "dataset.yaml cannot be read"),
        ("[1]", "dataset.yaml holds a list; Energon writes an object"),
    ],
)
def test_energon_folders_that_need_their_own_code_are_refused(notes, reason, tmp_path):
    folder = write_energon(tmp_path / "set", notes)
    with pytest.raises(ShardError, match=reason):
        load_index(folder / "shards/a.tar")
    mapped = Places(maps=((str(folder), Columns.of({"image": "jpg", "text": "txt"}).text),))
    assert read(folder / "shards/a.tar", places=mapped) == [CAPTION], "a map needs no notes"


def test_energon_notes_name_no_shard_outside_their_folder(tmp_path):
    for number, name in enumerate(("../x.tar", "/x.tar")):
        folder = write_energon(tmp_path / str(number), CAPTIONING, {"split_parts": {"train": [name]}})
        with pytest.raises(ValueError, match="which leads out of"):
            find_shards(str(folder), "k")
    folder = write_energon(tmp_path / "gone", CAPTIONING, {"split_parts": {"train": ["c.tar"]}})
    with pytest.raises(ValueError, match=r"whose notes name .*c.tar, which does not exist"):
        find_shards(str(folder), "k")
    with pytest.raises(ValueError, match="a folder of shards without parts, but split is 'train'"):
        find_shards(str(folder / "shards"), "k", split="train")


class Trap:
    """Fails the test when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_members_that_are_not_read_are_never_unpickled(tmp_path):
    objects = io.BytesIO()
    np.save(objects, np.array([Trap()], dtype=object), allow_pickle=True)
    trap = {"jpg": JPG, "txt": b"A horse.", "pyd": pickle.dumps(Trap()), "pth": pickle.dumps(Trap())}
    assert read(write_tar(tmp_path / "x.tar", [trap])) == [CAPTION]
    shard = write_tar(tmp_path / "y.tar", [{"mp4": MP4, "times.npy": objects.getvalue(), "txt": b"x"}])
    assert read(shard) == ["u: <video> | a+: x"], "an array that nothing names is not read"
    mapped = Columns.of({"video": "mp4", "timestamps": "times.npy", "sentences": "txt"})
    places = Places(maps=((str(shard), mapped.text),))
    assert "Object arrays cannot be loaded" in load_index(shard, places=places).problems[0]


def test_samples_that_are_not_whole_are_listed(tmp_path):
    good = {"jpg": JPG, "txt": b"A horse."}
    shard = write_tar(tmp_path / "x.tar", [good, {"txt": b"A horse."}, {"jpg": JPG}, good | {"txt": b"\xff"}])
    problems = load_index(shard).problems
    assert sorted(problems) == [1, 2, 3]
    assert problems[1].startswith("sample has the members txt, which are no known layout. Known: our record as json")
    mapped = Places(maps=((str(shard), Columns.of({"images": ["jpg", "1.jpg"], "text": "txt"}).text),))
    assert load_index(shard, places=mapped).problems[1] == (
        "members lack jpg and 1.jpg, which `map` names as images; there are txt"
    )


def test_links_and_special_files_of_a_tar_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ShardError, match="link or special file"):
        load_index(tmp_path / "x.tar")


def test_a_gif_and_a_webp_and_a_webm_are_media(tmp_path):
    image = Image.fromarray(picture(64, 64))
    kinds = {"gif": encode(image.convert("P"), "GIF"), "webp": encode(image, "WEBP"), "jpeg": JPG}
    samples = [{kind: data, "txt": b"A horse."} for kind, data in kinds.items()]
    film = clip(moving(8), kind="matroska")
    assert read(write_tar(tmp_path / "x.tar", samples)) == [CAPTION] * 3
    assert read(write_tar(tmp_path / "y.tar", [{"mkv": film, "txt": b"x"}])) == ["u: <video> | a+: x"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_the_documented_line_of_webdataset_reads_shards_of_ours(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPG)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.jpg", "text": "A horse."}) + "\n")
    build_shards(tmp_path / "rows.jsonl", tmp_path / "out", BuildOptions(name="part"))
    line = re.search(r"^samples = (webdataset\..*)$", DOC, re.MULTILINE)[1]
    line = line.replace("shards/part-{000000..000041}.tar", str(tmp_path / "out/part-000000.tar"))
    (sample,) = eval(line, {"webdataset": webdataset})
    assert json.loads(sample["json"])["images"] == ["0.jpg"]
    assert sample["0.jpg"] == JPG
