"""Single tokens as text for readers, where a token may be half a character or none at all."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer


class Pieces:
    """The text of each token of a tokenizer by itself.

    Bytes that are no whole character are spelt as in Python: `\\xe2\\x82`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        parts = json.loads(tokenizer.to_str())
        self._of_bytes = '"ByteLevel"' in json.dumps([parts["pre_tokenizer"], parts["decoder"]])
        self._added = {i: added.content for i, added in tokenizer.get_added_tokens_decoder().items()}

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """The text of each id."""
        return [self._text(int(i)) for i in ids]

    def _text(self, i: int) -> str:
        token = self._tokenizer.id_to_token(i)
        if i in self._added or token is None:
            return self._added.get(i, f"<unused id {i}>")
        if self._of_bytes and all(character in _BYTES for character in token):
            return bytes(_BYTES[character] for character in token).decode("utf-8", "backslashreplace")
        text = self._tokenizer.decode([i], skip_special_tokens=False)
        if "\ufffd" in text:
            return str(token)
        # Decoders that mark spaces so drop the one before a text's first word.
        return " " + text if token.startswith("\u2581") and not text.startswith(" ") else str(text)


def _byte_characters() -> dict[str, int]:
    """The byte of each character of byte-level vocabularies: printable ones of Latin-1 stand for themselves, the others
    are numbered from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_characters()
