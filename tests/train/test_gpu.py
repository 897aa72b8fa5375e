"""What only a GPU can show. Skipped without one."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from elo.train.attention import VARLEN, choose_attention, document_starts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = (100, 300, 112)


def _hidden(model, ids, positions, attention):
    extra = {}
    if attention == VARLEN:
        boundaries, longest = document_starts(positions)
        extra = {
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    with torch.autocast("cuda", torch.bfloat16):
        return model.model(input_ids=ids, position_ids=positions, use_cache=False, **extra)[0]


@pytest.mark.parametrize("heads, key_value_heads", [(4, 4), (9, 3), (4, 1)])
def test_varlen_is_chosen_agrees_and_does_not_leak(heads, key_value_heads):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64 * heads,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).cuda()
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0).cuda()
    ids = torch.randint(1, 1000, (1, sum(LENGTHS))).cuda()

    def both(attention):
        model.zero_grad()
        hidden = _hidden(model, ids, positions, attention)
        hidden.float().square().sum().backward()
        gradients = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
        return hidden.float().detach(), torch.cat(gradients)

    expected, expected_gradient = both("sdpa")
    assert choose_attention(model, sum(LENGTHS), "auto", torch.bfloat16) == VARLEN
    got, gradient = both(VARLEN)
    assert (got - expected).norm() < 0.02 * expected.norm()
    assert torch.cosine_similarity(gradient, expected_gradient, 0) > 0.999

    changed = ids.clone()
    changed[0, : LENGTHS[0]] = 7
    with torch.no_grad():
        before, after = (_hidden(model, each, positions, VARLEN) for each in (ids, changed))
    assert torch.equal(before[0, LENGTHS[0] :], after[0, LENGTHS[0] :])
    assert not torch.equal(before[0, : LENGTHS[0]], after[0, : LENGTHS[0]])
