"""The `data:` section. Loads no torch.

The text below a key explains it to users: docs/configuration.md and `moetune explain` are generated from it
(`finetune/settings/reference.py` describes how).
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of samples, by a name that you choose."""

    path: str
    """The samples. Shards: a tar, a folder of tars, or a pattern (`*`, `?`, `{000..012}`, `{a,b}`). Rows: a file
    (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.arrow`, `.zip`) or a folder of such files. Rows are converted into
    shards when they are first read, and again when they change. Shards may be in a store: `https://`, `s3://`,
    `gs://`, `az://` or `hf://datasets/`, or listed by url in a `.txt` file there.

    Change: always; it is the one key of a source that has no default. Convert large files with `moetune shards build`.
    With: `data.cache_dir` (the folder of converted files), `data.media_root` (where relative paths of media begin),
    `data.sources.<name>.map` (where columns have other names).
    """
    max_tokens: int | None = None
    """The most tokens of this source in an epoch, to within a sample. The next epoch goes on where this one ended, so
    every sample is read once before any is read again. `null`: no limit but the mixture's.

    Change: to keep a large source from outgrowing the others, or to stop at a published budget.
    With: `data.mixture` (`natural` or `tokens`; with `samples` it is an error), `data.sources.<name>.weight`.
    """
    map: dict[str, Any] = field(default_factory=dict)
    """The names of columns, where a data set calls them something else: `{question: query, image: [left, right]}`.
    Left is a column that moetune knows, right the data's own, or several; `a.b` is a key inside a column.

    Change: when the rows have no known shape; the message lists the shapes and their columns (docs/data-format.md).
    """
    config: str = ""
    """The part of a hub-style folder to read, such as one of Cauldron's sub-sets. Empty: the only one, or the default.

    Change: when the folder has several; the message lists them.
    With: `data.sources.<name>.split`.
    """
    split: str = ""
    """The split of a folder of rows to read. Empty: `train`, or the only one.

    Change: to train on another split.
    With: `data.sources.<name>.config`.
    """
    weight: float = 1.0
    """This source's share of an epoch relative to the other sources; only the ratios of the weights count.

    Change: to read a source more or less often than its size implies. A source is repeated, or read in part, to fit.
    With: `data.mixture` (the unit of the share; with `natural` any weight but 1 is an error),
    `stages.<name>.data.weights` (other shares in a stage).
    """


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Limits of the size of an image, in tokens. One token is 32 x 32 pixels in every model of the family."""

    min_tokens: int | None = None
    """The fewest tokens of an image; smaller images are enlarged. `null`: the limit of the base's
    preprocessor_config.json, 64 as released.

    Change: lower it when many images are small icons or crops, to save tokens.
    With: `data.image.max_tokens` (must not be smaller).
    """
    max_tokens: int | None = None
    """The most tokens of an image; larger images are scaled down, and keep their shape. `null`: the limit of the base's
    preprocessor_config.json, 16384 as released.

    Change: lower it to fit more images into a row; keep it high for small print, as in documents and screenshots. Serve
    the model with the same limit.
    With: `data.tokens_per_pack` (a sample must fit a row), `data.vision_tokens_per_pack`.
    """


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """The frames that are taken from a video, their size, and their form in the text."""

    fps: float = 2.0
    """Frames taken from each second of a video. 2 is the rate of the base's own processor.

    Change: raise it for fast motion, lower it for long videos. A record's own `fps` or `num_frames` wins.
    With: `data.video.min_frames`, `data.video.max_frames` (bounds of the resulting number of frames).
    """
    min_frames: int = 4
    """The fewest frames taken from one video, if it has that many.

    Change: raise it when your videos last one or two seconds.
    With: `data.video.max_frames` (must not be smaller).
    """
    max_frames: int = 768
    """The most frames that are taken from one video. If `fps` asks for more, they are spread over the complete video.

    Change: lower it to bound the tokens of long videos; raise it to see more of them. A record's own `max_frames` wins.
    With: `data.video.max_tokens` (more frames make each frame smaller).
    """
    min_tokens: int | None = None
    """The fewest tokens of a complete video; smaller ones are enlarged. `null`: the base's own limit, 2 as released.

    Change: hardly ever; raise it when small videos lose detail.
    With: `data.video.max_tokens` (must not be smaller).
    """
    max_tokens: int | None = None
    """The most tokens of a complete video; the frames of a larger one are reduced. `null`: the base's own limit, 12288
    as released.

    Change: lower it to fit more videos into a row, raise it for long videos with small detail.
    With: `data.tokens_per_pack` (a sample must fit a row), `data.video.max_tokens_per_frame`.
    """
    frame_cap: bool = True
    """Apply `max_tokens_per_frame` to each frame, as the authors' reference does.

    Change: to false when your server prepares videos with transformers, which applies no such limit unless
    `cap_pixels_per_frame` is passed.
    With: `data.video.max_tokens_per_frame`.
    """
    max_tokens_per_frame: int = 768
    """The most tokens of one frame if `frame_cap` is on. Two frames become one grid of this many tokens.

    Change: lower it to spend the tokens of a video on more frames, raise it for text and other detail in few frames.
    With: `data.video.frame_cap` (this key has no effect when it is false), `data.video.max_tokens`.
    """
    timestamps: Literal["seconds", "hms", "mixed"] = "seconds"
    """The form of the time before each pair of frames. `seconds`: `<3.0 seconds>`, as the base's processor does. `hms`:
    `<00:00:03>`. `mixed`: one or the other, fixed for each sample.

    Change: to `hms` when your answers use clock times; to `mixed` so that the model understands both.
    """
    layout: Literal["nested", "flat"] = "nested"
    """Vision marks around a video. `nested`: one more pair of marks around all pairs of frames, as transformers 5
    writes it. `flat`: no further marks, as in transformers 4.57.

    Change: to the form that your server writes; training and serving must agree. `moetune serve-check` compares them.
    """
    single_frame: Literal["double", "refuse"] = "double"
    """The treatment of a video with only one frame, as the model needs two. `double`: the frame is shown twice.
    `refuse`: the sample cannot be used.

    Change: to `refuse` to find pictures among your videos; make them images.
    With: `data.max_bad_samples` (counts refused samples).
    """
    timeout_seconds: float = 60.0
    """Seconds that decoding one video may take; after that the sample counts as unreadable.

    Change: raise it for long videos or slow disks.
    With: `data.max_bad_samples` (counts those samples), `data.stall_seconds` (should stay longer).
    """


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """The rendering of conversations as text. The template itself is the base's own."""

    thinking: Literal["train", "mask", "drop"] = "train"
    """The treatment of the thinking in an assistant's turn (`<think>...</think>`, or a record's `thinking`). `train`:
    it is in the text and learned. `mask`: it is in the text, without loss. `drop`: it is taken out.

    Change: to `mask` when only the answers are of good quality, to `drop` to train answers without thinking.
    """
    keep_control_tokens: tuple[str, ...] = ()
    """Special tokens of the base's tokenizer that stay special when an assistant's text contains them. All others are
    read as plain text, so that no text can open or close a turn.

    Change: when your answers must contain such tokens: `["<|box_start|>", "<|box_end|>"]`.
    """


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data and its packing into rows. Every quantity is global: none changes with the number of ranks."""

    packs_per_step: int = 32
    """Packed rows of one optimiser step, over all ranks together: the global batch. A micro-batch is one row, so
    gradients are accumulated over `packs_per_step / (ranks / sp)` rows on each rank.

    Change: this is the batch size. Published batches are 4 to 512 rows; LoRA bears large batches less well than full
    tuning does ("LoRA Without Regret").
    With: the ranks divided by `parallel.sp` (must divide it), `data.tokens_per_pack` (times this: tokens per step),
    `optim.lr`.
    """
    tokens_per_pack: int = 8192
    """The most tokens of a packed row. A row combines samples, each of which attends only to itself.

    Change: raise it when samples are longer, lower it when memory is short. To keep the tokens of a step, keep its
    product with `packs_per_step` constant.
    With: `data.overlong` (samples longer than a row), `parallel.sp` (shares a row over ranks), `parallel.recompute`.
    """
    vision_tokens_per_pack: int | None = None
    """The most tokens of images and videos in a row. `null`: only `tokens_per_pack` limits them.

    Change: set it when rows full of images need too much memory in the vision tower.
    With: `data.tokens_per_pack`, `data.overlong` (a sample above this limit does not fit either).
    """
    mixture: Literal["natural", "tokens", "samples"] = "natural"
    """How often each source is read. `natural`: every sample once per epoch. `tokens`: the sources' weights are shares
    of the tokens of an epoch. `samples`: they are shares of its samples.

    Change: to `tokens` or `samples` when one source is much larger than another that matters as much. Choose `tokens`
    when samples differ in length.
    With: `data.sources.<name>.weight` (read by `tokens` and `samples` only).
    """
    overlong: Literal["error", "skip", "split-turns"] = "error"
    """The treatment of samples that do not fit a row. `error`: the run ends before the first step, and names one.
    `skip`: they are left out and counted. `split-turns`: conversations are cut between turns into parts that fit.

    Change: to `skip` when a few samples are too long, to `split-turns` for long conversations.
    With: `data.tokens_per_pack`, `data.vision_tokens_per_pack` (the limits).
    """
    remainder: Literal["drop", "keep"] = "drop"
    """The treatment of rows at the end of an epoch that do not fill a step. `drop`: they are left out of this epoch;
    each epoch has another order. `keep`: the last step of the epoch is smaller.

    Change: to `keep` when the data fills only a few steps, or when every sample must be read in every epoch.
    With: `data.packs_per_step` (with `drop`, at least that many rows are needed).
    """
    balance_steps: int = 32
    """Number of steps whose rows are sorted by cost, so that a step has rows of similar cost and ranks wait less for
    each other. 0: rows are only shuffled.

    Change: raise it when rows differ greatly in cost and there are many steps; set 0 for a plain random order.
    """
    pad_multiple: int = 1
    """Rows are padded to a multiple of this many tokens. 1: no padding.

    Change: only for a kernel that needs a certain multiple. Padding costs time and is never counted as useful tokens.
    """
    workers: int = 2
    """Processes of each rank that read and prepare rows. 0: the rank itself prepares them, between steps.

    Change: raise it when ranks wait for data (`seconds_data` in `metrics.jsonl`), as with video. Each rank of a node
    starts this many.
    With: `data.prefetch` (rows that each worker keeps ready).
    """
    prefetch: int = 2
    """Rows that each worker prepares in advance.

    Change: raise it when reading times vary greatly; lower it when host memory is short.
    With: `data.workers` (0: nothing is prefetched).
    """
    max_bad_samples: int = 100
    """Samples that may be left out because they cannot be used or read; each is named. One more ends the run.

    Change: to 0 for data that must be complete; raise it for scraped data. `moetune shards check` lists them before.
    """
    stall_seconds: float = 420.0
    """Longest wait of a rank for a row, in seconds. After it the rank ends, and names the samples being read. 0: no
    limit. Seven minutes let a shared disk recover.

    Change: raise it for media behind slow servers.
    With: `run.stall_seconds` (should stay longer, so that the rank without data is named before those that wait for
    it), `data.workers` (without workers only `run.stall_seconds` applies).
    """
    media_root: str = ""
    """The folder in which relative paths of media begin, and which no path may leave. Empty: paths begin at the folder
    of the shards, or of the file of rows, and may lead anywhere.

    Change: when media are stored apart from the rows, and for rows from others, which could name any of your files.
    """
    allow_private_addresses: bool = False
    """Allow urls of media with addresses that are not public. The author of a row decides what this machine requests,
    so the default is false.

    Change: to true when media are served inside your own network, and you trust the rows.
    """
    cache_dir: str = ""
    """The folder for indexes of shards and for converted files. Empty: next to the data.

    Change: when the data's folder is not writable. For several nodes it should be on a disk that all of them share.
    Shards of a store need it: they are kept there, too.
    With: `data.cache_gb`.
    """
    cache_gb: float = 100.0
    """The most gigabytes of shards that are kept of stores (`https://`, `s3://` and the like), in `data.cache_dir`. The
    shard whose next use is furthest is removed first. All processes that share the folder have one limit, the last set.

    Change: to what the disk can spare. At best it holds all shards; it must hold those that are read at a time.
    With: `data.cache_dir`, `data.balance_steps` (more shards are read at a time).
    """
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    image: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
