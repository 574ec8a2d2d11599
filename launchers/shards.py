"""`moetune shards`: make shards from a file of rows, and look at shards in every way."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.arguments import media_places, place_arguments, positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data.render.sample import Renderer
    from data.shards.lengths import Lengths
    from data.stream.stats import Histogram

EXAMPLE = """\
  moetune shards build train.jsonl --out shards/train --jobs 8      # ms-swift, LLaMA-Factory, OpenAI, Qwen rows
  moetune shards index shards/train --jobs 8
  moetune shards check shards/train --base Qwen3-VL-30B-A3B --tokens-per-pack 8192
  moetune shards show shards/train/train-000000.tar --key 000000007 --base Qwen3-VL-30B-A3B --sheet seen.png
  moetune shards stats shards/train --base Qwen3-VL-30B-A3B --context 8192
  moetune shards split shards/train --out shards/parts --part train=0.95 --part held-out=0.05 --by group"""

EXIT_CODES = {3: "`build` refused more rows than --max-rejects, or `index` or `check` found problems"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of every subcommand."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, about: str, paths: str = "shards: a tar, a folder or a pattern") -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.add_argument("path", metavar="PATH", help=paths)
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output")
        place_arguments(sub)
        sub.add_argument("--cache-dir", type=Path, metavar="DIR", help="for indexes, where PATH cannot be written")
        return sub

    build = action("build", "convert a .jsonl or .json file into shards; run again to go on", "a .jsonl or .json file")
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    build.add_argument("--name", default="part", help="what shard names begin with (default: part)")
    build.add_argument("--samples-per-shard", type=positive, default=1000, metavar="N", help="default 1000")
    build.add_argument("--media", choices=("embed", "reference"), default="embed", help="into the shards, or by path")
    build.add_argument("--max-rejects", type=int, default=0, metavar="N", help="more refused rows give exit code 3")
    index = action("index", "write the index beside each shard")
    index.add_argument("--base", type=Path, metavar="DIR", help="base model: tokens are counted and kept too")
    index.add_argument("--force", action="store_true", help="even where there is one already")
    check = action("check", "find everything that is wrong with shards; exit code 3 when there is something")
    check.add_argument("--base", type=Path, metavar="DIR", help="base model: samples are rendered as in training")
    check.add_argument("--tokens-per-pack", type=positive, metavar="N", help="report longer samples; needs --base")
    check.add_argument("--fast", action="store_true", help="headers of media only, no pixels")
    show = action("show", "print a sample with its supervised part marked", "a shard")
    show.add_argument("--key", help="key of the sample (default: the shard's first)")
    show.add_argument("--base", type=Path, required=True, metavar="DIR", help="base model")
    show.add_argument("--sheet", type=Path, metavar="PNG", help="write images, boxes and frames as the model sees them")
    stats = action("stats", "histograms of tokens, images and videos")
    stats.add_argument("--base", type=Path, required=True, metavar="DIR", help="base model")
    stats.add_argument("--context", type=positive, default=8192, metavar="N", help="share of samples above (8192)")
    split = action("split", "copy into parts that share no group")
    split.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the parts")
    split.add_argument("--part", action="append", required=True, metavar="NAME=SHARE", help="give it for every part")
    split.add_argument("--by", default="group", help="group (default), or key for samples that stand alone")
    split.add_argument("--seed", type=int, default=0, help="another seed, another split (default 0)")
    for sub in (build, index):
        sub.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes (default 1)")


def run(args: argparse.Namespace) -> int:
    """Do what ACTION says."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "build": _build,
        "index": _index,
        "check": _check,
        "show": _show,
        "stats": _stats,
        "split": _split,
    }
    return actions[args.action](args)


def _shards(args: argparse.Namespace) -> list[Path]:
    from data.stream.corpus import find_shards

    return find_shards(args.path, "PATH")


def _renderer(base: Path) -> "Renderer":
    from data.config import ChatConfig, ImageConfig, VideoConfig
    from data.render.sample import Renderer

    return Renderer(base, image=ImageConfig(), video=VideoConfig(), chat=ChatConfig())


def _print(args: argparse.Namespace, answer: dict[str, Any], *lines: str) -> None:
    from data.format.printable import printable

    print(json.dumps(answer, default=str) if args.json else printable("\n".join(lines)))


def _build(args: argparse.Namespace) -> int:
    from data.prepare.build import BuildOptions, build_shards
    from data.prepare.convert import REJECTS
    from data.prepare.progress import Progress, count_rows

    options = BuildOptions(
        name=args.name,
        samples_per_shard=args.samples_per_shard,
        media=args.media,
        media_root=str(args.media_root or ""),
        allow_private=args.allow_private_addresses,
    )
    source = Path(args.path)
    progress = Progress(source.name, count_rows(source)) if source.is_file() else None
    report = build_shards(source, args.out, options, jobs=args.jobs, progress=progress)
    lines = [f"{report.written} samples in {len(report.shards)} shards under {args.out}, {report.reused} of them kept"]
    if report.rejected:
        lines.append(f"{report.rejected} rows refused, reasons in {args.out / REJECTS}")
    lines += [f"column {name!r} of {rows} rows is not read" for name, rows in sorted(report.ignored.items())]
    _print(args, asdict(report), *lines)
    return 3 if report.rejected > args.max_rejects else 0


def _index(args: argparse.Namespace) -> int:
    from functools import partial

    from data.format.printable import one_line
    from data.shards.pool import worker_pool
    from data.shards.reader import load_index

    shards = _shards(args)
    make = partial(load_index, cache_dir=args.cache_dir, force=args.force, places=media_places(args))
    if args.jobs > 1:
        with worker_pool(args.jobs) as pool:
            indexes = list(pool.map(make, shards))
    else:
        indexes = [make(shard) for shard in shards]
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
        f"{samples} samples in {len(shards)} shards indexed, {len(problems)} of them cannot be used",
        *map(one_line, problems),
    ]
    _print(args, {"shards": len(shards), "samples": samples, "problems": problems}, *lines)
    return 3 if problems else 0


def _lengths(args: argparse.Namespace, shards: "Sequence[Path]") -> "list[Lengths]":
    from data.stream.corpus import measure_all

    return measure_all(shards, _renderer(args.base), args.cache_dir, args.jobs, places=media_places(args))


def _check(args: argparse.Namespace) -> int:
    from data.format.printable import one_line
    from data.prepare.audit import AuditOptions, audit_shards

    if args.tokens_per_pack and not args.base:
        raise ValueError("--tokens-per-pack needs --base: without its tokenizer no length is known")
    shards = _shards(args)
    options = AuditOptions(
        renderer=_renderer(args.base) if args.base else None,
        tokens_per_pack=args.tokens_per_pack,
        decode=not args.fast,
        cache_dir=args.cache_dir,
        places=media_places(args),
    )
    findings = []
    for finding in audit_shards(shards, options):
        findings.append(finding)
        if not args.json:
            print(one_line(str(finding)))
    _print(
        args,
        {"findings": [asdict(finding) for finding in findings]},
        f"{len(findings)} problems in {len(shards)} shards",
    )
    return 3 if findings else 0


def _show(args: argparse.Namespace) -> int:
    from data.config import VideoConfig
    from data.prepare.show import contact_sheet, marked_text, sample_tiles
    from data.shards.reader import SampleReader

    shard = _shards(args)[0]
    reader = SampleReader(cache_dir=args.cache_dir, places=media_places(args))
    index = reader.index(shard)
    if not len(index):
        raise ValueError(f"shard {shard} holds no sample")
    key = args.key if args.key is not None else index.keys[0]
    if key not in index.keys:
        raise ValueError(
            f"shard {shard} has no sample {key!r}; its keys run from {index.keys[0]!r} to {index.keys[-1]!r}"
        )
    number = index.keys.index(key)
    record, members = reader.sample(shard, number)
    sample = _renderer(args.base).build(record, *reader.media(record, members, shard.parent), key=key)
    text = marked_text(sample, args.base)
    supervised = int((sample.loss_weights > 0).sum())
    counts = f"{len(sample.input_ids)} tokens, {supervised} supervised, {len(record.images)} images, "
    counts += f"{len(record.videos)} videos"
    if args.sheet:
        tiles = list(sample_tiles(sample, record, index, number, base=args.base, video=VideoConfig()))
        contact_sheet(tiles).save(args.sheet)
    answer = {"key": key, "text": text, "tokens": len(sample.input_ids), "supervised": supervised, "sheet": args.sheet}
    _print(args, answer, f"{shard.name} {key}: {counts}", *sample.notes, text)
    return 0


def _stats(args: argparse.Namespace) -> int:
    from data.stream.stats import shard_stats

    stats = shard_stats(
        _shards(args),
        _renderer(args.base),
        context=args.context,
        cache_dir=args.cache_dir,
        places=media_places(args),
    )
    lines = [f"{stats.samples} samples ({stats.unusable} unusable), {stats.images} images, {stats.videos} videos"]
    for histogram in stats.histograms:
        lines += _bars(histogram) if sum(histogram.counts) else []
    lines.append(
        f"above {stats.context} tokens: {stats.above_context:.2%} of samples, "
        f"{stats.tokens_above_context:.2%} of tokens"
    )
    _print(args, asdict(stats), *lines)
    return 0


def _bars(histogram: "Histogram") -> list[str]:
    head = f"{histogram.name}: {histogram.total:,.0f} {histogram.unit} in all, median {histogram.median:,.1f}, "
    lines = ["", head + f"99 % below {histogram.p99:,.1f}, largest {histogram.largest:,.1f}"]
    most = max(histogram.counts)
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        lines.append(f"{low:>10g} to {high:<10g} {count:>9} {'#' * round(40 * count / most)}")
    return [*lines, ""]


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
        places=media_places(args),
    )
    lines = [f"{name}: {report.samples[name]} samples, {report.groups[name]} groups" for name in shares]
    lines += [f"left out as unusable: {report.left_out}"] if report.left_out else []
    _print(args, asdict(report), *lines)
    return 0


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()
