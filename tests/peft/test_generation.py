"""Text generation with a trained adapter: neither the KV cache nor the rest of the batch changes anything."""

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from tests.helpers.peft_models import SMALL
from tests.helpers.tiny_models import TARGETS, VOCAB, batch, build

LENGTH = 12


def with_peft(kind: str) -> nn.Module:
    config = fk.FVAELoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS[kind], **SMALL)
    return peft.get_peft_model(build(kind).double(), config, autocast_adapter_dtype=False)


def without_peft(kind: str) -> nn.Module:
    model = build(kind).double()
    fk.replace_linears(model, fk.FVAELoraConfig(**SMALL).to_fvae_config(), TARGETS[kind])
    return model


def trained(make: Callable[[str], nn.Module], kind: str) -> nn.Module:
    """A model after steps that change its outputs."""
    torch.manual_seed(0)
    model = make(kind).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for step in range(10):
        optimizer.zero_grad()
        model(**batch(kind, seed=step)).loss.backward()
        optimizer.step()
    return model.eval()


def generate(model: nn.Module, ids: Tensor, cache: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens, and the scores of the new ones."""
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
        use_cache=cache,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.scores)


@pytest.mark.compat("Models", "generation with a KV cache: Llama, GPT-2, T5")
@pytest.mark.parametrize("make", [with_peft, without_peft])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_with_a_cache_is_generation_without(make: Callable[[str], nn.Module], kind: str) -> None:
    model, ids = trained(make, kind), torch.randint(1, VOCAB, (2, 5))
    cached, scores = generate(model, ids, True)
    plain, expected = generate(model, ids, False)
    assert torch.equal(cached, plain)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(generate(model, ids, True)[0], cached)  # nothing is sampled
    bare = build(kind).double().eval()
    assert not torch.equal(generate(bare, ids, True)[0], cached), "the adapter says nothing of its own"
    for row in ids:  # rows of a batch do not affect each other
        alone, _ = generate(model, row[None], True)
        assert torch.equal(alone[0], cached[(cached[:, :5] == row).all(1)][0])


@pytest.mark.parametrize("make", [with_peft, without_peft])
def test_prompts_padded_on_the_left(make: Callable[[str], nn.Module]) -> None:
    model, ids = trained(make, "llama"), torch.randint(1, VOCAB, (1, 5))
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1), torch.ones(1, 8, dtype=torch.long)
    mask[:, :3] = 0
    expected, _ = generate(model, ids, True)
    for cache in (True, False):
        got, _ = generate(model, padded, cache, mask)
        assert torch.equal(got[:, 3:], expected)


def test_a_disabled_adapter_is_the_base_model() -> None:
    model, ids = trained(with_peft, "llama"), torch.randint(1, VOCAB, (2, 5))
    with model.disable_adapter():
        got, _ = generate(model, ids, True)
    assert torch.equal(got, generate(build("llama").double().eval(), ids, True)[0])
