"""Our models in EleutherAI's lm-evaluation-harness: `lm_eval --model engram --model_args path=FOLDER --tasks ...`.

Texts are scored as in training (`engram.training.data`): a document starts anew after each end-of-text token, sees
nothing of what came before, and its first token is predicted from that token.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from engram.backbone import EngramLM
from engram.config import ConfigError, require
from engram.inference import Sampling, stream
from engram.inference.opening import Tables, open_model
from engram.memory.row_formats import RowKind
from engram.training.identity import tokenizer_identity
from engram.training.tokenizer import eos_id, load_tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AUTO_TOKENS = 2**14
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

T = TypeVar("T")
Scored = tuple[Any, list[int], list[int]]  # what the harness knows it by, context, continuation

_log = logging.getLogger(__name__)


class _Generation(NamedTuple):
    """How a text is to be continued."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]


class EngramHarness(TemplateLM):
    """A trained model, asked by the harness; arguments come by `--model_args`, `--batch_size` and `--device`.

    Args:
        path: a model's folder, a run's folder or a checkpoint's, as `open_model` takes them.
        tokenizer: a `tokenizer.json`, or a folder with one, for a model that has none with it; or a tokenizer itself.
        eos_token: the token that ends documents; one of the usual names if empty.
        max_length: tokens that the model sees at once; `max_seq_len` of its config if None.
        dtype: `bfloat16` or `float16` to compute in that type (autocast); float32 if None.
        batch_size: sequences at once, or `auto`: as many as 16,384 tokens hold, up to `max_batch_size`. Numbers don't
            depend on it, but for rounding; sampled texts do.
        device: `cuda` if None, and the CPU where there is none.
        tables, cache_rows, rows: where memory tables are kept and how, as for `open_model`.
        model: one that is open already, in the place of `path`. It is asked as it is, in evaluation mode and where it
            is, so `device`, `tables`, `cache_rows` and `rows` can't be said; what is done to it meanwhile counts.

    Raises:
        ConfigError: a path that leads to no model, no tokenizer or not the model's, a setting out of range or beside an
            open model.
    """

    def __init__(
        self,
        path: str = "",
        tokenizer: str | Tokenizer | None = None,
        eos_token: str = "",
        max_length: int | str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        tables: Tables = "device",
        cache_rows: int | str = 0,
        rows: RowKind = "float",
        model: EngramLM | None = None,
    ) -> None:
        super().__init__()
        require(dtype is None or dtype in _DTYPES, "dtype", dtype, "one of " + ", ".join(_DTYPES))
        require((model is None) == bool(path), "path", path, "the model's, or none beside a model that is open already")
        given, own = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer, None
        cache_rows = _whole("cache_rows", cache_rows, 0)
        if model is None:
            # The harness asks for CUDA when its user asks for nothing.
            asked = torch.device(device or "cuda")
            self._device = asked if asked.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
            model, own = open_model(path, tables, cache_rows=cache_rows, rows=rows, tokenizer=given)
            model.to(self._device)
        else:
            placed = {"device": (device, None), "tables": (tables, "device"), "cache_rows": (cache_rows, 0)}
            for name, (value, usual) in (placed | {"rows": (rows, "float")}).items():
                require(value == usual, name, value, f"{usual!r}: an open model stays where and as it is")
            self._device = model.embed.weight.device
        self.model = model.eval()
        chosen = given or own
        if chosen is None:
            raise ConfigError(f"{path or 'an open model'!r} holds no tokenizer: name one by tokenizer=")
        self._tokenizer = chosen
        self._eos = eos_id(chosen, eos_token)
        self.max_length = model.config.max_seq_len if max_length is None else _whole("max_length", max_length, 2)
        self._dtype = torch.float32 if dtype is None else _DTYPES[dtype]
        auto = str(batch_size).startswith("auto")
        self.batch_size = 0 if auto else _whole("batch_size", 1 if batch_size is None else batch_size, 1, ", or auto")
        self._most = None if max_batch_size is None else _whole("max_batch_size", max_batch_size, 1)

    @property
    def eot_token_id(self) -> int:
        """The token that ends documents, which also stands before the first one."""
        return self._eos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests: another one for any other tokenizer."""
        return "engram-" + tokenizer_identity(self._tokenizer, "")["sha256"][:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, without special tokens: as in training."""
        return list(self._tokenizer.encode(string, add_special_tokens=False).ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises `ConfigError`: texts go on as in training, there is no template of a conversation."""
        raise ConfigError(
            "apply_chat_template is set: allowed is none, a model of this package goes on with plain text"
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether each of its tokens is the most likely one.

        Raises:
            ConfigError: a continuation without tokens; one end-of-text token without context counts as context.
        """
        for request in requests:
            require(request.args[1] != "", "continuation", request.args[1], "a text of one token or more")
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text as a document, in windows of `max_length`, each token seen once."""
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(self.tok_encode(text), self._eos, self.max_length, 1)
            ]
            for (text,) in (request.args for request in requests)
        ]
        scores = iter(self._loglikelihood_tokens(list(itertools.chain(*windows)), disable_tqdm))
        totals = [sum(score for score, _ in itertools.islice(scores, len(parts))) for parts in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether each of its tokens is the most likely one.

        What doesn't fit into `max_length` is cut off at the left. Requests that differ in their last token alone, as
        choices by letter do, are read once.
        """
        same: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            n, allowed = len(continuation), f"1 to max_length ({self.max_length})"
            require(1 <= n <= self.max_length, "tokens of a continuation", n, allowed)
            same.setdefault(tuple((context + continuation)[-self.max_length - 1 : -1]), []).append(i)
        answers: dict[int, tuple[float, bool]] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods")
        for rows in self._batches(sorted(same, key=len, reverse=True), len):
            hidden = self._hidden(rows)
            order, values = [], []
            for row, seen in zip(hidden, rows, strict=True):
                longest = max(len(requests[i][2]) for i in same[seen])
                with self._precision():
                    logits = self.model.logits(row[len(seen) - longest : len(seen)])
                log_probs = F.log_softmax(logits.float(), -1)
                for i in same[seen]:
                    tokens = torch.tensor(requests[i][2], dtype=torch.int64, device=self._device)
                    own = log_probs[longest - len(tokens) :]
                    score = own.gather(-1, tokens.unsqueeze(-1)).sum()
                    order.append(i)
                    values.append(torch.stack([score, (own.argmax(-1) == tokens).all()]))
            for i, (score, greedy) in zip(order, torch.stack(values).tolist(), strict=True):
                answers[i] = score, bool(greedy)
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
            progress.update(len(order))
        progress.close()
        return [answers[i] for i in range(len(requests))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each text, up to the first of its stop texts or the end of the document.

        Of a context that leaves no room for the new tokens the left is cut off, but not more than half of `max_length`.
        """
        alike: dict[_Generation, list[int]] = {}
        for i, (_, settings) in enumerate(request.args for request in requests):
            alike.setdefault(self._generation(settings), []).append(i)
        texts: dict[int, str] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="generated texts")
        for how, members in alike.items():
            room = self.max_length - how.max_new_tokens
            ids = {i: self.tok_encode(requests[i].args[0])[-room:] or [self._eos] for i in members}
            for batch in self._batches(sorted(ids.items(), key=_tokens, reverse=True), _tokens, how.max_new_tokens):
                for (i, _), text in zip(batch, self._continued([prompt for _, prompt in batch], how), strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                progress.update(len(batch))
        progress.close()
        return [texts[i] for i in range(len(requests))]

    def _continued(self, prompts: Sequence[Sequence[int]], how: _Generation) -> list[str]:
        """New text after each prompt."""
        new: list[list[int]] = [[] for _ in prompts]
        ended = [False for _ in prompts]
        # A token is a byte or more; before those a decoder may strip a space.
        looked_at = max((len(stop.encode()) for stop in how.stop), default=0) + 1
        # Draws follow the seed that the harness was given, which it sets for torch as a whole.
        seed = int(torch.randint(2**31, ()))
        with self._precision():
            for tokens in stream(
                self.model, prompts, how.max_new_tokens, sampling=how.sampling, stop_ids=[self._eos], seed=seed
            ):
                for row, token in enumerate(tokens):
                    if token is None or ended[row]:
                        ended[row] = True
                        continue
                    new[row].append(token)
                    text = self._tokenizer.decode(new[row][-looked_at:])
                    ended[row] = any(stop in text for stop in how.stop)
                if all(ended):
                    break
        texts = [self._tokenizer.decode(tokens) for tokens in new]
        return [text[: min((at for s in how.stop if (at := text.find(s)) >= 0), default=None)] for text in texts]

    def _generation(self, settings: dict[str, Any]) -> _Generation:
        """Settings of a task, by the names of transformers. Raises `ConfigError` for one that we haven't."""
        settings = {name: value for name, value in settings.items() if value is not None}
        until = settings.get("until", [])
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        lengths = [settings[name] for name in _LENGTHS if name in settings]
        n, most = int(lengths[0]) if lengths else 256, self.max_length // 2
        if n > most:
            _log.warning("at most %s tokens are generated, half of max_length, not %s", most, n)
        for name, value in settings.items():
            known = ("until", "do_sample", *_LENGTHS, *_SAMPLING)
            allowed = "one of " + ", ".join(known) + ", or num_beams of 1"
            require(name in known or (name, value) == ("num_beams", 1), f"generation setting {name}", value, allowed)
        chosen = {name: settings[name] for name in _SAMPLING if name in settings}
        if not settings.get("do_sample", float(chosen.get("temperature", 0)) > 0):
            chosen["temperature"] = 0.0
        return _Generation(Sampling(**chosen), min(n, most), stop)

    def _batches(self, rows: Sequence[T], tokens: Callable[[T], int], more: int = 0) -> Iterator[Sequence[T]]:
        """Rows, longest first, in batches; `tokens` of a row, and so many `more`, are what `auto` counts."""
        at = 0
        while at < len(rows):
            n = self.batch_size or min(max(1, _AUTO_TOKENS // (tokens(rows[at]) + more)), self._most or len(rows))
            yield rows[at : at + n]
            at += n

    def _hidden(self, rows: Iterable[Sequence[int]]) -> Tensor:
        """Last hidden states `[B, T, D]`; what stands after a row's tokens means nothing."""
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self._device)
        ends = (ids == self._eos).long()
        with self._precision():
            return self.model.run(ids, ends.cumsum(1) - ends).hidden

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)


def _tokens(prompt: tuple[int, list[int]]) -> int:
    return len(prompt[1])


def _whole(name: str, value: Any, least: int, other: str = "") -> int:
    """A number that may have come as text. Raises `ConfigError` for what is none, or less than `least`."""
    text = str(value)
    require(text.isdecimal() and int(text) >= least, name, value, f"{least} or more{other}")
    return int(text)
