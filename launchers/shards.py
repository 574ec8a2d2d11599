"""`moetune shards`: build shards from a file of rows; index, check, show, count, split and compare shards."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.format.printable import count_of, one_line, printable
from launchers.arguments import mapped_columns, media_places, place_arguments, positive
from launchers.shards_build import build, build_arguments
from launchers.shards_reports import declare_mix, declare_overlap, mix, overlap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data.prepare.audit import Finding
    from data.render.sample import Renderer
    from data.shards.bytes import Places
    from data.shards.lengths import Lengths
    from data.shards.reader import SampleReader
    from data.stream.stats import Histogram

EXAMPLE = """\
  moetune shards build train.parquet --out shards/train --jobs 8    # or .jsonl, .csv, a data set's folder, ...
  moetune shards index shards/train --jobs 8
  moetune shards check shards/train --base Qwen3-VL-30B-A3B --tokens-per-pack 8192
  moetune shards show shards/train/train-000000.tar --key 000000007 --base Qwen3-VL-30B-A3B --sheet seen.png
  moetune shards stats shards/train --base Qwen3-VL-30B-A3B --context 8192
  moetune shards split shards/train --out shards/parts --part train=0.95 --part held-out=0.05 --by document_id
  moetune shards overlap shards/train shards/held-out --jobs 8      # contamination of an evaluation
  moetune shards mix qwen3-vl-30b-a3b-lora model.path=/models/30b data.sources.general.path=shards/train"""

SHOWN = 3
"""Samples that `check` names for each kind of finding, without --all."""

EXIT_CODES = {
    3: "`build` refused more rows than --max-rejects, `index` or `check` found problems, or `overlap` more than --limit"
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of every subcommand."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, about: str, paths: str = "shards: a tar, a folder or a pattern") -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.add_argument("path", metavar="PATH", help=paths)
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output")
        place_arguments(sub)
        sub.add_argument(
            "--map",
            action="append",
            default=[],
            metavar="NAME=COLUMN",
            help="read a known column from a column or a tar's member with another name (data.sources.<name>.map); "
            "COLUMN,COLUMN reads several",
        )
        sub.add_argument(
            "--cache-dir", type=Path, metavar="DIR", help="folder for indexes, if the folder of PATH is not writable"
        )
        return sub

    rows = action(
        "build", "convert rows of any known shape into shards; run it again to continue", "a file or a folder of rows"
    )
    build_arguments(rows)
    index = action("index", "write an index next to each shard")
    index.add_argument("--base", type=Path, metavar="DIR", help="base model, to count the tokens of each sample too")
    index.add_argument("--force", action="store_true", help="replace existing indexes")
    check = action("check", "find all problems of shards; exit code 3 if there is an error")
    check.add_argument("--base", type=Path, metavar="DIR", help="base model, to render samples as in training")
    check.add_argument(
        "--tokens-per-pack", type=positive, metavar="N", help="report samples with more tokens; needs --base"
    )
    check.add_argument("--fast", action="store_true", help="read only the headers of media, not the pixels")
    check.add_argument("--all", action="store_true", help="print every finding, not just a few samples of each kind")
    show = action("show", "print a sample with its supervised part marked")
    show.add_argument("--key", help="key or id of the sample (default: the first of the shard)")
    show.add_argument("--base", type=Path, required=True, metavar="DIR", help="base model")
    show.add_argument("--sheet", type=Path, metavar="PNG", help="write images, boxes and frames as the model sees them")
    stats = action("stats", "print histograms of tokens, images and videos")
    stats.add_argument("--base", type=Path, required=True, metavar="DIR", help="base model")
    stats.add_argument(
        "--context",
        type=positive,
        default=8192,
        metavar="N",
        help="print the share of samples with more than N tokens (default 8192)",
    )
    split = action("split", "copy shards into parts that share no group")
    split.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the parts")
    split.add_argument(
        "--part", action="append", required=True, metavar="NAME=SHARE", help="a part and its share; give one per part"
    )
    split.add_argument(
        "--by",
        default="group",
        metavar="COLUMN",
        help="column of the rows; samples with the same value stay together. key: every sample by itself "
        "(default: group)",
    )
    split.add_argument("--seed", type=int, default=0, help="another seed gives another split (default 0)")
    declare_overlap(action)
    declare_mix(actions)
    for sub in (rows, index):
        sub.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes (default 1)")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "build": _build,
        "index": _index,
        "check": _check,
        "show": _show,
        "stats": _stats,
        "split": _split,
        "overlap": lambda args: overlap(args, _places(args, args.eval)),
        "mix": mix,
    }
    return actions[args.action](args)


def _places(args: argparse.Namespace, *others: str) -> "Places":
    """Return the places of media, and how the members of the shards of PATH and of other sources are named."""
    from dataclasses import replace

    mapped = mapped_columns(args).text
    return replace(media_places(args), maps=tuple((path, mapped) for path in (args.path, *others) if mapped))


def _shards(args: argparse.Namespace) -> list[Path]:
    from data.shards.find import find_shards

    return find_shards(args.path, "PATH", cache_dir=args.cache_dir)


def _renderer(base: Path) -> "Renderer":
    from data.config import ChatConfig, ImageConfig, VideoConfig
    from data.render.sample import Renderer

    return Renderer(base, image=ImageConfig(), video=VideoConfig(), chat=ChatConfig())


def _print(args: argparse.Namespace, answer: dict[str, Any], *lines: str) -> None:

    print(json.dumps(answer, default=str) if args.json else printable("\n".join(lines)))


def _build(args: argparse.Namespace) -> int:
    answer, lines, refused = build(args)
    _print(args, answer, *lines)
    return 3 if refused > args.max_rejects else 0


def _index(args: argparse.Namespace) -> int:
    from functools import partial

    from data.prepare.progress import Progress
    from data.shards.pool import worker_pool
    from data.shards.reader import load_index

    shards = _shards(args)
    make = partial(load_index, cache_dir=args.cache_dir, force=args.force, places=_places(args))
    with Progress("indexed", len(shards), unit="shards") as progress:
        if args.jobs > 1:
            with worker_pool(args.jobs) as pool:
                indexes = list(progress.over(pool.map(make, shards)))
        else:
            indexes = list(progress.over(map(make, shards)))
    problems = [
        f"shard {shard}, sample {index.keys[number]}: {reason}"
        for shard, index in zip(shards, indexes, strict=True)
        for number, reason in index.problems.items()
    ]
    if args.base:
        problems += [
            f"shard {shard}, sample {index.keys[number]}: {reason}"
            for shard, index, lengths in zip(shards, indexes, _lengths(args, shards), strict=True)
            for number, reason in lengths.problems.items()
            if number not in index.problems
        ]
    samples = sum(map(len, indexes))
    lines = [
        f"{count_of(samples, 'sample')} in {count_of(len(shards), 'shard')} indexed, {len(problems)} cannot be used",
        *map(one_line, problems),
    ]
    _print(args, {"shards": len(shards), "samples": samples, "problems": problems}, *lines)
    return 3 if problems else 0


def _lengths(args: argparse.Namespace, shards: "Sequence[Path]") -> "list[Lengths]":
    from data.stream.corpus import measure_all

    return measure_all(shards, _renderer(args.base), args.cache_dir, args.jobs, places=_places(args))


def _check(args: argparse.Namespace) -> int:
    from data.prepare.audit import AuditOptions, audit_shards, by_kind
    from data.prepare.progress import Progress

    if args.tokens_per_pack and not args.base:
        raise ValueError("--tokens-per-pack needs --base, whose tokenizer gives the lengths")
    shards = _shards(args)
    options = AuditOptions(
        renderer=_renderer(args.base) if args.base else None,
        tokens_per_pack=args.tokens_per_pack,
        decode=not args.fast,
        cache_dir=args.cache_dir,
        places=_places(args),
    )
    with Progress("checked", len(shards), unit="shards") as progress:
        note = lambda done, samples: progress(done, count_of(samples, "sample"))  # noqa: E731
        findings = list(audit_shards(shards, options, note))
    errors = [finding for finding in findings if finding.level == "error"]
    if args.all:
        lines = [f"{finding.level}: {one_line(str(finding))}" for finding in findings]
    else:
        lines = [line for group in by_kind(findings) for line in _group_lines(group)]
    warnings = len(findings) - len(errors)
    lines.append(
        f"{count_of(len(errors), 'error')} and {count_of(warnings, 'warning')} in {count_of(len(shards), 'shard')}"
    )
    if not args.base:
        lines.append(
            "not checked without --base: the chat template, numbers of tokens, the frames in a range of a video"
        )
    _print(args, {"findings": [asdict(finding) for finding in findings]}, *lines)
    return 3 if errors else 0


def _group_lines(group: "Sequence[Finding]") -> list[str]:
    """Return the lines of one kind of finding: a single one, or the first one's reason with a few of the samples."""
    from finetune.ranks.log import listed

    first = group[0]
    if len(group) == 1:
        return [f"{first.level}: {one_line(str(first))}"]
    noun = "sample" if first.key else "shard"
    places = [one_line(f"{Path(item.shard).name} {item.key}".strip()) for item in group]
    return [
        f"{first.level}: {count_of(len(group), noun)}, the first: {one_line(first.reason)}",
        f"    {listed(places, SHOWN)}" + (" (--all lists them)" if len(group) > SHOWN else ""),
    ]


def _show(args: argparse.Namespace) -> int:
    from data.config import VideoConfig
    from data.prepare.show import contact_sheet, marked_text, sample_tiles
    from data.shards.reader import SampleReader

    reader = SampleReader(cache_dir=args.cache_dir, places=_places(args))
    shard, number = _find_sample(args.key, _shards(args), reader)
    index = reader.index(shard)
    record, members = reader.sample(shard, number)
    key = index.keys[number]
    sample = _renderer(args.base).build(record, *reader.media(record, members, shard.parent), key=key)
    text = marked_text(sample, args.base)
    supervised = int((sample.loss_weights > 0).sum())
    counts = f"{count_of(len(sample.input_ids), 'token')}, {supervised:,} supervised, "
    counts += f"{count_of(len(record.images), 'image')}, {count_of(len(record.videos), 'video')}"
    if args.sheet:
        tiles = list(sample_tiles(sample, record, index, number, base=args.base, video=VideoConfig()))
        contact_sheet(tiles).save(args.sheet)
    answer = {"key": key, "text": text, "tokens": len(sample.input_ids), "supervised": supervised, "sheet": args.sheet}
    _print(args, answer, f"{shard.name} {key}: {counts}", *sample.notes, text)
    return 0


def _find_sample(word: str | None, shards: "Sequence[Path]", reader: "SampleReader") -> tuple[Path, int]:
    """Return the shard and number of the sample with this key or id; None means the first sample."""
    from finetune.ranks.log import listed

    if word is None:
        if not len(reader.index(shards[0])):
            raise ValueError(f"shard {shards[0]} contains no samples")
        return shards[0], 0
    for shard in shards:
        if word in (keys := reader.index(shard).keys):
            return shard, keys.index(word)
    for shard in shards:
        index = reader.index(shard)
        for number in range(len(index)):
            if number not in index.problems and reader.record(shard, number).id == word:
                return shard, number
    keys = reader.index(shards[0]).keys or ("no key",)
    raise ValueError(f"no sample has the key or id {word!r}; {shards[0]} has {listed(keys, SHOWN)}")


def _stats(args: argparse.Namespace) -> int:
    from data.prepare.progress import Progress
    from data.stream.stats import shard_stats

    shards = _shards(args)
    with Progress("measured", len(shards), unit="shards") as progress:
        stats = shard_stats(
            shards,
            _renderer(args.base),
            context=args.context,
            cache_dir=args.cache_dir,
            places=_places(args),
            progress=lambda done, samples: progress(done, count_of(samples, "sample")),
        )
    lines = [
        f"{count_of(stats.samples, 'sample')} ({stats.unusable:,} unusable), {count_of(stats.images, 'image')}, "
        f"{count_of(stats.videos, 'video')}"
    ]
    for histogram in stats.histograms:
        lines += _bars(histogram) if histogram.total else []
    lines.append("")
    lines.append(
        f"above {count_of(stats.context, 'token')}: {stats.above_context:.2%} of samples, "
        f"{stats.tokens_above_context:.2%} of tokens"
    )
    _print(args, asdict(stats), *lines)
    return 0


def _bars(histogram: "Histogram") -> list[str]:
    head = f"{histogram.name}: {_figure(histogram.total)} {histogram.unit} in all, median {_figure(histogram.median)}, "
    lines = ["", head + f"99 % below {_figure(histogram.p99)}, largest {_figure(histogram.largest)}"]
    most = max(histogram.counts)
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        lines.append(f"{low:>10g} to {high:<10g} {count:>9} {'#' * round(40 * count / most)}")
    return lines


def _figure(value: float) -> str:
    """Return a number rounded to an integer from 100 on, else to three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _split(args: argparse.Namespace) -> int:
    from data.prepare.split import split_shards

    shares = {}
    for part in args.part:
        name, equals, share = part.partition("=")
        if not equals or not name.isidentifier() and not name.replace("-", "").isalnum() or not _is_number(share):
            raise ValueError(f"--part is {part!r}; write NAME=SHARE, such as held-out=0.05")
        shares[name] = float(share)
    report = split_shards(
        _shards(args),
        args.out,
        shares,
        by=args.by,
        seed=args.seed,
        cache_dir=args.cache_dir,
        places=_places(args),
    )
    lines = [
        f"{name}: {count_of(report.samples[name], 'sample')}, {count_of(report.groups[name], 'group')}"
        for name in shares
    ]
    if report.alone:
        lines.append(
            f"{count_of(report.alone, 'sample')} without a value of {args.by!r}: each is its own group. The first: "
            f"{report.first_alone}"
        )
    lines += [f"{count_of(report.left_out, 'unusable sample')} left out"] if report.left_out else []
    _print(args, asdict(report), *lines)
    return 0


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()
