"""From text to text: prompts are encoded, and new tokens decoded as they come.

A character of several tokens comes when its last one does, and what may be the beginning of a stop text when it is
known not to be one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from engram.backbone import EngramLM
from engram.config import require
from engram.inference.generate import stream
from engram.training.tokenizer import special_ids

_SURROGATE = re.compile("[\ud800-\udfff]")


class TextGenerator:
    """A model with its tokenizer.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: the one it was trained with.

    Raises:
        ConfigError: a tokenizer with more ids than the model's vocabulary.
    """

    def __init__(self, model: EngramLM, tokenizer: Tokenizer) -> None:
        n, V = tokenizer.get_vocab_size(with_added_tokens=True), model.config.vocab_size
        require(n <= V, "ids of the tokenizer", n, f"at most the model's vocab_size ({V})")
        self.model, self.tokenizer = model, tokenizer
        self.n_new = 0  # tokens that were generated
        self.stop_ids = {i for name, i in special_ids(tokenizer).items() if name == "eos"}

    def stream(
        self, prompts: Sequence[str], max_new_tokens: int, *, stop: Sequence[str] = (), **settings: Any
    ) -> Iterator[list[str]]:
        """After each step the new text of every prompt, which may be empty.

        Args:
            prompts: texts, continued together.
            max_new_tokens: after which all end; they also end where a document does.
            stop: texts that end a continuation; they are not given out.
            settings: `sampling`, `seed`, `compiled` of `engram.inference.generate.stream`.

        Raises:
            ConfigError: as `engram.inference.generate.stream`; one text in the place of several; an empty stop text; a
                prompt that is no Unicode text, such as one from bytes that are not UTF-8.
        """
        for name, texts in (("prompts", prompts), ("stop", stop)):
            require(not isinstance(texts, str), name, texts, "a list of texts")
        require(all(stop), "stop", list(stop), "texts that are not empty")
        for text in prompts:
            require(not _SURROGATE.search(text), "prompt", text, "Unicode text (UTF-8, where it came from bytes)")
        ids = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in prompts]
        writers = [_Writer(self.tokenizer, tuple(stop), prompt) for prompt in ids]
        for tokens in stream(self.model, ids, max_new_tokens, stop_ids=self.stop_ids, **settings):
            self.n_new += sum(not w.ended and token is not None for w, token in zip(writers, tokens, strict=True))
            yield [writer.write(token) for writer, token in zip(writers, tokens, strict=True)]
            if all(writer.ended for writer in writers):
                break
        yield [writer.finish() for writer in writers]

    def generate(self, prompts: Sequence[str], max_new_tokens: int, **settings: Any) -> list[str]:
        """The continuation of every prompt; arguments and errors as `stream`."""
        parts = list(self.stream(prompts, max_new_tokens, **settings))
        return ["".join(texts) for texts in zip(*parts, strict=True)]


class _Writer:
    """The text of one sequence as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], prompt: list[int]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = DecodeStream(prompt, skip_special_tokens=True)
        self._held = ""
        self.ended = False

    def write(self, token: int | None) -> str:
        """What can be given out now that `token` came; None for the end."""
        if self.ended:
            return ""
        if token is None:
            return self.finish()
        self._held += self._decoder.step(self._tokenizer, token) or ""
        ends = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if ends:
            self._held = self._held[: min(ends)]
            return self.finish()
        # The longest end of what is held with which a stop text begins.
        kept = max((n for text in self._stop for n in range(1, len(text)) if self._held.endswith(text[:n])), default=0)
        out, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return out

    def finish(self) -> str:
        """What is still held; no more comes."""
        out, self._held, self.ended = self._held, "", True
        return out
