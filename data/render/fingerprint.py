"""A hash of the files and settings that decide the lengths of samples, made without a tokenizer. No torch."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

from data.config import ChatConfig, ImageConfig, VideoConfig

RULES = 1
"""Version of the rendering rules; increase it whenever the same record would give different tokens or patches."""
_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def files_fingerprint(folder: Path, *, image: ImageConfig, video: VideoConfig, chat: ChatConfig) -> str:
    """Return a hash of the settings and of the base's files that a renderer reads."""
    digest = blake2b(digest_size=16)
    for part in _parts(folder, [RULES, asdict(image), asdict(video), asdict(chat)]):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _parts(folder: Path, settings: object) -> Iterator[bytes]:
    yield json.dumps(settings, sort_keys=True).encode()
    for name in _FILES:
        if (folder / name).is_file():
            yield name.encode()
            yield (folder / name).read_bytes()
