"""Memory attached to transformers models: where it stands, what it changes, what stays, what is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_hosts import BLOCKS, HOSTS, LAYERS, MEMORY, SIZES, D, V, attached, host, some_ids, words_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CLIPVisionConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from engram import ConfigError, TokenCompressor
from engram.inference import offload, offloaded_tables
from engram.interop import Attachment, attach

COMPRESSED = dataclasses.replace(MEMORY, compress=True)


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def blocks_of(model: PreTrainedModel) -> Any:
    decoder = model.base_model
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def with_updates_put_in(model: PreTrainedModel, attachment: Attachment, ids: Tensor, **options: Any) -> None:
    """Make a model without memory add the layers' own updates for these ids, block by block, in plain Python."""
    for layer in LAYERS:
        block, memory = blocks_of(model)[layer], attachment.memory[str(layer)]

        def forward(hidden: Tensor, *args: Any, own: Any = block.forward, memory: Any = memory, **kwargs: Any) -> Any:
            return own(hidden + memory(hidden, ids, **options), *args, **kwargs)

        block.forward = forward


@pytest.mark.parametrize("name", HOSTS)
def test_a_model_answers_bit_for_bit_as_before_until_its_memory_learns(name: str) -> None:
    model, ids = host(name), some_ids(2, 9)
    before = logits(model, ids)
    attachment = attach(model, LAYERS, MEMORY)
    assert torch.equal(logits(model, ids), before)
    assert attachment.config.d_model == D
    assert attachment.config.vocab_size == V
    with torch.no_grad():
        attachment.memory["2"].table.weight.normal_()
    assert not torch.allclose(logits(model, ids), before)


@pytest.mark.parametrize("name", HOSTS)
def test_blocks_read_the_residual_stream_with_the_layers_updates(name: str) -> None:
    model, ids = host(name), some_ids(2, 9)
    plain = copy.deepcopy(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    attachment = attached(model)
    with_updates_put_in(plain, attachment, ids, padding_mask=mask.bool())
    torch.testing.assert_close(logits(model, ids, attention_mask=mask), logits(plain, ids, attention_mask=mask))
    assert attachment.gates.keys() == set(LAYERS)
    assert all(gates.shape == ids.shape for gates in attachment.gates.values())


def test_a_model_in_bfloat16_keeps_its_type_and_memory_in_float32() -> None:
    model, ids = host().bfloat16(), some_ids(2, 9)
    before = logits(model, ids)
    attachment = attach(model, LAYERS, MEMORY)
    assert torch.equal(logits(model, ids), before)
    assert {parameter.dtype for parameter in attachment.parameters()} == {torch.float32}
    torch.nn.init.normal_(attachment.memory["0"].table.weight)
    after = logits(model, ids)
    assert after.dtype == torch.bfloat16
    assert not torch.equal(after, before)


def test_a_headless_model_takes_memory_too() -> None:
    model, ids = LlamaModel(host().config).eval(), some_ids(2, 9)
    with torch.no_grad():
        before = model(ids).last_hidden_state
        attached(model)
        assert not torch.allclose(model(ids).last_hidden_state, before)


def modernbert_decoder() -> PreTrainedModel:
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**sizes, cls_token_id=1, sep_token_id=2))


def llama4() -> PreTrainedModel:
    sizes = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **sizes))


@pytest.mark.parametrize("make", [llama4, modernbert_decoder])
def test_blocks_are_found_where_get_decoder_does_not_say(make: Callable[[], PreTrainedModel]) -> None:
    model, ids = make().eval(), some_ids(2, 9)
    before = logits(model, ids)
    attached(model)
    assert set(model.engram._host[0].blocks) == set(model.model.layers)
    assert not torch.allclose(logits(model, ids), before)


def test_a_multimodal_model_is_given_ids_around_its_decoder() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = CLIPVisionConfig(**vision, image_size=16, patch_size=8)
    text = LlamaConfig(**SIZES)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=images, text_config=text, image_token_id=80)).eval()
    ids, plain = some_ids(2, 9), host()
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    for one in (model, plain):
        attached(one)
    expected = logits(plain, ids)
    assert torch.equal(logits(model, ids), expected)
    with torch.no_grad():
        inner, its = (one(ids, use_cache=False).last_hidden_state for one in (model.model, plain.model))
        assert torch.equal(inner, its)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    with pytest.raises(ConfigError, match="input_ids is None"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(logits(model, ids), expected)  # nothing of the failed call is left


def test_memory_is_where_a_block_computes_whose_weights_are_offloaded(tmp_path: Path) -> None:
    host().save_pretrained(tmp_path)
    places: dict[str, Any] = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    places["model.layers.2"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    whole, ids = host(), some_ids(2, 9)
    attached(model.eval()).save(tmp_path / "memory")
    attached(whole)
    assert torch.equal(logits(model, ids), logits(whole, ids))


@pytest.mark.parametrize("freeze", [True, False])
def test_a_model_is_as_it_was_when_memory_is_removed(freeze: bool) -> None:
    model, ids = host(), some_ids(2, 9)
    model.model.norm.weight.requires_grad_(False)
    was = copy.deepcopy(model)
    attachment = attached(model, freeze_backbone=freeze)
    assert any(p.requires_grad for n, p in model.named_parameters() if not n.startswith("engram")) is not freeze
    model(ids)
    attachment.remove()
    for (name, module), (its_name, its) in zip(model.named_modules(), was.named_modules(), strict=True):
        assert name == its_name
        assert module.__dict__.keys() == its.__dict__.keys()
        for hooks in (
            "_forward_pre_hooks",
            "_forward_hooks",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks_with_kwargs",
        ):
            assert not getattr(module, hooks)
        assert not module._forward_hooks_always_called
    assert model._keys_to_ignore_on_save == was._keys_to_ignore_on_save
    for (name, p), (_, its) in zip(model.named_parameters(), was.named_parameters(), strict=True):
        assert p.requires_grad == its.requires_grad, name
        assert torch.equal(p, its)
    assert torch.equal(logits(model, ids), logits(was, ids))
    other = attached(model)  # and there is room for memory again
    with pytest.raises(ConfigError, match="attachment is 'removed'"):
        attachment.remove()
    assert model.engram is other


def test_only_memory_learns_and_all_of_it() -> None:
    from engram.interop.trainer import build_optimizer

    model, ids = host(), some_ids(4, 16)
    attachment = attach(model, LAYERS, MEMORY)
    was = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, losses = build_optimizer(model, 1e-2), []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
    for name, p in model.named_parameters():
        assert torch.equal(p, was[name]) is not name.startswith("engram."), name
        assert p.requires_grad is name.startswith("engram."), name
    assert len(list(attachment.parameters())) == sum(name.startswith("engram.") for name in was)


def test_documents_packed_by_positions_see_nothing_of_each_other() -> None:
    model, ids = host(), some_ids(1, 12)
    attached(model)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).unsqueeze(0)
    packed = logits(model, ids, position_ids=positions)
    apart = torch.cat([logits(model, ids[:, :5]), logits(model, ids[:, 5:])], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(packed, logits(model, ids), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_documents_packed_by_a_mask_see_nothing_of_each_other(dtype: torch.dtype) -> None:
    model, ids = host(), some_ids(1, 12)
    attached(model)
    seen = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3), torch.ones(7, 7)).tril().bool()
    seen[:2] = False  # padding before two documents
    mask = seen if dtype == torch.bool else torch.zeros(12, 12).masked_fill(~seen, torch.finfo(dtype).min)
    positions = torch.tensor([[0, 0, *range(3), *range(7)]])
    packed = logits(model, ids, position_ids=positions, attention_mask=mask[None, None])[:, 2:]
    apart = torch.cat([logits(model, ids[:, 2:5]), logits(model, ids[:, 5:])], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)


def test_the_tokenizer_is_found_where_the_model_was_loaded_from(tmp_path: Path) -> None:
    tokenizer = words_tokenizer()
    host().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    attachment = attached(model, memory=COMPRESSED)
    lookup = attachment.memory["0"].reader.lookup
    assert torch.equal(lookup, TokenCompressor.from_tokenizer(tokenizer, V).lookup)
    one, other = (tokenizer.convert_tokens_to_ids(word) for word in ("W7", "w7"))
    assert one != other
    assert lookup[one] == lookup[other]


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "olmoe"])
def test_a_tokenizer_that_was_never_saved_is_refused(name: str, tmp_path: Path) -> None:
    """For such a folder transformers makes one of special tokens alone."""
    host(name).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    refused("tokenizer is None, and the one of .* tokens, the model 90", model=model, memory=COMPRESSED)
    attach(model, LAYERS, COMPRESSED, tokenizer=["a", "b"])  # what is given is taken


def test_a_deep_copy_has_memory_of_its_own() -> None:
    model, ids = host(), some_ids(2, 9)
    attachment = attached(model)
    both = copy.deepcopy(model)
    expected = logits(model, ids)
    with torch.no_grad():
        attachment.memory["0"].table.weight.zero_()
    assert torch.equal(logits(both, ids), expected)
    assert not torch.equal(logits(model, ids), expected)
    attachment.remove()
    assert torch.equal(logits(both, ids), expected)


def test_save_pretrained_writes_the_model_without_its_memory(tmp_path: Path) -> None:
    model = host()
    names = set(model.state_dict())
    attached(model)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names


def test_rows_that_never_learn_stay_frozen_when_all_is_to_learn() -> None:
    model, ids = host(), some_ids(2, 9)
    before = logits(model, ids)
    attachment = attach(model, LAYERS, dataclasses.replace(MEMORY, kind="frozen_random"))
    assert torch.equal(logits(model, ids), before)
    assert attachment.memory["0"].table.weight.std() > 0  # they are what there is to read
    learns = {name for name, p in attachment.requires_grad_().named_parameters() if p.requires_grad}
    assert learns == {name for name, _ in attachment.named_parameters() if "table" not in name}
    offload(model, "host")
    for table in offloaded_tables(model).values():
        table.requires_grad_(True)
    assert {name for name, p in attachment.requires_grad_().named_parameters() if p.requires_grad} == learns
    assert model(ids).logits.requires_grad


def test_a_compiled_model_is_one_graph_with_the_same_logits_and_gradients() -> None:
    model, ids = host().train(), some_ids(2, 9)
    attachment = attached(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses, gradients = [], []
    for one in (model, compiled):
        loss = one(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.to_dense() for p in attachment.parameters() if p.grad is not None])
        attachment.zero_grad()
    torch.testing.assert_close(*losses)
    assert len(gradients[1]) == len(list(attachment.parameters()))
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


def refused(says: str, **options: Any) -> None:
    model = options.pop("model", None) or host()
    with pytest.raises(ConfigError, match=says):
        attach(model, **{"layers": LAYERS, "memory": MEMORY, **options})
    assert not hasattr(model, "engram")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_can_not_be_attached_is_refused_by_name() -> None:
    refused(r"layers is \(0, 3\)", layers=(0, BLOCKS))
    for layers in (1, (1.0,), ("1",)):
        refused("layers is .*allowed is block indices from 0", layers=layers)
    refused("memory is None", memory=None)
    refused("memory is {'rows': .*a MemoryConfig", memory={"rows": (10, 10)})
    refused("memory.d_model is 64", memory=dataclasses.replace(MEMORY, d_model=64))
    refused("memory.branches is 4", memory=dataclasses.replace(MEMORY, branches=4))
    refused("memory.rows", memory=dataclasses.replace(MEMORY, rows=(0, 0)))
    refused("memory.kind is 'over_encoding'", memory=dataclasses.replace(MEMORY, kind="over_encoding"))
    refused("tokenizer is None", memory=COMPRESSED)
    refused("tokenizer is 'int'", memory=COMPRESSED, tokenizer=3)
    refused("slack is -1", slack=-1)
    t5 = T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_heads=2)
    refused("without encoder", model=T5ForConditionalGeneration(t5))
    refused("PreTrainedModel", model=torch.nn.Linear(2, 2))
    bert = BertLMHeadModel(BertConfig(**SIZES, is_decoder=True))  # whose blocks are a module further down
    refused("number of block lists in .* is 0: allowed is one list, of 3 blocks", model=bert)


def test_a_second_memory_is_refused() -> None:
    model = host()
    attached(model)
    with pytest.raises(ConfigError, match="memory is attached"):
        attached(model)


def test_embeddings_without_ids_are_refused() -> None:
    model, ids = host(), some_ids(2, 9)
    attached(model)
    with pytest.raises(ConfigError, match="inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    logits(model, ids)  # nothing of the failed call is left


def test_a_mask_that_does_not_say_what_is_padding_is_refused() -> None:
    model, ids = host(), some_ids(2, 9)
    attached(model)
    for mask in (torch.ones(2, 1, 9, 9, dtype=torch.int64), torch.ones(9), {"sliding_attention": torch.ones(9)}):
        with pytest.raises(ConfigError, match="attention_mask is"):
            model(ids, attention_mask=mask)


def test_a_block_called_alone_is_refused() -> None:
    model = host()
    attached(model)
    with pytest.raises(ConfigError, match="block 2 is called outside"):
        model.model.layers[2](torch.zeros(1, 2, D))
