"""Renders one sample: its record and the bytes of its media become the arrays of a pack.

`count_text` and `count_vision` need no pixels; their sum is exactly the length of what `build` returns.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from data.config import ChatConfig, ImageConfig, VideoConfig
from data.format.facts import ImageFacts, VideoFacts, VisionCount
from data.format.fields import redact
from data.format.media import Place
from data.format.record import Record
from data.render.chat import render_record
from data.render.fingerprint import RULES, files_fingerprint
from data.render.frames import decode_images, open_video, video_patches
from data.render.image import decode_image, probe_image
from data.render.positions import sample_positions
from data.render.spelled import spelled_parts
from data.render.template import read_template
from data.render.timestamps import Stamps, box_texts, video_text
from data.render.tokens import Tokens, tokenise, widen
from data.render.video import Grid, VideoPlan, check_video, frame_list_facts, plan_video
from data.render.vision import (
    grid_tokens,
    image_grid,
    image_limits,
    image_patches,
    read_spec,
)

_IMAGE_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """T tokens of one sample. Images and videos are kept apart, each in order of appearance."""

    key: str
    shard: str = ""
    source: str = ""
    input_ids: Array  # int32 [T]
    loss_weights: Array  # float32 [T], of the token as a label: predicted from those before it; 0 for the first
    positions: Array  # int32 [4, T]: data/render/positions.py
    image_patches: Array  # uint8 [P, 3 * patch * patch], one frame; the device repeats it
    image_grids: Array  # int32 [images, 3]
    video_patches: Array  # uint8 [P, 3 * temporal * patch * patch]
    video_grids: Array  # int32 [videos, 3]
    notes: tuple[str, ...] = ()  # for the user, for instance that a video has fewer frames than requested


class Renderer:
    """Renders samples for one base model. Cheap to send to worker processes."""

    def __init__(self, folder: Path, *, image: ImageConfig, video: VideoConfig, chat: ChatConfig) -> None:
        if not (folder / "tokenizer_config.json").is_file():
            raise ValueError(f"{folder} has no tokenizer_config.json; give the folder of a Qwen3-VL base model")
        self._image, self._video = image, video
        self._stamps: Stamps = video.timestamps
        self._chat = chat
        self._spec = read_spec(folder)
        self._limits = image_limits(self._spec, image)
        check_video(video, spec=self._spec)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._template = read_template(folder, self._tokenizer, chat)
        self._image_pad, self._video_pad, self.pad_id = (
            self._token_id(folder, token) for token in ("<|image_pad|>", "<|video_pad|>", "<|endoftext|>")
        )
        area = 3 * self._spec.patch**2
        self.patch_widths = (area, area * self._spec.temporal)  # values in one patch of an image, of a video
        words = [RULES, self._tokenizer.backend_tokenizer.to_str(), self._template.source, asdict(chat)]
        seen = {name: value for name, value in asdict(video).items() if name != "timeout_seconds"}
        self.text_fingerprint = _digest([*words, seen])
        self.fingerprint = _digest([*words, seen, asdict(image), asdict(self._spec)])
        self.files_fingerprint = files_fingerprint(folder, image=image, video=video, chat=chat)

    def with_stamps(self, form: Stamps) -> "Renderer":
        """Return a renderer for a probe, which writes the times of frames in another form, or leaves them out."""
        other = copy.copy(self)
        other._stamps = form
        return other

    def _token_id(self, folder: Path, token: str) -> int:
        number = self._tokenizer.get_added_vocab().get(token)
        if number is None:
            raise ValueError(f"{folder}: the tokenizer has no token {token}; give the folder of a Qwen3-VL base model")
        return int(number)

    def count_text(self, record: Record, images: Sequence[ImageFacts], videos: Sequence[VideoFacts]) -> int:
        """Count all tokens except those of patches; marks and timestamps are included."""
        tokens = self._tokens(record, images, self._plans(record, videos))
        return int(np.count_nonzero(tokens.kinds == 0))

    def count_vision(self, record: Record, images: Sequence[ImageFacts], videos: Sequence[VideoFacts]) -> VisionCount:
        """Count the tokens that stand for patches, and the patches, by arithmetic alone."""
        grids = [*self._grids(record, images), *(plan.grid for plan in self._plans(record, videos))]
        patches = sum(t * rows * columns for t, rows, columns in grids)
        return VisionCount(tokens=patches // self._spec.merge**2, patches=patches)

    def vision_positions(self, record: Record, images: Sequence[ImageFacts], videos: Sequence[VideoFacts]) -> int:
        """Return how far images and videos advance the positions: the longer side of each image and frame pair."""
        grids = [*self._grids(record, images), *(plan.grid for plan in self._plans(record, videos))]
        return sum(t * max(rows, columns) // self._spec.merge for t, rows, columns in grids)

    def build(
        self,
        record: Record,
        images: Sequence[bytes],
        videos: Sequence[bytes | Sequence[bytes]],
        *,
        key: str,
        shard: str = "",
        prompt: bool = False,
    ) -> Sample:
        """Render a sample. Raise a ValueError that names the image or video if the record or its media are unusable.

        With `prompt` the sample ends with the opening of the assistant's next turn, for a model to continue.
        """
        image_facts, image_patches_of = self._read_images(record, images)
        plans, video_patches_of = self._read_videos(record, videos)
        grids = self._grids(record, image_facts)
        tokens = widen(
            self._tokens(record, image_facts, plans, prompt=prompt),
            images=[grid_tokens(grid, self._spec) for grid in grids],
            frame_pairs=[grid_tokens((1, *plan.grid[1:]), self._spec) for plan in plans for _ in plan.stamps],
        )
        image_grids = np.array(grids, dtype=np.int32).reshape(-1, 3)
        video_grids = np.array([plan.grid for plan in plans], dtype=np.int32).reshape(-1, 3)
        return Sample(
            key=key,
            shard=shard,
            source=record.source,
            input_ids=tokens.ids,
            loss_weights=tokens.weights,
            positions=sample_positions(
                tokens.kinds, image_grids=image_grids, video_grids=video_grids, merge=self._spec.merge
            ),
            image_patches=_joined(image_patches_of, self.patch_widths[0]),
            image_grids=image_grids,
            video_patches=_joined(video_patches_of, self.patch_widths[1]),
            video_grids=video_grids,
            notes=tuple(
                f"{_name('video', at, record.videos[at])}: {plan.note}" for at, plan in enumerate(plans) if plan.note
            ),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens that a model wrote, without special tokens."""
        text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    def spelled(self, ids: Iterable[Any], weights: Iterable[Any]) -> list[tuple[str, bool]]:
        """Return the text of tokens in parts, control tokens included, each with whether it is supervised."""
        return list(spelled_parts(ids, weights, self._tokenizer))

    def spell(self, token: int) -> str:
        """Return the text of one token, which may be a special one."""
        spelled: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return spelled

    @property
    def media_ids(self) -> frozenset[int]:
        """The tokens that stand for patches of images and videos."""
        return frozenset((self._image_pad, self._video_pad))

    @property
    def control_ids(self) -> frozenset[int]:
        """The tokens that stand for no text, such as those that begin a turn or an image."""
        return frozenset(map(int, self._tokenizer.added_tokens_decoder))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text outside any conversation."""
        return list(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def _tokens(
        self, record: Record, images: Sequence[ImageFacts], plans: Sequence[VideoPlan], *, prompt: bool = False
    ) -> Tokens:
        videos = iter(enumerate(plans))
        media = []
        for content in (content for message in record.messages for content in message.contents):
            if content.kind == "image":
                media.append(_IMAGE_TEXT)
            elif content.kind == "video":
                at, plan = next(videos)
                nested = self._video.layout == "nested"
                media.append(video_text(plan.stamps, form=self._stamps, nested=nested, video=f"{record.id}/{at}"))
        boxes = box_texts(record, images)
        rendered = render_record(record, media, boxes, template=self._template, config=self._chat, prompt=prompt)
        return tokenise(rendered, self._tokenizer, image_pad=self._image_pad, video_pad=self._video_pad)

    def _plans(self, record: Record, videos: Sequence[VideoFacts]) -> list[VideoPlan]:
        return [self._plan(record, at, facts) for at, facts in enumerate(videos)]

    def _plan(self, record: Record, at: int, facts: VideoFacts) -> VideoPlan:
        with _named("video", at, record.videos[at]):
            return plan_video(record.videos[at], facts, spec=self._spec, config=self._video)

    def _grids(self, record: Record, images: Sequence[ImageFacts]) -> list[Grid]:
        return [self._grid(record, at, facts) for at, facts in enumerate(images)]

    def _grid(self, record: Record, at: int, facts: ImageFacts) -> Grid:
        ref, limits = record.images[at], self._limits
        if ref.max_pixels is not None:
            limits = image_limits(self._spec, self._image, max_pixels=ref.max_pixels)
        with _named("image", at, ref):
            return image_grid(facts.height, facts.width, limits=limits, spec=self._spec)

    def _read_images(self, record: Record, images: Sequence[bytes]) -> tuple[list[ImageFacts], list[Array]]:
        facts, patches = [], []
        for at, (ref, data) in enumerate(zip(record.images, images, strict=True)):
            rgb = decode_image(data, name=_name("image", at, ref))
            facts.append(ImageFacts(height=rgb.shape[0], width=rgb.shape[1]))
            patches.append(image_patches(rgb, grid=self._grid(record, at, facts[at]), spec=self._spec).numpy())
        return facts, patches

    def _read_videos(
        self, record: Record, videos: Sequence[bytes | Sequence[bytes]]
    ) -> tuple[list[VideoPlan], list[Array]]:
        plans, patches = [], []
        for at, (ref, data) in enumerate(zip(record.videos, videos, strict=True)):
            name, timeout = _name("video", at, ref), self._video.timeout_seconds
            if isinstance(data, bytes):
                with open_video(data, name=name, timeout=timeout) as clip:
                    plans.append(self._plan(record, at, clip.facts))
                    patches.append(self._patches(plans[-1], clip.frames(plans[-1].frames)))
                continue
            sizes = [probe_image(frame, name=f"{name} frame {number}") for number, frame in enumerate(data)]
            with _named("video", at, ref):
                facts = frame_list_facts(ref, sizes)
            plans.append(self._plan(record, at, facts))
            patches.append(self._patches(plans[-1], decode_images(data, plans[-1].frames, name=name)))
        return plans, patches

    def _patches(self, plan: VideoPlan, frames: Iterator[torch.Tensor]) -> Array:
        return video_patches(frames, count=len(plan.frames), grid=plan.grid, spec=self._spec).numpy()


def _joined(patches: Sequence[Array], width: int) -> Array:
    if len(patches) == 1:
        return patches[0]
    return np.concatenate([np.empty((0, width), dtype=np.uint8), *patches])


def _digest(words: object) -> str:
    return sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]


def _name(kind: str, at: int, place: Place) -> str:
    where = place.member or place.path or redact(place.url or "")
    return f"{kind} {at + 1} ({where})" if where else f"{kind} {at + 1}"


@contextmanager
def _named(kind: str, at: int, place: Place) -> Iterator[None]:
    """Prefix errors with the name of the image or video."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{_name(kind, at, place)}: {error}") from error
