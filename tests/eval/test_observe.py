import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from stepping import held_out_batch, stepped

from engram.backbone import EngramLM
from engram.config import ModelConfig
from eval.shared.observe import mean_branch, observed, places_of
from eval.shared.subjects import open_subjects


def _small(kind: str, branches: int) -> EngramLM:
    memory = {"kind": kind, "orders": [2], "n_heads": 1, "row_width": 16, "rows": [31], "compress": False}
    model = EngramLM(
        ModelConfig.from_dict(
            {
                "vocab_size": 40,
                "d_model": 16,
                "n_layers": 2,
                "n_dense_layers": 1,
                "dense_width": 24,
                "branches": branches,
                "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8},
                "experts": {"n_experts": 4, "top_k": 2, "width": 8},
                "memory": memory,
            }
        )
    )
    for parameter in model.parameters():  # rows that start at zero would hide what is added
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _compare(model: EngramLM, tokens: torch.Tensor, documents: torch.Tensor | None) -> list[str]:
    places = places_of(model)
    with torch.no_grad(), observed(model, places) as states:
        hidden = model.run(tokens, documents).hidden
    by_hand = stepped(model, tokens, documents)
    for one, two in pairwise(by_hand.values()):
        assert not torch.allclose(mean_branch(one), mean_branch(two), atol=1e-2)
    assert [place.name for place in places] == list(by_hand)
    assert states.keys() == by_hand.keys()
    for name, state in by_hand.items():
        assert states[name].shape == state.shape or model.config.branches > 1
        torch.testing.assert_close(mean_branch(states[name]), mean_branch(state), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden, model.norm(mean_branch(states[places[-1].name])))
    assert [place.depth for place in places] == sorted({place.depth for place in places})
    return list(by_hand)


def test_states_are_those_of_the_parts_called_by_hand(branches_run: Path, experts_run: Path) -> None:
    for run, n_places in ((branches_run, 6), (experts_run, 4)):
        (subject,) = open_subjects([run])
        batch = held_out_batch(subject, 3)
        assert len(_compare(subject.model, batch["tokens"], batch["document_ids"])) == n_places


@pytest.mark.parametrize("branches", [1, 2])
def test_memories_on_the_embedding_and_before_every_block_are_seen(branches: int) -> None:
    tokens = torch.randint(40, (2, 9))
    assert "memory on the embedding" in _compare(_small("over_encoding", branches), tokens, None)
    assert "memory before block 1" in _compare(_small("additive_bigram", branches), tokens, None)


def test_branches_are_kept_apart_until_they_are_averaged(branches_run: Path) -> None:
    (subject,) = open_subjects([branches_run])
    batch = held_out_batch(subject, 2)
    model, places = subject.model, places_of(subject.model)[-1:]
    with torch.no_grad(), observed(model, places) as states, observed(model, places, mean_branch) as means:
        model.run(batch["tokens"], batch["document_ids"])
    (state,), (mean,) = states.values(), means.values()
    assert state.shape == (2, 64, 2, 48)
    assert not torch.allclose(state[:, :, 0], state[:, :, 1])
    torch.testing.assert_close(mean, (state[:, :, 0] + state[:, :, 1]) / 2)


def test_the_model_is_left_as_it_was_after_an_exception_too() -> None:
    model = _small("over_encoding", 2)
    before = copy.deepcopy(model.state_dict())

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def interrupted() -> None:
        with observed(model, places_of(model)) as states:
            assert hooks() == 4
            model(torch.randint(40, (1, 5)))
            assert len(states) == 4
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert hooks() == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
