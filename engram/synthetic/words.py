"""Words that synthetic texts are made of: nonce words that nobody has met before, and short common ones.

A nonce word is its number written in syllables, so that words of different numbers differ.
"""

from __future__ import annotations

import hashlib
from random import Random

from engram.config import require

_CONSONANTS = "bdfgklmnprstvzhj"
_VOWELS = "aeiou"
_ENDS = "lmnrstkx"

# Short and frequent in source text and in prose, so that most tokenizers have most of them as one token.
_COMMON = """
name type list file data time line code test key path user set get run end not all one two new old first last next map
read write open close start stop call return value index item size text word page form view state level order group
class point table block
"""
COMMON = tuple(_COMMON.split())


def nonce_word(number: int, syllables: int = 2) -> str:
    """The word of a number from 0 to `n_words(syllables)` - 1: consonant and vowel in turn, and a consonant."""
    number, end = divmod(number, len(_ENDS))
    word = _ENDS[end]
    for _ in range(syllables):
        number, vowel = divmod(number, len(_VOWELS))
        number, consonant = divmod(number, len(_CONSONANTS))
        word = _CONSONANTS[consonant] + _VOWELS[vowel] + word
    return word


def n_words(syllables: int = 2) -> int:
    """How many nonce words of so many syllables there are."""
    return (len(_CONSONANTS) * len(_VOWELS)) ** syllables * len(_ENDS)


def most_words(syllables: int = 2, parts: int = 1) -> int:
    """How many different ones `nonce_words` gives: half of those that a part has, as it draws until it has enough."""
    return n_words(syllables) // parts // 2


def nonce_words(n: int, random: Random, syllables: int = 2, part: int = 0, parts: int = 1) -> list[str]:
    """`n` different nonce words of the part `part` (`part_of`). Raises `ConfigError` for more than `most_words`."""
    most = most_words(syllables, parts)
    require(n <= most, "number of different nonce words", n, f"at most {most:,}")
    words: dict[str, None] = {}
    while len(words) < n:
        word = nonce_word(random.randrange(n_words(syllables)), syllables)
        if part_of(word, parts) == part:
            words[word] = None
    return list(words)


def part_of(text: str, parts: int) -> int:
    """To which of `parts` kinds a text belongs, by its hash: texts to train on and texts to ask for stay apart."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % parts
