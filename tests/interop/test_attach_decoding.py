"""Generation with attached memory: whatever the cache goes through, answers are those without a cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_hosts import CACHE, HOSTS, LAYERS, MEMORY, SIZES, V, attached, host, some_ids
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    StaticCache,
)
from transformers.cache_utils import StaticLayer

from engram import ConfigError
from engram.inference.offload import offload
from engram.interop import attach

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    model = host()
    attached(model)
    return model


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def new_cache(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def left_padded(B: int, T: int) -> tuple[Tensor, Tensor]:
    """Ids and mask; row b has 2 b positions of padding before it."""
    mask = torch.arange(T) >= 2 * torch.arange(B).unsqueeze(1)
    return some_ids(B, T).masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("chunks", [(5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1), (1, 7, 2, 7), (17,)])
@pytest.mark.parametrize("name", HOSTS)
def test_logits_with_a_cache_are_those_without(name: str, chunks: tuple[int, ...]) -> None:
    model = host(name)
    attached(model)
    ids, mask = left_padded(3, 17)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    cache, end, pieces = new_cache(model), 0, []
    for n in chunks:
        now, end = slice(end, end + n), end + n
        seen = {"attention_mask": mask[:, :end], "position_ids": positions[:, now]}
        pieces.append(logits(model, ids[:, now], **{CACHE: cache}, **seen))
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], **CLOSE)


def test_tokens_before_a_chunk_matter_to_the_memory(llama: PreTrainedModel) -> None:
    """So that the test above tells a state from none."""
    ids = some_ids(1, 9)
    memory = llama.engram.memory["2"]
    hidden = torch.randn(1, 9, 32)
    with torch.no_grad():
        assert not torch.allclose(memory(hidden, ids)[:, 5:], memory(hidden[:, 5:], ids[:, 5:]), atol=0.1)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 4},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "prompt in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_generation_writes_what_it_writes_without_a_cache(name: str, way: str) -> None:
    model = host(name)
    attached(model)
    ids, mask = left_padded(3, 8)
    written = []
    for use_cache in (True, False):
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **WAYS[way]}
        if not use_cache:
            options = {k: v for k, v in options.items() if k not in ("cache_implementation", "prefill_chunk_size")}
        torch.manual_seed(3)
        written.append(model.generate(ids, use_cache=use_cache, **options))
    assert torch.equal(*written)
    assert len(written[0].unique()) > 10


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6))


def qwen2() -> PreTrainedModel:
    windows = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0}
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **windows))


def mamba() -> PreTrainedModel:
    sizes = {name: SIZES[name] for name in SIZES if name.endswith("token_id")}
    return MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=3, state_size=4, **sizes))


def recurrent_gemma() -> PreTrainedModel:
    kinds = ["recurrent", "recurrent", "attention"]
    sizes = {"lru_width": 32, "attention_window_size": 6, "head_dim": 8, "block_types": kinds}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SIZES, **sizes))


UNLIKE: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "sliding windows alone": (mistral, {"cache_implementation": "static"}),
    "sliding windows alone, prompt in chunks": (mistral, {"cache_implementation": "static", "prefill_chunk_size": 3}),
    "sliding windows by kind of block": (qwen2, {"cache_implementation": "static"}),
    "a cache that counts no tokens": (mamba, {}),
    "a cache that is not given back": (recurrent_gemma, {}),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_models_whose_masks_or_caches_are_unlike_others_write_what_they_write_without(kind: str) -> None:
    make, way = UNLIKE[kind]
    torch.manual_seed(0)
    model = make().eval()
    attached(model)
    ids, mask = left_padded(2, 8)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    written = model.generate(ids, **options, **way)
    assert torch.equal(written, model.generate(ids, use_cache=False, **options))
    assert len(written.unique()) > 10


@pytest.mark.parametrize("n", [1, 5, 40])
def test_assisted_decoding_writes_what_greedy_decoding_does(llama: PreTrainedModel, n: int) -> None:
    """The assistant has memory too, agrees at times, and drafts fewer or more tokens than the slack."""
    assistant = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in assistant.model.layers[1].parameters():
            parameter.mul_(0.9)
    assistant.engram.slack = 64
    assistant.generation_config.num_assistant_tokens = n
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ids, options = some_ids(1, 8), {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None}
    alone = llama.generate(ids, **options)
    assert torch.equal(llama.generate(ids, assistant_model=assistant, **options), alone)


def test_prompt_lookup_writes_what_greedy_decoding_does(llama: PreTrainedModel) -> None:
    ids = some_ids(1, 6).repeat(1, 4)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    alone = llama.generate(ids, **options)
    assert torch.equal(llama.generate(ids, prompt_lookup_num_tokens=6, **options), alone)


def test_a_cache_that_the_model_made_is_gone_on_from(llama: PreTrainedModel) -> None:
    ids = some_ids(2, 12)
    with torch.no_grad():
        cache = llama(ids[:, :7])[CACHE]
    torch.testing.assert_close(
        logits(llama, ids[:, 7:], **{CACHE: cache}), logits(llama, ids, use_cache=False)[:, 7:], **CLOSE
    )


@pytest.mark.parametrize("static", [False, True])
def test_a_prompts_cache_copied_cropped_and_reset_holds_what_is_left(llama: PreTrainedModel, static: bool) -> None:
    ids, other = some_ids(2, 12), some_ids(2, 12, seed=5)
    cache = StaticCache(config=llama.config, max_cache_len=32) if static else new_cache(llama)
    logits(llama, ids[:, :8], **{CACHE: cache})
    kept = copy.deepcopy(cache)
    assert isinstance(kept, type(cache))
    for prompt_cache, text in ((cache, ids), (kept, other)):
        whole = logits(llama, torch.cat([ids[:, :8], text[:, 8:]], 1), use_cache=False)
        torch.testing.assert_close(logits(llama, text[:, 8:], **{CACHE: prompt_cache}), whole[:, 8:], **CLOSE)
    if not static or hasattr(StaticLayer, "crop"):  # from transformers 5.24 on
        cache.crop(-6)
        whole = logits(llama, torch.cat([ids[:, :6], other[:, :5]], 1), use_cache=False)
        torch.testing.assert_close(logits(llama, other[:, :5], **{CACHE: cache}), whole[:, 6:], **CLOSE)
    if static:
        cache.reset()
        torch.testing.assert_close(
            logits(llama, other, **{CACHE: cache}), logits(llama, other, use_cache=False), **CLOSE
        )


def test_rows_of_a_cache_are_chosen_and_repeated_with_their_memory(llama: PreTrainedModel) -> None:
    ids = some_ids(3, 12)
    cache = new_cache(llama)
    logits(llama, ids[:, :7], **{CACHE: cache})
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    rows = ids[[0, 2, 2, 0]]
    whole = logits(llama, rows, use_cache=False)
    torch.testing.assert_close(logits(llama, rows[:, 7:], **{CACHE: cache}), whole[:, 7:], **CLOSE)


def test_more_tokens_than_are_kept_can_not_be_taken_back() -> None:
    model, ids = host(), some_ids(1, 20)
    attached(model, slack=3)
    cache = new_cache(model)
    for t in range(15):
        logits(model, ids[:, t : t + 1], **{CACHE: cache})
    cache.crop(-2)
    with pytest.raises(ConfigError, match="tokens to take back is 2: allowed is 1 or less"):
        cache.crop(-2)
    whole = logits(model, ids[:, :14], use_cache=False)  # the refused call has changed nothing
    torch.testing.assert_close(logits(model, ids[:, 13:14], **{CACHE: cache}), whole[:, 13:], **CLOSE)


def test_a_draft_is_taken_back_whole_however_long() -> None:
    model, ids = host(), some_ids(1, 40)
    attached(model, slack=0)
    cache = new_cache(model)
    logits(model, ids[:, :5], **{CACHE: cache})
    logits(model, some_ids(1, 20, seed=9), **{CACHE: cache})
    cache.crop(-20)
    torch.testing.assert_close(
        logits(model, ids[:, 5:], **{CACHE: cache}), logits(model, ids, use_cache=False)[:, 5:], **CLOSE
    )


def test_a_cache_that_memory_has_not_seen_filled_is_refused() -> None:
    model, ids = host(), some_ids(1, 9)
    cache = new_cache(model)
    logits(model, ids[:, :5], **{CACHE: cache})
    attachment = attached(model)
    with pytest.raises(ConfigError, match="cache holds 5 tokens, and the memory has seen 0"):
        logits(model, ids[:, 5:], **{CACHE: cache})
    with pytest.raises(ConfigError, match="cache is a tuple"):
        logits(model, ids[:, 5:], **{CACHE: ()})
    filled = new_cache(model)
    logits(model, ids[:, :5], **{CACHE: filled})
    attachment.remove()
    attach(model, LAYERS, MEMORY)
    with pytest.raises(ConfigError, match="cache holds 5 tokens, and the memory has seen 0"):
        logits(model, ids[:, 5:], **{CACHE: filled})


def test_a_cache_that_counts_no_tokens_is_refused_too_if_it_holds_some() -> None:
    model, ids = mamba().eval(), some_ids(1, 9)
    with torch.no_grad():
        output = model(ids[:, :5], use_cache=True)
        cache = output.get("cache", output.get("cache_params"))
        attached(model)
        with pytest.raises(ConfigError, match="cache holds tokens that the memory has not seen"):
            model(ids[:, 5:], cache)


def test_a_document_that_starts_after_the_first_call_of_a_cache_is_refused(llama: PreTrainedModel) -> None:
    ids, cache, mask = some_ids(1, 9), new_cache(llama), torch.ones(9, 9).tril().bool()[None, None]
    logits(llama, ids[:, :5], **{CACHE: cache})
    mask[:, :, 7:, :7] = False
    with pytest.raises(ConfigError, match="attention_mask hides from a token the one before it"):
        logits(llama, ids[:, 5:], attention_mask=mask[:, :, 5:], **{CACHE: cache})


@pytest.mark.parametrize("static", [False, True])
def test_a_compiled_model_decodes_as_one_that_is_not(llama: PreTrainedModel, static: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled: Any = torch.compile(llama, backend="aot_eager")
    ids = some_ids(2, 16)
    cache = StaticCache(config=llama.config, max_cache_len=16) if static else new_cache(llama)
    pieces = [logits(llama, ids[:, :5], **{CACHE: cache})]
    pieces += [logits(compiled, ids[:, t : t + 1], **{CACHE: cache}) for t in range(5, 16)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits(llama, ids, use_cache=False), **CLOSE)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one for the first step, one for any


@pytest.mark.parametrize("place", ["host", "disk"])
def test_tables_off_the_device_write_the_same(place: Any, tmp_path: Path) -> None:
    model, ids = host(), some_ids(2, 8)
    attached(model)
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    written = model.generate(ids, **options)
    offload(model, place, folder=tmp_path if place == "disk" else None)
    assert torch.equal(model.generate(ids, **options), written)


def test_every_id_of_the_vocabulary_is_allowed_and_no_other(llama: PreTrainedModel) -> None:
    logits(llama, torch.tensor([[0, V - 1]]))
    with pytest.raises((ConfigError, IndexError)):
        logits(llama, torch.tensor([[0, V]]))
