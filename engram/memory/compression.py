"""Token ids -> canonical ids: tokens whose normalised texts are equal share one id (arXiv:2601.07372, section 2.1).

Case, accents, compatibility forms and runs of white space are folded, so that an N-gram's row doesn't depend on them.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engram.config import require
from engram.tensors import require_ids

_WHITE_RUN = re.compile(r"[ \t\r\n]+")
_REPLACEMENT = "\ufffd"
# Unicode's White_Space; str.strip() would also take the information separators U+001C to U+001F.
_WHITE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")


def normalized_key(text: str, token: str) -> str:
    """The key that tokens of one canonical id share, from a token's decoded `text` and its raw `token` string.

    A text with U+FFFD is part of a UTF-8 sequence and keeps its raw token. Otherwise: NFKC, NFD, marks off, lower
    case, runs of white space to one space, a lone space kept, both ends stripped; an empty result keeps the text.
    """
    if _REPLACEMENT in text:
        return token
    folded = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    # Lower case letter by letter: str.lower() writes a capital sigma that ends a word in another way than inside one.
    folded = "".join(c.lower() for c in folded if unicodedata.category(c)[0] != "M")
    folded = _WHITE_RUN.sub(" ", folded)
    return folded if folded == " " else folded.strip(_WHITE) or text


class TokenCompressor:
    """A surjection of the vocabulary on canonical ids, numbered by first appearance.

    Call it with ids of any shape and integer type to get int64 canonical ids of the same shape. `lookup` is the map,
    int64 `[V]`.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        require(len(keys) > 0, "tokenizer", "empty", "a vocabulary of one token or more")
        numbers: dict[str, int] = {}
        self.lookup: Tensor = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
        self._keys = list(numbers)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, vocab_size: int | None = None) -> TokenCompressor:
        """From a `tokenizers.Tokenizer`, a transformers tokenizer, or the list of a vocabulary's token strings.

        Ids without a token (gaps in the numbering, and up to `vocab_size` a model's padding of its vocabulary) keep a
        canonical id each. Raises `ConfigError` for an object of another kind, and for a `vocab_size` that leaves out an
        id of the tokenizer.
        """
        vocabulary = _vocabulary(tokenizer)
        own = max(vocabulary, default=-1) + 1
        size = own if vocab_size is None else vocab_size
        require(size >= own, "vocab_size", size, f"{own} (the tokenizer's) or more")
        return cls([normalized_key(*vocabulary[i]) if i in vocabulary else f"<unused id {i}>" for i in range(size)])

    def __call__(self, ids: Tensor) -> Tensor:
        """Canonical ids of the same shape as `ids`. Raises `ConfigError` for an id outside the vocabulary."""
        ids = ids.long()  # indexing takes neither uint16 ids nor, for what they say, uint8 ones
        require_ids(ids, len(self.lookup))
        return self.lookup.to(ids.device)[ids]

    @property
    def n_canonical(self) -> int:
        """Number of canonical ids."""
        return len(self._keys)

    @property
    def reduction(self) -> float:
        """Share of ids saved: 1 - canonical ids / ids."""
        return 1 - self.n_canonical / len(self.lookup)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the map, to tell whether a checkpoint was trained with it."""
        return hashlib.sha256(self.lookup.numpy().tobytes()).hexdigest()

    def largest_classes(self, n: int) -> list[tuple[str, int]]:
        """The `n` keys that most ids share, with the number of those ids, largest first."""
        counts = Counter(self.lookup.tolist()).most_common(n)
        return [(self._keys[canonical], count) for canonical, count in counts]


def _vocabulary(tokenizer: Any) -> dict[int, tuple[str, str]]:
    """Decoded text and raw token string by id, for any tokenizer that `from_tokenizer` takes."""
    if isinstance(tokenizer, Sequence) and not isinstance(tokenizer, str):
        return {i: (token, token) for i, token in enumerate(tokenizer)}
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    require(
        hasattr(fast, "get_vocab") and hasattr(fast, "decode"),
        "tokenizer",
        type(tokenizer).__name__,
        "a tokenizers.Tokenizer, a transformers tokenizer or a list of token strings",
    )
    tokens = {i: token for token, i in fast.get_vocab().items()}
    if hasattr(fast, "decode_batch"):
        texts = fast.decode_batch([[i] for i in tokens], skip_special_tokens=False)
    else:
        texts = [fast.decode([i], skip_special_tokens=False) for i in tokens]
    return dict(zip(tokens, zip(texts, tokens.values(), strict=True), strict=True))
