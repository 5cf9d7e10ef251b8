"""Text -> token ids: a byte-level BPE trained on the corpus, or any tokenizer that is given.

Byte-level BPE as in GPT-2, with a pattern made for source text: an indentation goes with the newline before it,
and digits are taken in groups of three. Id 0 is `<|pad|>`, id 1 is `<|eos|>`, which ends every document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from engram.config import ConfigError, require

PAD, EOS = "<|pad|>", "<|eos|>"
SPECIAL = ("eos", "pad")
_USUAL_EOS = (EOS, "<|endoftext|>", "<｜end▁of▁sentence｜>", "</s>", "<|end_of_text|>", "<eos>")  # noqa: RUF001
_WORDS = Regex(r"\s*\n[ \t]*| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[^\S\n]+")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids (fewer if the text has no more pairs to merge).

    Raises `ConfigError` if `vocab_size` cannot hold the 256 bytes and the two special tokens.
    """
    require(vocab_size >= 258, "data.vocab_size", vocab_size, "258 (256 bytes, pad and eos) or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer from a `tokenizer.json`, a folder that holds one, or a hub id.

    Raises `ConfigError` naming it when it cannot be read.
    """
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if path != Path(name) and not path.is_file():
        raise ConfigError(f"data.tokenizer {name!r} is a folder without a tokenizer.json")
    try:
        return Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ConfigError(f"data.tokenizer {name!r} cannot be loaded: {' '.join(str(error).split())}") from error


def eos_id(tokenizer: Tokenizer, eos_token: str = "") -> int:
    """The id of the token that ends a document: `eos_token`, or if that is empty one of the usual names.

    Raises `ConfigError` if the tokenizer has no such token.
    """
    names = (eos_token,) if eos_token else _USUAL_EOS
    found = next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
    if found is None:
        raise ConfigError(f"data.eos_token is {eos_token!r}: the tokenizer has no token {' or '.join(names)}")
    return found


def pad_id(tokenizer: Tokenizer, eos: int) -> int:
    """The id of padding: that of `<|pad|>` if the tokenizer has it, else `eos`."""
    found = tokenizer.token_to_id(PAD)
    return eos if found is None else found


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of `SPECIAL` tokens, by name; none if the tokenizer has no token that ends documents."""
    try:
        eos = eos_id(tokenizer)
    except ConfigError:
        return {}
    return dict(zip(SPECIAL, (eos, pad_id(tokenizer, eos)), strict=True))


def byte_counter(tokenizer: Tokenizer) -> Callable[[Encoding, str], NDArray[np.int64]]:
    """A function of an encoding and its text that gives each token's bytes of text; they add up to the text's.

    In a byte-level vocabulary a token's string has one character a byte, or is the text itself if the token was added.
    Elsewhere, and where those do not add up (a space put before the text, one that an added token took along), a token
    is given the text from the end of the one before it to its own end, and the last token what is left.
    """
    parts = json.loads(tokenizer.to_str())
    if parts["normalizer"] is not None or '"ByteLevel"' not in json.dumps(parts["pre_tokenizer"]):
        return _bytes_by_offsets
    lengths = np.zeros(tokenizer.get_vocab_size(with_added_tokens=True), np.int64)
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
        lengths[i] = len(token)
    for i, added in tokenizer.get_added_tokens_decoder().items():
        lengths[i] = len(added.content.encode())

    def count(encoding: Encoding, text: str) -> NDArray[np.int64]:
        found = lengths[encoding.ids]
        return found if found.sum() == len(text.encode()) else _bytes_by_offsets(encoding, text)

    return count


def _bytes_by_offsets(encoding: Encoding, text: str) -> NDArray[np.int64]:
    bytes_before = np.cumsum([0, *(len(character.encode()) for character in text)])
    ends = np.array([end for _, end in encoding.offsets], np.int64)
    ends = bytes_before[np.maximum.accumulate(ends)]
    ends[-1:] = bytes_before[-1]
    return np.diff(ends, prepend=0)
