"""`moetune shards`: each action on real shards, its exit codes and its messages."""

import json
import resource

import numpy as np
import pytest
from bases import base
from corpora import media, sample_json, write_sample, write_shards
from media_files import clip, encode, moving
from PIL import Image

from data.format.tar import TarWriter
from data.prepare.show import contact_sheet
from data.prepare.split import side_of
from data.shards.reader import SampleReader, load_index
from launchers.cli import main


def shards(capsys, *words, code=0):
    """Run the command, and return its JSON output."""
    assert main(["shards", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    assert main(["shards", *map(str, words)]) == 2
    return capsys.readouterr().err


def write_rows(path, count=12):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}], "channel": n}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"bad": 1}]))
    return path


def test_build_then_index_then_build_again(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl")
    out = tmp_path / "out"
    words = ("build", rows, "--out", out, "--samples-per-shard", 5, "--name", "x", "--jobs", 2)
    report = shards(capsys, *words, code=3)  # one refused row, although none is allowed
    assert (report["written"], report["rejected"], report["ignored"]) == (12, 1, {"channel": 12})
    assert report["repeated_bytes"] == 0
    again = shards(capsys, *words, "--max-rejects", 1)
    assert again["reused"] == 3
    assert main(["shards", *map(str, words)]) == 3
    captured = capsys.readouterr()
    assert "12 samples in 3 shards under" in captured.out
    assert "kept from an earlier build of this file: 3 shards" in captured.out
    assert "1 row refused; the reasons are in" in captured.out
    assert "column 'channel' of 12 rows was not used" in captured.out
    assert captured.err.endswith("] 13/13 rows, 1 refused\n")
    answer = shards(capsys, "index", out, "--force", "--jobs", 2)
    assert answer == {"shards": 3, "samples": 12, "problems": []}
    assert shards(capsys, "index", out, "--base", base("tiny", None)) == answer
    assert len(list(out.glob("*.len"))) == 3
    with TarWriter(out / "broken.tar") as tar:
        tar.add("k.json", b"{")
    assert "sample k: Expecting" in shards(capsys, "index", out, code=3)["problems"][0]


def test_check_finds_everything_that_is_wrong(tmp_path, capsys):
    write_shards(tmp_path, 12, per_shard=12)
    assert shards(capsys, "check", tmp_path) == {"findings": []}
    text = {"v": 1, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    wide = encode(Image.fromarray(np.zeros((2, 500, 3), dtype=np.uint8)))
    half = media()["1.jpg"][: len(media()["1.jpg"]) // 2]
    one = {"v": 1, "messages": [{"role": "assistant", "content": "<image>"}]}
    film = {"v": 1, "messages": [{"role": "assistant", "content": "<video>x"}], "videos": ["0.mp4"]}
    with TarWriter(tmp_path / "wrong.tar") as tar:
        tar.add("00001.json", json.dumps(text).encode())  # the first shard has this key too
        tar.add("Upper.json", json.dumps(text).encode())
        tar.add("dot.v2.json", json.dumps(text).encode())
        tar.add("half.json", json.dumps(one | {"images": ["0.png"]}).encode())
        tar.add("marks.json", json.dumps(one).encode())
        tar.add("wide.json", json.dumps(one | {"images": ["0.png"]}).encode())
        tar.add("wide.0.png", wide)
        tar.add("cut.json", json.dumps(one | {"images": ["0.jpg"]}).encode())
        tar.add("cut.0.jpg", half)
        tar.add("still.json", json.dumps(film).encode())
        tar.add("still.0.mp4", clip(moving(1)))
        tar.add("silent.json", json.dumps({"v": 1, "messages": [{"role": "user", "content": "a"}]}).encode())
        long = {"v": 1, "messages": [{"role": "assistant", "content": "word " * 900}]}
        tar.add("long.json", json.dumps(long).encode())
    with TarWriter(tmp_path / "empty.tar"):
        pass
    whole = (tmp_path / "wrong.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    expected = {
        "00001": "the key is used in",
        "Upper": "the key does not match",
        "dot": "a dot in the key?",
        "half": "half a sample?",
        "marks": "images has 0 items, but the messages contain 1",
        "wide": "factor of 200",
        "cut": "1.jpg|0.jpg|truncated",
        "still": "single frame",
        "silent": "nothing supervised",
    }
    found = shards(capsys, "check", tmp_path, code=3)["findings"]
    reasons = {}
    for finding in found:
        reasons.setdefault(finding["key"], []).append(finding["reason"])
    assert set(reasons) == {"", *expected}
    for key, reason in expected.items():
        assert any(word in why for word in reason.split("|") for why in reasons[key]), (key, reasons[key])
    assert sorted(why.split(":")[0] for why in reasons[""]) == ["contains no sample", "truncated"]
    warned = {finding["key"] for finding in found if finding["level"] == "warning"}
    assert warned == {"00001", "Upper", "still"}, "training takes these"
    fast = shards(capsys, "check", tmp_path, "--fast", code=3)["findings"]
    assert "cut" not in {finding["key"] for finding in fast}
    deep = shards(capsys, "check", tmp_path, "--base", base("tiny", None), "--tokens-per-pack", 700, code=3)["findings"]
    assert any(finding["key"] == "long" and "more than the 700 of a pack" in finding["reason"] for finding in deep)
    assert "--tokens-per-pack needs --base" in refused(capsys, "check", tmp_path, "--tokens-per-pack", 5)
    assert main(["shards", "check", str(tmp_path / "cut.tar")]) == 3
    captured = capsys.readouterr()
    assert "error: shard" in captured.out
    assert "1 error and 0 warnings in 1 shard\nnot checked without --base: the chat template" in captured.out
    assert captured.err.endswith("] 1/1 shards, 0 samples\n")


def test_findings_of_one_kind_are_one_line_and_warnings_are_not_errors(tmp_path, capsys):
    text = {"v": 1, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with TarWriter(tmp_path / "a.tar") as tar:
        for number in range(40):
            tar.add(f"Upper{number}.json", json.dumps(text).encode())
    with TarWriter(tmp_path / "b.tar") as tar:
        tar.add("Upper0.json", json.dumps(text).encode())
    assert main(["shards", "check", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("warning: 41 samples, the first: the key does not match [a-z0-9_/-]+: training takes it")
    assert shown[1] == "    a.tar Upper0, a.tar Upper1, a.tar Upper2 and 38 more (--all lists them)"
    assert shown[2].startswith(
        f"warning: shard {tmp_path}/b.tar, sample Upper0: the key is used in {tmp_path}/a.tar too"
    )
    assert shown[3] == "0 errors and 42 warnings in 2 shards"
    with TarWriter(tmp_path / "b.tar") as tar:
        for number in range(4):
            tar.add(f"{number}.json", json.dumps({**text, "images": [f"{number}.png"]}).encode())
    assert main(["shards", "check", str(tmp_path), "--all", "--base", str(base("tiny", None))]) == 3
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 45
    assert shown[-1] == "4 errors and 40 warnings in 2 shards"
    assert main(["shards", "check", str(tmp_path)]) == 3
    assert capsys.readouterr().out.startswith(
        "error: 4 samples, the first: images has 1 item, but the messages contain 0"
    )


def sample_text(number, **more):
    messages = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "yes"}]
    return {"v": 1, "messages": messages, **more}


def test_show_marks_the_supervised_part_and_draws_the_models_images(tmp_path, capsys):
    (shard,) = write_shards(tmp_path, 6, per_shard=6)
    answer = shards(
        capsys, "show", shard, "--key", "00002", "--base", base("tiny", None), "--sheet", tmp_path / "a.png"
    )
    before, marked = answer["text"].split("⟦")
    assert "<|image_pad|>×" in before
    assert "2?" in before
    assert marked.startswith("w14 w15")
    assert answer["supervised"] > 10
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size[0] == 4 * 224
    shards(capsys, "show", shard, "--key", "00004", "--base", base("tiny", None), "--sheet", tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as sheet:
        assert sheet.size[1] >= 238
    assert main(["shards", "show", str(shard), "--base", str(base("tiny", None))]) == 0
    assert "part-000.tar 00000: " in capsys.readouterr().out
    with TarWriter(tmp_path / "named.tar") as tar:
        for number in range(3):
            tar.add(f"{number}.json", json.dumps(sample_text(number, id=f"doc-{2 - number}")).encode())
        tar.add("doc-0.json", json.dumps(sample_text(9)).encode())
    for word, key in (("doc-1", "1"), ("doc-0", "doc-0")):  # a key goes before an id
        answer = shards(capsys, "show", tmp_path / "named.tar", "--key", word, "--base", base("tiny", None))
        assert answer["key"] == key
    answer = shards(capsys, "show", tmp_path, "--key", "doc-2", "--base", base("tiny", None))
    assert "0?" in answer["text"]
    message = refused(capsys, "show", tmp_path, "--key", "x", "--base", base("tiny", None))
    assert f"no sample has the key or id 'x'; {tmp_path / 'named.tar'} has 0, 1, 2 and 1 more" in message
    with TarWriter(tmp_path / "none.tar"):
        pass
    assert "contains no samples" in refused(capsys, "show", tmp_path / "none.tar", "--base", base("tiny", None))


def test_text_of_data_cannot_steer_a_terminal_or_look_like_a_control_token(tmp_path, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J\r\u202e<|im_start|>⟦system"
    good = {"v": 1, "messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": "yes"}]}
    with TarWriter(tmp_path / "x.tar") as tar:
        tar.add("0.json", json.dumps(good).encode())
        tar.add("k\x1b[31m\n.json", json.dumps({**good, "\x1b[2J": 1}).encode())
    words = ["--base", str(base("tiny", None))]
    assert main(["shards", "show", str(tmp_path / "x.tar"), *words]) == 0
    shown = capsys.readouterr().out
    assert r"\x1b]0;owned\x07\x1b[2J\r\u202e\<|im_start|>\⟦system" in shown
    assert shown.count("<|im_start|>") - shown.count(r"\<|im_start|>") == 2
    for action in ("index", "check"):
        assert main(["shards", action, str(tmp_path / "x.tar")]) == 3
        shown += capsys.readouterr().out
    assert r"sample k\x1b[31m\n: record has unknown keys" in shown
    assert not set("\x1b\x07\r\u202e") & set(shown)


def test_boxes_are_drawn_where_they_are(tmp_path, capsys):
    raw = {
        "v": 1,
        "messages": [{"role": "assistant", "content": "<image><bbox><point>"}],
        "images": ["0.png"],
        "objects": {"bbox": [[100, 100, 900, 500], [500, 800]], "bbox_type": "norm1000"},
    }
    blank = encode(Image.new("RGB", (128, 128), "black"))
    with TarWriter(tmp_path / "x.tar") as tar:
        tar.add("k.json", json.dumps(raw).encode())
        tar.add("k.0.png", blank)
    shards(capsys, "show", tmp_path / "x.tar", "--base", base("tiny", None), "--sheet", tmp_path / "a.png")
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    red = np.argwhere((sheet[:, :, 0] > 150) & (sheet[:, :, 1] < 90) & (sheet[:, :, 2] < 90))
    assert len(red) > 100
    assert contact_sheet([]).size[1] > 0


def test_stats_count_tokens_sizes_and_samples_that_are_too_long(tmp_path, capsys):
    write_shards(tmp_path, 60)
    answer = shards(capsys, "stats", tmp_path, "--base", base("tiny", None), "--context", 150)
    assert (answer["samples"], answer["unusable"], answer["images"], answer["videos"]) == (60, 0, 30, 10)
    tokens = answer["histograms"][0]
    assert sum(tokens["counts"]) == 60
    assert 0 < answer["above_context"] < 1
    assert answer["tokens_above_context"] > answer["above_context"]
    assert answer["histograms"][3]["median"] == 2.0
    assert main(["shards", "stats", str(tmp_path), "--base", str(base("tiny", None))]) == 0
    printed = capsys.readouterr().out
    assert "60 samples (0 unusable), 30 images, 10 videos" in printed
    assert "####" in printed
    assert "size of an image: 0.214 megapixels in all, median 0.00614" in printed
    with TarWriter(tmp_path / "text.tar") as tar:
        tar.add("0.json", json.dumps(sample_text(0)).encode())
    assert main(["shards", "stats", str(tmp_path / "text.tar"), "--base", str(base("tiny", None))]) == 0
    captured = capsys.readouterr()
    assert "1 sample (0 unusable), 0 images, 0 videos" in captured.out
    assert "image:" not in captured.out
    assert "images and videos" not in captured.out
    assert captured.err.endswith("] 1/1 shards, 1 sample\n")


def grouped(folder, count=60):
    return write_shards(folder, count, make=lambda n: sample_json(n, group=f"patient-{n // 4}"))


def test_split_keeps_groups_whole_and_loses_nothing(tmp_path, capsys):
    grouped(tmp_path / "all")
    words = ("split", tmp_path / "all", "--out", tmp_path / "parts", "--part", "train=0.7", "--part", "held-out=0.3")
    report = shards(capsys, *words)
    assert sum(report["samples"].values()) == 60
    sides = {}
    reader = SampleReader()
    for name in ("train", "held-out"):
        for shard in sorted((tmp_path / "parts" / name).glob("*.tar")):
            index = load_index(shard)
            assert not index.problems
            for number in range(len(index)):
                sides.setdefault(reader.record(shard, number).group, set()).add(name)
    assert len(sides) == 15
    assert all(len(names) == 1 for names in sides.values())
    assert all(sides[group] == {side_of(group, {"train": 0.7, "held-out": 0.3}, 0)} for group in sides)
    assert "parts/train exists already" in refused(capsys, *words)


def test_a_split_without_room_names_the_path_and_may_be_repeated(tmp_path, capsys):
    grouped(tmp_path / "all")
    words = ["split", str(tmp_path / "all"), "--out", str(tmp_path / "parts"), "--part", "a=0.5", "--part", "b=0.5"]
    shards(capsys, "index", tmp_path / "all")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        code = main(["shards", *words])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert "File too large: " in (message := capsys.readouterr().err)
    assert "-000000.tar" in message
    assert list((tmp_path / "parts").iterdir()) == []
    assert sum(shards(capsys, *words)["samples"].values()) == 60


def test_check_of_a_folder_that_cannot_be_written_finds_no_fault_in_its_shards(tmp_path, capsys):
    write_shards(tmp_path / "x", 4)
    (tmp_path / "file").write_text("")  # a file in the place of the cache folder: not even root may write there
    answer = shards(capsys, "check", tmp_path / "x", "--cache-dir", tmp_path / "file")
    assert answer == {"findings": []}


def test_split_adjusts_paths_of_shared_media(tmp_path, capsys):
    (tmp_path / "all").mkdir()
    (tmp_path / "all/x.png").write_bytes(media()["0.png"])
    with TarWriter(tmp_path / "all/a.tar") as tar:
        for number in range(20):
            write_sample(tar, f"{number:03d}", sample_json(number * 6))
        raw = {"v": 1, "messages": [{"role": "assistant", "content": "<image>"}], "images": [{"path": "x.png"}]}
        tar.add("shared.json", json.dumps(raw).encode())
    parts = ("--part", "a=0.5", "--part", "b=0.5", "--by", "key")
    shards(capsys, "split", tmp_path / "all", "--out", tmp_path / "deep/parts", *parts)
    found = [index for part in "ab" for index in map(load_index, (tmp_path / "deep/parts" / part).glob("*.tar"))]
    assert sum(map(len, found)) == 21
    assert not any(index.problems for index in found)


def test_a_column_that_only_the_rows_have_can_name_groups(tmp_path, capsys):
    rows = [{**sample_text(n), "document_id": n // 3} for n in range(30)] + [sample_text(30), sample_text(31)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = ("--part", "a=0.5", "--part", "b=0.5", "--by")

    def split(shards_folder, out, by):
        report = shards(capsys, "split", tmp_path / shards_folder, "--out", tmp_path / out, *parts, by)
        reader, sides = SampleReader(), {}
        for side in "ab":
            for shard in (tmp_path / out / side).glob("*.tar"):
                for number in range(len(load_index(shard))):
                    text = reader.record(shard, number).messages[0].contents[0].text
                    sides[int(text.removesuffix("?"))] = side
        reader.bytes.close()
        return report, [sides[n] for n in range(32)]

    shards(capsys, "build", source, "--out", tmp_path / "plain")
    report, sides = split("plain", "parts", "document_id")
    assert all(len(set(sides[n : n + 3])) == 1 for n in range(0, 30, 3))
    assert (sum(report["groups"].values()), report["alone"]) == (12, 2)
    assert report["first_alone"] == "shard part-000000.tar, sample 000000031"
    assert shards(capsys, "build", source, "--out", tmp_path / "kept", "--group", "document_id")["ignored"] == {}
    again, same_sides = split("kept", "again", "group")
    assert (again, same_sides) == (report, sides)
    words = ["shards", "split", str(tmp_path / "kept"), "--out", str(tmp_path / "third"), *parts, "group"]
    assert main(words) == 0
    assert "2 samples without a value of 'group': each is its own group. The first: " in capsys.readouterr().out
    message = refused(capsys, "split", tmp_path / "plain", "--out", tmp_path / "x", *parts, "document")
    assert f"a column that no row of {source} has; there are document_id, messages, v" in message
    source.write_text(source.read_text() + "\n")
    message = refused(capsys, "split", tmp_path / "plain", "--out", tmp_path / "x", *parts, "document_id")
    assert f"which is read from {source}, and that file is gone or has changed since the build. Build the" in message
    message = refused(capsys, "build", source, "--out", tmp_path / "plain", "--group", "page")
    assert "the source file changed since the build" in message


def test_two_samples_of_one_key_survive_a_split(tmp_path, capsys):
    for name in "abc":
        with TarWriter(tmp_path / f"{name}.tar") as tar:
            for number in range(8):
                tar.add(f"{number}.json", json.dumps(sample_text(number)).encode())
    shards(capsys, "split", tmp_path, "--out", tmp_path / "out", "--part", "x=0.5", "--part", "y=0.5", "--by", "key")
    indexes = [load_index(shard) for side in "xy" for shard in (tmp_path / "out" / side).glob("*.tar")]
    assert sum(map(len, indexes)) == 24
    assert not any(index.problems for index in indexes)


def test_a_build_reports_repeated_media(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    (tmp_path / "film.png").write_bytes(encode(Image.fromarray(noise)))
    rows = [{**sample_text(n), "images": ["film.png"]} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["shards", "build", str(tmp_path / "rows.jsonl"), "--samples-per-shard", "1", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    assert "1.5 MB are copies of media in other samples; with --media reference" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "light"), "--media", "reference"]) == 0
    assert "copies" not in capsys.readouterr().out


def test_split_refuses_unusable_input(tmp_path, capsys):
    grouped(tmp_path / "all", 8)
    write_shards(tmp_path / "plain", 4)
    split = ("split", tmp_path / "all", "--out", tmp_path / "parts", "--part")
    assert "--part is 'train'; write NAME=SHARE" in refused(capsys, *split, "train")
    assert "write two or more parts that sum to 1" in refused(capsys, *split, "train=0.9")
    both = ("--part", "a=0.5", "--part", "b=0.5")
    assert "--by is 'page'; records keep group, key, id, source, license, and" in refused(
        capsys, *split[:-1], *both, "--by", "page"
    )
    plain = ("split", tmp_path / "plain", "--out", tmp_path / "parts", *both)
    assert "--by is 'group', which none of the 4 samples has" in (message := refused(capsys, *plain))
    assert "or --by key for samples that stand alone" in message
    tiny = ("--part", "a=0.999999", "--part", "b=0.000001")
    assert "part b gets none of the 2 groups; change --seed" in refused(capsys, *split[:-1], *tiny)


def test_arguments_are_checked(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["shards", "build", "x.jsonl", "--out", "y", "--jobs", "0"])
    assert caught.value.code == 2
    assert "it must be a whole number from 1, found '0'" in capsys.readouterr().err
    assert "PATH names 'nowhere', which does not exist" in refused(capsys, "index", "nowhere")
