"""`moetune ask`: ask a base, a base with its adapter, or a merged model one question, with images and videos."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.arguments import load_speaker, model_arguments, positive

if TYPE_CHECKING:
    from data.format.record import Record
    from data.shards.bytes import VideoBytes
    from finetune.ask.speaker import Speaker

EXAMPLE = """\
  moetune ask base "Which digit is this?" --image 7.png --adapter runs/digits/adapter --compare
  moetune ask merged "What happens between <video> and <video>?" --video a.mp4 --video b.mp4 --max-tokens 512
  moetune ask Qwen/Qwen3-VL-30B-A3B-Instruct "Read the total." --image bill.jpg --set data.image.max_tokens=2048"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("model", metavar="MODEL", help="a base or merged model: a folder or a hub id")
    parser.add_argument("text", metavar="TEXT", help="the question; <image> and <video> mark the places of media in it")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="file or URL of an image; may be repeated"
    )
    parser.add_argument(
        "--video", action="append", default=[], metavar="FILE", help="file or URL of a video; may be repeated"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="system message before the question")
    model_arguments(parser)
    parser.add_argument("--compare", action="store_true", help="print the base's answer first, then the adapter's")
    parser.add_argument("--max-tokens", type=positive, default=512, help="longest answer, in tokens (default 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) always takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default 0)")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, once the answer is complete"
    )


def run(args: argparse.Namespace) -> int:
    """Load the model, ask, and print the answer as it is written."""
    if args.compare and args.adapter is None:
        raise ValueError("--compare compares an adapter with its base: give --adapter")
    record, images, videos = question(args.text, args.image, args.video, system=args.system)
    answers = []
    for model, pieces in _answers(args, record, images, videos):
        if args.compare and not args.json:
            print(f"{model}:", flush=True)
        text = ""
        for piece in pieces:
            text += piece
            if not args.json:
                print(piece, end="", flush=True)
        if not args.json:
            print()
        answers.append({"who": model, "answer": text})
    if args.json:
        print(json.dumps({"answers": answers}, indent=2, ensure_ascii=False))
    return 0


def question(
    text: str, images: list[str], videos: list[str], *, system: str = ""
) -> tuple["Record", list[bytes], list["VideoBytes"]]:
    """Return the record of one question, and the bytes of its media; media without marks go before the text."""
    from data.format.printable import count_of
    from data.format.record import RecordError, parse_record
    from data.rows.convert import convert_row
    from data.shards.bytes import Places
    from data.shards.reader import SampleReader

    for name, words in (("image", images), ("video", videos)):
        marks = text.count(f"<{name}>")
        if marks and marks != len(words):
            has, given = count_of(marks, f"<{name}> mark"), count_of(len(words), "time")
            raise ValueError(
                f"the question has {has}, but --{name} is given {given}. Give --{name} once for each mark, in their "
                f"order; without marks, all media go before the text"
            )
    row: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    if system:
        row["system"] = system
    row |= {name: [_place(word) for word in words] for name, words in (("images", images), ("videos", videos)) if words}
    try:
        record = parse_record(convert_row(row)[0], shard="command line", key="question")
    except RecordError as error:
        raise ValueError(f"the question cannot be asked: {error.reason}") from error
    return record, *SampleReader(places=Places(allow_private=True)).media(record, {}, Path())


def _place(word: str) -> dict[str, str]:
    """Return the place of an image or a video, as in a row."""
    return {"url": word} if word.startswith(("http://", "https://")) else {"path": str(Path(word).absolute())}


def _answers(
    args: argparse.Namespace, record: "Record", images: list[bytes], videos: list["VideoBytes"]
) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield each model's name and the pieces of its answer.

    If the adapter can be switched off completely, that gives the base; else the base is loaded by itself.
    """
    from finetune.ask.speaker import Sampling

    sampling = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)

    def stream(speaker: "Speaker") -> Iterator[str]:
        prompt = speaker.renderer.build(record, images, videos, key="question", prompt=True)
        return speaker.stream(speaker.require_room(prompt), sampling)

    speaker = load_speaker(args.model, args, adapter=args.adapter)
    if args.compare and speaker.switches:
        with speaker.base_alone():
            yield "base", stream(speaker)
    elif args.compare:
        yield "base", stream(load_speaker(args.model, args, adapter=None))
    yield ("adapted" if args.adapter else "model"), stream(speaker)
