"""EngramLM through transformers: the same logits, kept and loaded, and all of `generate` on its cache."""

import json
import pickle
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_causal_lm import CONFIG, LOOKUP, V
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, DynamicCache

import engram
from engram import ConfigError, EngramLM, ModelConfig
from engram.inference import generate, offload
from engram.interop.causal_lm import EngramConfig, EngramForCausalLM
from engram.training.tokenizer import train_bpe
from engram.training.weights import load_model, save_model

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied, branches": {"tied": True, "branches": 2},
    "raw ids": {"memory": {**CONFIG["memory"], "compress": False}},
    "over encoding": {"memory": {**CONFIG["memory"], "kind": "over_encoding"}},
    "no memory": {"memory": None},
}


def causal(lookup: Tensor | None = LOOKUP, **changes: Any) -> EngramForCausalLM:
    """With a convolution, and logits so far apart that rounding does not choose the likeliest."""
    model = EngramForCausalLM(EngramConfig(**{**CONFIG, **changes}), lookup).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv_weight" in name or "table" in name or name == "head.weight":
                parameter.normal_()
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_saved_is_loaded_by_auto_classes_with_the_same_logits(shape: str, tmp_path: Path) -> None:
    model, ids = causal(**SHAPES[shape]), torch.randint(0, V, (2, 9))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, EngramForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EngramConfig)
    assert loaded.config.model_config() == model.lm.config
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_the_token_compression_comes_with_the_weights(tmp_path: Path) -> None:
    """Ids that it makes one are one for the memory, and the loaded model still hashes by it."""
    model = causal()
    model.save_pretrained(tmp_path)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(0, V, (1, 9))
    same = ids ^ 1
    reader = loaded.lm.memory["1"].reader
    assert torch.equal(reader(ids), reader(same))
    raw = EngramForCausalLM(model.config)
    assert not torch.equal(raw.lm.memory["1"].reader(ids), raw.lm.memory["1"].reader(same))
    raw.load_state_dict(model.state_dict())
    assert torch.equal(raw.lm.memory["1"].reader(ids), model.lm.memory["1"].reader(ids))


def test_either_reads_what_the_other_wrote(tmp_path: Path) -> None:
    ids = torch.randint(0, V, (2, 9))
    own = EngramLM(ModelConfig.from_dict(CONFIG), LOOKUP).eval()
    loaded = AutoModelForCausalLM.from_pretrained(save_model(own, tmp_path / "own", LOOKUP))
    assert torch.equal(loaded.eval()(ids).logits, own(ids))
    loaded.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_model(tmp_path / "theirs").eval()(ids), own(ids))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_generate_with_its_cache_equals_without_and_equals_ours(shape: str) -> None:
    """Greedy, prompts of unequal length padded on the left, past where the cache grows."""
    model = causal(**SHAPES[shape]).double()
    prompts = [[3, 0, 5], [7, 1, 0, 12, 4], [9]]
    ids, mask = left_padded(prompts)
    settings: dict[str, Any] = {"max_new_tokens": 140, "do_sample": False, "attention_mask": mask}
    cached = model.generate(ids, **settings, pad_token_id=0)
    assert cached[:, 5:].tolist() == generate(model.lm, prompts, 140)
    short = {**settings, "max_new_tokens": 20}
    assert torch.equal(model.generate(ids, **short, use_cache=False, pad_token_id=0), cached[:, :25])


def with_auxiliary_loss() -> EngramForCausalLM:
    return causal(experts={**CONFIG["experts"], "balance": "sequence_aux", "aux_weight": 0.5})


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5, "temperature": 1.5, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 4, "batch": 1},
        {"prompt_lookup_num_tokens": 90, "batch": 1, "times": 20},
        {"repetition_penalty": 1.5},
        {"prefill_chunk_size": 2},
    ],
    ids=str,
)
def test_every_way_to_generate_is_the_same_with_and_without_the_cache(settings: dict[str, Any]) -> None:
    model = causal().double()
    settings = dict(settings)
    prompts = [[3, 0, 5, 3, 0, 5, 3, 0] * settings.pop("times", 1), [7, 1, 0, 12, 4]]
    ids, mask = left_padded(prompts[: settings.pop("batch", 2)])
    common: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "attention_mask": mask}
    outputs = []
    for cached in (True, False):
        chosen = dict(settings)
        if not cached:
            chosen.pop("prefill_chunk_size", None)  # there is none without a cache
            chosen.pop("prompt_lookup_num_tokens", None)  # these too
        torch.manual_seed(5)
        outputs.append(model.generate(ids, use_cache=cached, **{"do_sample": False, **chosen}, **common))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_logits_in_float16_are_those_without_a_cache_to_its_rounding(way: str) -> None:
    model, ids = causal(), torch.randint(0, V, (2, 9))
    if way == "weights":
        model.half()
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=way == "autocast"):
        whole, cache = model(ids).logits, model(ids[:, :4], use_cache=True).cache
        parts = [model(ids[:, t : t + 1], cache=cache).logits for t in range(4, 9)]
    assert whole.dtype == torch.float16
    # Of single products, and of some layers of them.
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, 4:], rtol=2**-8, atol=2**-8 * float(whole.abs().max()))


def test_a_cache_given_back_goes_on_where_it_was() -> None:
    """A second turn of a conversation, as transformers shows it."""
    model, ids = causal().double(), torch.randint(0, V, (1, 6))
    first = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    turn = torch.cat([first.sequences, torch.randint(0, V, (1, 4))], 1)
    again = model.generate(turn, cache=first.cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(again, model.generate(turn, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0))


def test_a_cache_may_come_by_its_older_name() -> None:
    model, ids = causal().double(), torch.randint(0, V, (2, 9))
    cache = model(ids[:, :5], use_cache=True).cache
    assert torch.equal(model(ids[:, 5:], past_key_values=deepcopy(cache)).logits, model(ids[:, 5:], cache=cache).logits)
    with pytest.raises(ConfigError, match="cache is 'DynamicCache'"):
        model(ids, past_key_values=DynamicCache())


def test_a_cache_that_is_cropped_goes_on_before_the_tokens_that_were_taken_back() -> None:
    """By a number below 0 alone: one above 0 has been how many to keep, and how many to take back."""
    model, ids = causal().double(), torch.randint(0, V, (2, 9))
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ConfigError, match="tokens_to_remove is 3: allowed is 0 or less"):
        cache.crop(3)
    cache.crop(0)
    assert cache.get_seq_length() == 9
    cache.crop(-3)
    torch.testing.assert_close(model(ids[:, 6:], cache=cache).logits, model(ids).logits[:, 6:])


def test_a_caches_sequences_are_multiplied_each_beside_its_own() -> None:
    model, ids = causal().double(), torch.randint(0, V, (2, 9))
    cache = model(ids[:, :6], use_cache=True).cache
    cache.batch_repeat_interleave(3)
    assert cache.get_seq_length() == 6
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    torch.testing.assert_close(model(ids[rows, 6:], cache=cache).logits, model(ids[rows]).logits[:, 6:])


def test_a_cache_that_is_reset_serves_another_text() -> None:
    model, ids = causal().double(), torch.randint(0, V, (1, 6))
    cache = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, pad_token_id=0).cache
    cache.reset()
    other = torch.randint(0, V, (1, 8))
    torch.testing.assert_close(model(other, cache=cache).logits, model(other).logits, rtol=1e-9, atol=1e-9)
    with pytest.raises(ConfigError, match="changed by the model alone"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_documents_packed_by_position_ids_are_apart() -> None:
    model, ids = causal().double(), torch.randint(0, V, (1, 11))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]])
    logits = model(ids, position_ids=positions).logits
    for part in ([0, 4], [4, 7], [7, 11]):
        alone = model(ids[:, slice(*part)]).logits
        torch.testing.assert_close(logits[:, slice(*part)], alone, rtol=1e-5, atol=1e-6)


def test_what_transformers_says_of_packing_beside_position_ids_changes_nothing() -> None:
    model = causal()
    texts = [{"input_ids": [3, 0, 5, 1]}, {"input_ids": [7, 1, 12]}]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(texts)
    ids, positions, seq_idx = batch["input_ids"], batch["position_ids"], batch["seq_idx"]
    assert torch.equal(model(**batch).logits, model(ids, position_ids=positions).logits)
    with pytest.raises(ConfigError, match="seq_idx is 'Tensor': allowed is none"):
        model(ids, seq_idx=seq_idx)


def test_padding_on_either_side_changes_nothing() -> None:
    model, ids = causal().double(), torch.randint(0, V, (2, 10))
    mask = torch.tensor([[0] * 3 + [1] * 7, [1] * 6 + [0] * 4])
    logits = model(ids, attention_mask=mask).logits
    for row, part in enumerate([slice(3, None), slice(0, 6)]):
        alone = model(ids[row : row + 1, part]).logits
        torch.testing.assert_close(logits[row : row + 1, part], alone, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_of_the_next_tokens_and_trains_every_part() -> None:
    model, ids = with_auxiliary_loss(), torch.randint(0, V, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    targets = labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(output.loss, expected)
    loss = model.train()(ids, labels=labels).loss
    aux = sum(stats.aux_loss for stats in model.lm.run(ids).routing)
    assert aux > 0.01
    torch.testing.assert_close(loss, expected + aux)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_some_logits_alone_are_those_of_all() -> None:
    model, ids = causal(), torch.randint(0, V, (2, 9))
    every = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=3).logits, every[:, -3:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, every[:, [1, 4]])
    assert torch.equal(model(ids, return_dict=False)[0], every)


def test_a_device_map_places_and_offloads_without_changing_anything(tmp_path: Path) -> None:
    model, ids = causal(), torch.randint(0, V, (2, 9))
    model.save_pretrained(tmp_path / "model")
    on_disk = {
        name: "disk" if name in ("memory", "blocks") else "cpu"
        for name in (*dict(model.named_children()), "token_lookup")
    }
    for places in ("auto", "cpu", on_disk):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
        )
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
        made = loaded.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(made, model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))


def test_copies_and_replaced_children_are_the_models_own() -> None:
    """A copy computes with its own weights, and what peft or a quantiser would put in a child's place is used."""
    model, ids = causal(), torch.randint(0, V, (1, 7))
    copy = deepcopy(model)
    with torch.no_grad():
        copy.get_submodule("embed").weight.zero_()
    assert not torch.equal(copy(ids).logits, model(ids).logits)
    assert torch.equal(copy(ids).logits, copy.lm(ids))
    copy.norm = torch.nn.Identity()
    assert copy.lm.norm is copy.norm


def test_an_adapter_counts_in_decoding_too() -> None:
    """Also where decoding reads a map's weight instead of calling it, as that of latent attention."""
    latent = {"kind": "mla", "n_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    for attention in (CONFIG["attention"], {**latent, "v_head_dim": 6}):
        bare, ids = causal(attention=attention).double(), torch.randint(0, V, (2, 9))
        before = bare(ids).logits
        settings = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(bare, settings).eval()
        cache = model(ids[:, :4], use_cache=True).cache
        logits = model(ids[:, 4:], cache=cache).logits
        torch.testing.assert_close(logits, model(ids).logits[:, 4:])
        assert (logits - before[:, 4:]).abs().max() > 0.01
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_goes_through_pickle() -> None:
    model, ids = causal(), torch.randint(0, V, (1, 7))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.lm.embed is again.embed


@pytest.mark.parametrize("sizes", [["10KB", "1GB"], ["1GB", "10KB"], ["10KB", "20KB"]], ids=str)
def test_a_model_saved_over_another_in_other_files_is_the_one_that_both_ways_load(
    sizes: list[str], tmp_path: Path
) -> None:
    ids = torch.randint(0, V, (2, 9))
    for size in sizes:
        model = causal()
        model.save_pretrained(tmp_path, max_shard_size=size)
        logits = model(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, logits)
        assert torch.equal(load_model(tmp_path).eval()(ids), logits)


def test_a_quantized_model_does_not_replace_the_one_it_was_made_of(tmp_path: Path) -> None:
    causal().save_pretrained(tmp_path, max_shard_size="10KB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    offload(model, "host", rows="int8")
    with pytest.raises(ConfigError, match=r"rows of memory\.1\.table is 'int8': allowed is float"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_losses_of_batches_add_up_to_that_of_all() -> None:
    """As the Trainer sums gradients of several batches: each gives its part of the mean over all their labels."""
    model, ids = with_auxiliary_loss(), torch.randint(0, V, (4, 9))
    labels = ids.clone()
    labels[0, :6] = -100
    n = (labels[:, 1:] != -100).sum()
    expected, total = model(ids, labels=labels).loss, torch.zeros(())
    model.train()
    for part in (slice(0, 2), slice(2, 4)):
        total = total + model(ids[part], labels=labels[part], num_items_in_batch=n).loss
        aux = sum(stats.aux_loss for stats in model.lm.run(ids[part]).routing)
        expected = expected + aux * (labels[part, 1:] != -100).sum() / n
    torch.testing.assert_close(total, expected)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    model = causal()
    model.save_pretrained(tmp_path)
    (tmp_path / "checksums.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["memory"]["rows"] = [31, 61]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"memory\.1\.table\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_damage_and_another_hash_are_refused_before_transformers_loads(tmp_path: Path) -> None:
    causal().save_pretrained(tmp_path / "theirs")
    weights = tmp_path / "theirs" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-3] ^= 16
    weights.write_bytes(damaged)
    with pytest.raises(ConfigError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    own = save_model(EngramLM(ModelConfig.from_dict(CONFIG), LOOKUP), tmp_path / "own", LOOKUP)
    config = json.loads((own / "config.json").read_text())
    config["memory"]["seed"] = 5
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="seed"):
        AutoModelForCausalLM.from_pretrained(own)


def test_what_is_not_supported_is_refused() -> None:
    model, ids = causal(), torch.randint(0, V, (1, 3))
    refused: list[tuple[str, Any]] = [
        ("input_ids is None", lambda: model(inputs_embeds=torch.randn(1, 3, 24))),
        ("shape of attention_mask is \\(1, 1, 3, 3\\)", lambda: model(ids, attention_mask=torch.ones(1, 1, 3, 3))),
        ("cache is 'DynamicCache'", lambda: model(ids, cache=DynamicCache())),
        ("inputs_embeds", lambda: model(ids, inputs_embeds=torch.randn(1, 3, 24))),
        ("output_hidden_states", lambda: model(ids, output_hidden_states=True)),
        ("output_router_logits", lambda: model(ids, output_router_logits=True)),
        ("atention_mask is 'Tensor': allowed is none", lambda: model(ids, atention_mask=torch.ones(1, 3))),
        ("cache_params is 'EngramCache'", lambda: model(ids, cache_params=model(ids, use_cache=True).cache)),
        ("new_num_tokens is 50", lambda: model.resize_token_embeddings(50)),
        ("pad_to_multiple_of is 64", lambda: model.resize_token_embeddings(pad_to_multiple_of=64)),
        (
            "attention.n_heads is missing",
            lambda: EngramForCausalLM(EngramConfig(**{**CONFIG, "attention": {"kind": "gqa"}})),
        ),
    ]
    for message, call in refused:
        with pytest.raises(ConfigError, match=message):
            call()


def test_a_folder_of_ours_has_all_that_transformers_needs_for_text(tmp_path: Path) -> None:
    """Model, tokenizer and the token that ends a text, by the Auto classes alone."""
    tokenizer = train_bpe(["a text to learn from, and some more of it"], 280)
    own = EngramLM(ModelConfig.from_dict({**CONFIG, "vocab_size": 280}), torch.arange(280) // 2)
    save_model(own, tmp_path, None, tokenizer)
    loaded, theirs = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "some more text"
    assert theirs(text).input_ids == tokenizer.encode(text).ids
    assert theirs.decode(theirs(text).input_ids) == text
    assert loaded.generation_config.eos_token_id == theirs.eos_token_id == tokenizer.token_to_id("<|eos|>")
    assert theirs.pad_token_id == tokenizer.token_to_id("<|pad|>")
    made = loaded.generate(**theirs(text, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert made[0, -8:].tolist() == generate(own.eval(), [tokenizer.encode(text).ids], 8)[0]


def test_what_transformers_saved_is_held_against_an_edited_config_too(tmp_path: Path, recwarn: Any) -> None:
    causal().save_pretrained(tmp_path)
    load_model(tmp_path)
    assert not [w for w in recwarn if "trained with" in str(w.message)]
    config = json.loads((tmp_path / "config.json").read_text())
    config["memory"]["seed"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ConfigError, match=r"memory\.seed is 5: the weights were trained with 0"):
            load(tmp_path)


def test_the_extra_asks_for_the_transformers_that_the_tests_ask_for() -> None:
    """Outputs of 5.23 have no `cache`."""
    extras = tomllib.loads((Path(engram.__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (asked,) = extras["transformers"]
    assert asked in extras["test"]
