"""Held-out questions to a local model and to a server: equal answers, scores by source, controls, retries, errors."""

import copy
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from bases import base
from chat_server import Server, serving
from limits import LIMIT_S
from media_files import clip, encode, moving, picture
from PIL import Image
from places import ROOT
from transformers import AutoModelForImageTextToText

from data.config import ChatConfig, ImageConfig, VideoConfig
from data.format.record import parse_record
from data.render.sample import Renderer
from finetune.ask.answers import (
    Reply,
    Scored,
    ShownQuestion,
    find_questions,
    metrics_of,
    table,
    table_lines,
    with_media,
)
from finetune.ask.endpoint import Endpoint, check_sendable, completion_body
from finetune.ask.exchange import MOST_BYTES, EndpointError
from finetune.ask.local import prompt_of
from launchers.cli import main


@cache
def stock() -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(base(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows of two sources: the first source has two images per row, the second none or one."""
    folder = tmp_path_factory.mktemp("held-out")
    for number in range(6):
        (folder / f"{number}.png").write_bytes(encode(Image.fromarray(picture(64 + 32 * number, 96, number))))
    lines = []
    for number in range(4):
        asked = {"role": "user", "content": "Compare <image> and <image>."}
        lines.append({"source": "pairs", "messages": [asked, {"role": "assistant", "content": "Alike."}]})
        lines[-1]["images"] = [f"{number}.png", f"{number + 1}.png"]
    system = {"role": "system", "content": "Be brief."}
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "B"}]
    lines.append({"messages": [system, *turns], "answers": ["B", "b."]})
    lines.append({"messages": [system, *turns], "images": ["5.png"]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


@pytest.fixture(scope="module")
def served():
    with serving(Server(base(), stock())) as server:
        yield server


@pytest.fixture
def server(served):
    served.requests.clear()
    served.keys.clear()
    served.tells = {"prompt_token_ids", "token_ids", "logprobs"}
    served.enlarge, served.names = 1, ["served"]
    served.model = stock()
    yield served
    assert not served.refuse


def report(capsys: pytest.CaptureFixture[str]) -> dict:
    printed: dict = json.loads(capsys.readouterr().out)
    return printed


def test_a_server_and_our_own_model_give_the_same_answers(rows, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    words = ["eval", f"rest={rows}", "--max-tokens", "6", "--metric", "exact", "--metric", "rest=choice", "--json"]
    assert main([*words, "--model", str(base()), "--batch", "4", "--out", str(tmp_path / "ours.jsonl")]) == 0
    ours = report(capsys)
    assert main([*words, "--url", server.url, "--key-variable", "MY_KEY", "--out", str(tmp_path / "theirs.jsonl")]) == 0
    assert report(capsys) == ours
    assert [(row["source"], row["samples"], set(row["scores"])) for row in ours["rows"]] == [
        ("pairs", 4, {"exact"}),
        ("rest", 2, {"choice"}),
        ("all", 6, {"exact", "choice"}),
    ]
    lines = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text().splitlines()]
    assert lines == [json.loads(line) for line in (tmp_path / "theirs.jsonl").read_text().splitlines()]
    assert len({line["answer"] for line in lines}) > 2
    assert lines[0]["question"] == "Compare <image> and <image>."
    assert lines[4]["references"] == ["B", "b."]
    assert set(server.keys) == {"Bearer secret"}
    brief = [one for one in server.requests if one["messages"][0] == {"role": "system", "content": "Be brief."}]
    assert len(brief) == 2


def test_bounds_decide_the_exit_code(rows, capsys):
    words = ["eval", str(rows), "--model", str(base()), "--max-tokens", "1", "--limit", "1", "--metric", "f1"]
    assert main([*words, "--at-least", "f1=0.5"]) == 3
    shown = capsys.readouterr().out
    assert "missed: f1 is 0.0000 over all samples, --at-least 0.5" in shown
    assert "answers cut at --max-tokens 1: 2 of 2" in shown
    assert main([*words, "--at-most", "f1=0.5"]) == 0


def test_samples_that_a_metric_cannot_read_are_skipped_and_named(tmp_path, capsys):
    asked = {"role": "user", "content": "When does it rain?"}
    answers = ["from 1.0 to 2.5", "never", "00:10 to 00:20", "never"]
    rows = [{"messages": [asked, {"role": "assistant", "content": answer}]} for answer in answers]
    (tmp_path / "rain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", str(tmp_path / "rain.jsonl"), "--model", str(base()), "--max-tokens", "1", "--metric", "time-iou"]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "2 of 4 samples cannot be scored; the first is " in message
    assert "sample 000000002: --metric time-iou: the reference ['never'] contains no pair of times" in message
    assert "Skip them with --skip-unfit, or give the source another metric" in message
    assert main([*words, "--skip-unfit", "--out", str(tmp_path / "out.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^rain +2 ", shown, re.MULTILINE)
    assert (
        "2 samples (part-000000.tar 000000002, part-000000.tar 000000004). The first:\n    --metric time-iou" in shown
    )
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert main([*words, "--skip-unfit", "--json"]) == 0
    answer = report(capsys)
    assert [item["key"] for item in answer["left_out"]] == ["000000002", "000000004"]
    assert answer["rows"][0]["samples"] == 2
    assert main([*words[:-1], "iou@0.5", "--skip-unfit"]) == 2
    assert "4 of 4 samples cannot be scored" in (message := capsys.readouterr().err)
    assert "No sample of rain is left. Give the source another metric" in message


def test_controls_show_other_media_or_none(rows):
    questions, reader = find_questions([str(rows)])
    kept = list(with_media(questions, reader, control="kept", seed=0))
    assert [len(one.images) for one in kept] == [2, 2, 2, 2, 0, 1]
    with pytest.raises(ValueError, match="--media shuffled: no other question shows 1 image and 0 videos"):
        list(with_media(questions, reader, control="shuffled", seed=0))
    shuffled = list(with_media(questions[:5], reader, control="shuffled", seed=0))
    for one, other in zip(kept[:4], shuffled[:4], strict=True):
        assert other.record.messages == one.record.messages
        assert other.images != one.images
    assert sorted(one.images for one in shuffled[:4]) == sorted(one.images for one in kept[:4])
    blank = list(with_media(questions, reader, control="blank", seed=0))
    with Image.open(io.BytesIO(blank[0].images[1])) as image:
        assert (image.size, image.getextrema()) == ((96, 96), ((128, 128),) * 3)


def test_some_of_each_source_are_drawn_by_the_seed(rows):
    def keys(**options):
        return [question.key for question in find_questions([str(rows)], **options)[0]]

    assert len(keys()) == 6
    assert len(keys(limit=1)) == 2
    assert keys(limit=2, seed=1) == keys(limit=2, seed=1)
    assert len({tuple(keys(limit=1, seed=seed)) for seed in range(9)}) > 2


def test_boxes_of_an_answer_are_read_as_a_model_writes_them(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(Image.fromarray(picture(100, 200, 0))))
    turns = [
        {"role": "user", "content": "<image>Not <bbox>. Where is <ref-object>?"},
        {"role": "assistant", "content": "<ref-object>: <bbox>, <point>"},
    ]
    boxes = [[0, 0, 20, 10], [20, 10, 100, 50], [100, 50]]
    row = {"messages": turns, "images": ["a.png"], "objects": {"ref": ["cat", "dog"], "bbox": boxes}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (question,), _ = find_questions([str(tmp_path / "rows.jsonl")])
    assert question.references == ("dog: [100, 100, 500, 500], [500, 500]",)
    assert question.record.objects.boxes == ((0, 0, 20, 10),)


def test_the_table_has_means_by_source_and_over_all(rows):
    questions, _ = find_questions([str(rows)])
    scores = [{"exact": at / 5} | ({"f1": 1.0} if at == 5 else {}) for at in range(6)]
    replies = [Reply(text="", finished=at > 0) for at in range(6)]
    scored = [Scored(question=q, reply=r, scores=s) for q, r, s in zip(questions, replies, scores, strict=True)]
    assert table_lines(table(scored)) == [
        "source  samples    exact       f1",
        "pairs         4   0.3000        -",
        "rows          2   0.9000   1.0000",
        "all           6   0.5000   1.0000",
    ]
    assert [row.cut for row in table(scored)] == [1, 0, 1]
    assert len(table(scored[:2])) == 1


# --- the server


def patient(server: Server, **options) -> tuple[Endpoint, list[float]]:
    waits: list[float] = []
    return Endpoint(url=server.url, wait=waits.append, **options), waits


def test_a_busy_server_is_asked_again(server):
    endpoint, waits = patient(server)
    server.refuse += [(503, {"Retry-After": "7"}, "starting"), (429, {"Retry-After": "soon"}, "{}")]
    body = {"model": "served", "messages": [{"role": "user", "content": "Say B."}], "max_tokens": 2}
    assert endpoint.complete(body).finished is False
    assert waits[0] == 7.0
    assert 2 <= waits[1] <= 4
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (
            503,
            '{"error": {"message": "overloaded"}}',
            r"no answer after 3 .*; the last failed with: HTTP 503: overloaded",
        ),
        (401, '{"error": {"message": "bad key"}}', r"HTTP 401: bad key. The key is read .* NO_KEY, which is not set"),
        (404, '{"detail": "Not Found"}', r"HTTP 404: .*Not Found.*--url must be the server's address up to /v1"),
        (400, '{"message": "image too large"}', r"HTTP 400: image too large$"),
        (200, "<html>", r"127.0.0.1:\d+/v1/chat/completions: the answer does not follow .* begins with b'<html>'"),
    ],
)
def test_a_refusal_is_reported_with_the_servers_message(server, status, body, text):
    endpoint, _ = patient(server, attempts=3, key_variable="NO_KEY")
    server.refuse += [(status, {}, body)] * (3 if status == 503 else 1)
    with pytest.raises(EndpointError, match=text):
        endpoint.complete({"messages": []})


def completion(content: str, **more: object) -> dict:
    return {"choices": [{"message": {"content": content}, "finish_reason": "stop", **more}]}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/models", {}),
        ("/v1/models", {"data": None}),
        ("/v1/models", {"data": [{"id": 5}]}),
        ("/v1/models", []),
        ("/v1/chat/completions", {"object": "error"}),
        ("/v1/chat/completions", {"choices": []}),
        ("/v1/chat/completions", completion([{"type": "text", "text": "B"}])),
        ("/v1/chat/completions", completion(5)),
        ("/v1/chat/completions", completion("B", logprobs={"content": [{"logprob": None}]})),
        ("/v1/chat/completions", completion("B", logprobs={"content": [{"logprob": float("nan")}]})),
        ("/v1/chat/completions", completion("B", token_ids="ab")),
        ("/v1/chat/completions", completion("B") | {"usage": {"prompt_tokens": "many"}}),
        ("/v1/chat/completions", completion("B") | {"usage": [1]}),
        ("/v1/chat/completions", "[" * 5000),
        ("/v1/chat/completions", b'{"choices": [{"message": {"content": "\xff"}}]}'),
        ("/v1/chat/completions", "1" * 5000),
    ],
)
def test_an_invalid_answer_gives_one_message_with_the_address(server, path, said):
    endpoint, _ = patient(server)
    server.refuse += [(200, {}, said if isinstance(said, str | bytes) else json.dumps(said))]
    with pytest.raises(EndpointError, match=f"127.0.0.1:\\d+{path}: the answer does not follow OpenAI's protocol"):
        endpoint.model_name() if path == "/v1/models" else endpoint.complete({"messages": []})


@pytest.mark.parametrize("seconds", ["-5", "nan", "inf", "soon"])
def test_an_invalid_wait_is_replaced_by_our_own(server, seconds):
    endpoint, waits = patient(server)
    server.refuse += [(503, {"Retry-After": seconds}, "starting"), (200, {}, json.dumps(completion("B")))]
    assert endpoint.complete({"messages": []}).text == "B"
    assert 1 <= waits[0] <= 2


def test_half_a_surrogate_pair_is_replaced(server, tmp_path):
    server.refuse += [
        (200, {}, r'{"choices": [{"message": {"content": "a\ud800b\ud83d\ude00"}, "finish_reason": "stop"}]}')
    ]
    text = patient(server)[0].complete({"messages": []}).text
    assert text == "a\ufffdb\U0001f600"
    (tmp_path / "out").write_text(text)


def test_a_slow_or_endless_answer_is_cut_off(server):
    over = Event()

    def drops():
        while not over.wait(0.05):
            yield b" "

    def flood():
        for _ in range(MOST_BYTES // 2**20 + 1):
            yield bytes(2**20)

    server.refuse += [(200, {}, drops), (200, {}, flood), (500, {}, drops)]
    endpoint, _ = patient(server, timeout=0.3, attempts=1)
    try:
        for text in ("no complete answer within 0.3 s", "", "no complete answer within 0.3 s"):
            if text:
                with pytest.raises(EndpointError, match=text):
                    endpoint.complete({"messages": []})
                continue
            with pytest.raises(EndpointError, match="the answer has more than 64 MiB"):
                patient(server, attempts=1)[0].complete({"messages": []})
    finally:
        over.set()


def test_the_key_is_not_sent_to_the_host_of_a_redirect(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    endpoint, _ = patient(server, attempts=1)
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    server.refuse += [(302, {"Location": f"{elsewhere}/models"}, "")]
    assert endpoint.model_name() == "served"
    server.refuse += [(302, {"Location": f"{server.url}/models"}, "")]
    assert endpoint.model_name() == "served"
    assert server.keys == ["Bearer s3cret", None, "Bearer s3cret", "Bearer s3cret"]
    server.refuse += [(302, {"Location": "ftp://127.0.0.1/models"}, "")]
    with pytest.raises(EndpointError, match="HTTP 302"):
        endpoint.model_name()


def test_a_missing_server_exits_with_1_and_names_the_sample(rows, server, capsys):
    assert main(["eval", str(rows), "--url", "http://127.0.0.1:1/v1", "--attempts", "1"]) == 1
    assert re.search("no answer after 1 .*; the last failed with: .*refused", capsys.readouterr().err)
    server.refuse += [(400, {}, '{"message": "no"}')]
    assert main(["eval", str(rows), "--url", server.url, "--name", "a", "--concurrency", "1", "--limit", "1"]) == 1
    assert "sample 00000000" in capsys.readouterr().err


def test_requests_follow_openais_protocol(server):
    call = {"tool_calls": [{"name": "look", "arguments": {"at": 1}}], "role": "assistant", "content": ""}
    asked = {"role": "user", "content": "<video>Then <image>"}
    record = parse_record(
        {
            "v": 1,
            "messages": [asked, call, {"role": "tool", "content": "seen"}],
            "images": ["0.jpg"],
            "videos": ["1.mp4"],
            "tools": [{"type": "function", "function": {"name": "look"}}],
        },
        shard="",
        key="",
    )
    jpeg, mp4 = encode(Image.fromarray(picture(32, 32)), "JPEG"), clip(moving(5))
    body = completion_body(ShownQuestion(key="", record=record, images=[jpeg], videos=[mp4]), "m", {"max_tokens": 3})
    first = body["messages"][0]["content"]
    assert [part["type"] for part in first] == ["video_url", "text", "image_url"]
    assert first[0]["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert first[2]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert body["messages"][1]["content"] is None, "of an empty text vLLM makes a part of the turn"
    calls = body["messages"][1]["tool_calls"]
    assert calls == [{"type": "function", "id": "call-0", "function": {"name": "look", "arguments": '{"at": 1}'}}]
    assert body["messages"][2] == {"role": "tool", "content": "seen", "tool_call_id": "call-0"}
    assert (body["max_tokens"], body["tools"]) == (3, [{"type": "function", "function": {"name": "look"}}])
    check_sendable(record)


def test_a_server_with_one_model_needs_no_name(server):
    server.names = ["a", "b"]
    endpoint, _ = patient(server)
    with pytest.raises(ValueError, match="serves a, b; choose one with --name"):
        endpoint.model_name()
    assert patient(server, model="b")[0].model_name() == "b"
    with pytest.raises(ValueError, match="--url is 'localhost:8000'; write http://host:port/v1"):
        Endpoint(url="localhost:8000")


# --- refused questions


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {"messages": [("user", "<image><bbox>?")], "images": ["0.jpg"], "objects": {"bbox": [[0, 0, 1, 1]]}},
            "a question contains <bbox>; a server takes only text, images and videos",
        ),
        (
            {"messages": [("user", "<video>?")], "videos": [{"member": "0.mp4", "start": 1.0}]},
            "a question shows a range or a list of frames of a video",
        ),
    ],
)
def test_records_that_openais_protocol_cannot_express_are_refused(row, text):
    turns = [{"role": role, "content": content} for role, content in row["messages"]]
    with pytest.raises(ValueError, match=text):
        check_sendable(parse_record({"v": 1, **row, "messages": turns}, shard="", key=""))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--metric", "docs=anls"], r"--metric docs=anls: no sample has source 'docs'; the sources are pairs, rows"),
        (["--metric", "iou@0.5"], r"sample 00000\d+: --metric iou@t: the reference \['Alike.'\] contains no box"),
        (["--at-least", "f1=0.5"], r"--at-least f1=0.5: write METRIC=X, with X from 0 to 1 and METRIC one of exact"),
        (["--at-most", "exact=2"], r"--at-most exact=2: write METRIC=X"),
        (["--url", "http://x/v1", "--adapter", "a"], r"--adapter applies only to --model; the server at --url has"),
        (["--url", "http://x/v1", "--set", "data.image.max_tokens=9"], r"--set applies only to --model"),
        (
            ["--set", "optim.lr=1"],
            r"--set optim.lr=1 would have no effect here; the keys with an effect are data.image, data.video",
        ),
        (["--set", "data.image.max_token=9"], r"data.image.max_token: .*Did you mean|no such key"),
    ],
)
def test_wrong_arguments_exit_with_2(rows, words, text, capsys):
    who = [] if "--url" in words else ["--model", str(base())]
    assert main(["eval", str(rows), *who, *words]) == 2
    assert re.search(text, capsys.readouterr().err)


def test_data_without_an_answer_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x", "loss": True}]}))
    with pytest.raises(ValueError, match="no sample ends with an assistant's turn, so there is nothing to ask"):
        find_questions([str(tmp_path / "a.jsonl")])
    with pytest.raises(ValueError, match="DATA is 'nowhere.jsonl', which does not exist"):
        find_questions(["nowhere.jsonl"])
    with pytest.raises(ValueError, match=r"answers\[0\]: is 7|answers\[0\] is 7; write an accepted answer as text"):
        parse_record({"v": 1, "messages": [{"role": "user", "content": "x"}], "answers": [7]}, shard="s", key="k")
    assert metrics_of([], ["a"])["a"].keys() == {"exact"}


def test_a_video_has_no_blank_picture(tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip(moving(9)))
    turns = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "x"}]
    (tmp_path / "v.jsonl").write_text(json.dumps({"messages": turns, "videos": ["a.mp4"]}))
    questions, reader = find_questions([str(tmp_path / "v.jsonl")])
    with pytest.raises(ValueError, match="shows a video; blank pictures replace images only"):
        list(with_media(questions, reader, control="blank", seed=0))


def test_a_sample_that_cannot_be_shown_is_named(rows):
    questions, reader = find_questions([str(rows)])
    one = next(with_media(questions, reader, control="kept", seed=0))
    speaker = SimpleNamespace(renderer=Renderer(base(), image=ImageConfig(), video=VideoConfig(), chat=ChatConfig()))
    with pytest.raises(ValueError, match="sample 000000001: image 1 .*: not a readable image"):
        prompt_of(speaker, replace(one, images=[b"no image"] * 2))


# --- serve-check


def test_a_server_with_the_same_results_passes(rows, server, capsys, monkeypatch):
    words = ["serve-check", server.url, str(rows), "--model", str(base()), "--max-tokens", "8", "--tolerance", "0.001"]
    assert main([*words, "--json"]) == 0
    card = report(capsys)
    assert card["samples"] == 6
    assert card["compared"] == {"token ids": 6, "image grids": 9, "greedy text": 48, "log-probabilities": 48}
    assert card["farthest"] < 1e-4
    server.tells = {"logprobs"}
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "none  token ids          0 prompts compared, not returned for 6 samples" in shown
    server.tells = set()
    assert main(words) == 0
    server.enlarge = 4
    assert main([*words, "--samples", "4"]) == 3
    assert "token ids: the prompt takes" in capsys.readouterr().out
    other = {"choices": [{"message": {"content": "ab"}, "finish_reason": "stop"}]}
    monkeypatch.setattr(server, "complete", lambda body: other)
    assert main([*words, "--samples", "1"]) == 3
    assert "greedy text: from character 1 on it is 'ab' there" in capsys.readouterr().out


def test_other_image_sizes_are_named_first(rows, server, capsys):
    server.enlarge = 4
    words = ["serve-check", server.url, str(rows), "--model", str(base()), "--max-tokens", "2"]
    assert main(words) == 3
    shown = capsys.readouterr().out
    assert "FAIL  image grids" in shown
    assert "differences; the first: sample 00000000" in shown
    assert "tokens there, 70 here (grids here: 1x" in shown or "tokens there" in shown


def test_limits_of_the_models_folder_that_are_not_those_of_training_are_named(rows, server, capsys):
    words = ["serve-check", server.url, str(rows), "--model", str(base()), "--max-tokens", "2", "--samples", "2"]
    server.tells = set()
    assert main([*words, "--set", "data.image.min_tokens=4", "--set", "data.image.max_tokens=20"]) == 3
    shown = capsys.readouterr().out
    named = f"the processor files of {base()} say image_pixels 65,536 to 16,777,216, not 4,096 to 20,480 as in training"
    assert f"note  {named}" in shown
    assert re.search(rf"the prompt takes \d+ tokens there, \d+ here \(grids here: .*; {re.escape(named)}\)", shown)


def test_another_model_is_found_by_its_choices_and_log_probabilities(rows, server, capsys):
    server.model = copy.deepcopy(stock())
    with torch.no_grad():
        server.model.lm_head.weight[7] *= 3
    words = ["serve-check", server.url, str(rows), "--model", str(base()), "--max-tokens", "8", "--tolerance", "0.01"]
    assert main([*words, "--samples", "3", "--json"]) == 3
    card = report(capsys)
    topics = {one["topic"] for one in card["differences"]}
    assert "log-probabilities" in topics
    assert topics <= {"greedy text", "log-probabilities"}


def test_another_template_is_found_in_the_ids(rows, server, capsys, monkeypatch):
    complete = server.complete
    monkeypatch.setattr(server, "complete", lambda body: complete(body) | {"prompt_token_ids": [1, 2, 3]})
    words = ["serve-check", server.url, str(rows), "--model", str(base()), "--max-tokens", "2", "--samples", "1"]
    assert main(words) == 3
    assert "token ids: token 0 (media as one) is 1 (" in capsys.readouterr().out


# --- ask


def test_ask_streams_what_eval_would_answer(rows, tmp_path, capsys):
    image = str(rows.parent / "0.png")
    words = ["ask", str(base()), "What is it?", "--image", image, "--max-tokens", "5"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert report(capsys)["answers"] == [{"who": "model", "answer": text.removesuffix("\n")}]
    assert main([*words, "--system", "Be brief."]) == 0
    assert capsys.readouterr().out != text
    assert main([*words, "--compare"]) == 2
    assert "--compare compares an adapter with its base: give --adapter" in capsys.readouterr().err
    for question, flags, message in (
        (
            "<image> or <image>?",
            ["--image", image],
            "has 2 <image> marks, but --image is given 1 time. Give --image once",
        ),
        ("<video>?", [], "has 1 <video> mark, but --video is given 0 times"),
        ("<bbox>?", ["--image", image], "the question cannot be asked: objects.bbox has 0 "),
    ):
        assert main(["ask", str(base()), question, *flags]) == 2
        assert message in capsys.readouterr().err
    assert main(["ask", str(base()), "<image>?", "--image", "nowhere.png"]) == 2
    assert "nowhere.png" in capsys.readouterr().err


def test_unusable_arguments_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"messages": [{"role": "user", "content": "word " * 9000}, {"role": "assistant", "content": "ho"}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    data, url = str(tmp_path / "long.jsonl"), ["--url", "http://127.0.0.1:9/v1", "--name", "any"]
    local = ["--model", str(base()), "--max-tokens", "1"]
    for words, message in (
        (["eval", data, *local], "sample 000000001: the prompt takes"),
        (
            ["eval", data, *local, "--out", str(tmp_path / "no" / "a.jsonl")],
            "--out must be a file in a folder that exists",
        ),
        (["eval", data, *local, "--out", str(tmp_path)], "--out must be a file in a folder that exists"),
        (
            ["eval", data, *local, "--set", "context.yarn.factor=0.5"],
            "context.yarn.factor must be above 1, or unset, got 0.5",
        ),
        (["eval", data, *url, "--timeout", "0"], "--timeout must be a number of seconds above 0, got 0"),
        (
            ["serve-check", url[1], data, "--model", str(base()), "--tolerance", "-1"],
            "--tolerance must be at least 0, got -1.0",
        ),
        (["ask", str(base()), row["messages"][0]["content"]], "the prompt takes 18,0"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_a_silent_server_does_not_outlive_ctrl_c(tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 3
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(LIMIT_S)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        words = ["eval", "held.jsonl", "--url", url, "--name", "any"]
        started = subprocess.Popen(
            [sys.executable, "-m", "launchers.cli", *words],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            # a shell starts background processes with Ctrl-C ignored, and a child would inherit this
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        with silent.accept()[0]:
            started.send_signal(signal.SIGINT)
            errors = started.communicate(timeout=LIMIT_S)[1]
    assert started.returncode == 130
    assert errors.endswith("moetune eval: interrupted\n")
    assert "Traceback" not in errors
