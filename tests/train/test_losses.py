"""The head loss equals PyTorch's, gradients too, however it is computed and whatever the model does to its logits."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

from elo.errors import EloError
from elo.train.loss import LogitTransform, head_cross_entropies, install_head_loss

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCAB = {"vocab_size": 50, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **VOCAB),
    "gemma2": Gemma2Config(
        **SIZES, **VOCAB, num_key_value_heads=1, head_dim=8, final_logit_softcapping=5.0, sliding_window=8
    ),
    "granite": GraniteConfig(**SIZES, **VOCAB, logits_scaling=3.0),
    "cohere": CohereConfig(**SIZES, **VOCAB, logit_scale=0.25),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **VOCAB),
}


def _inputs(bias=False, n=37, d=12, v=23):
    generator = torch.Generator().manual_seed(1)
    hidden = (3 * torch.randn(n, d, generator=generator)).requires_grad_()
    weight = torch.randn(v, d, generator=generator).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels, torch.randn(v, generator=generator).requires_grad_() if bias else None


def _loss(hidden_ND, *arguments, **options):
    return head_cross_entropies([hidden_ND], *arguments, **options)[0]


@pytest.mark.parametrize("implementation", ["chunked", "plain", "linear_cross_entropy"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, softcap=4.0)])
def test_equals_reference_with_gradients(implementation, bias, transform):
    if implementation == "linear_cross_entropy" and transform != LogitTransform():
        pytest.skip("PyTorch's takes no transform")
    hidden, weight, labels, bias_V = _inputs(bias)
    parameters = [hidden, weight] + ([bias_V] if bias else [])
    logits = F.linear(hidden, weight, bias_V) * transform.scale
    if transform.softcap:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    expected_gradients = torch.autograd.grad(3 * expected, parameters)
    got = _loss(hidden, weight, labels, bias_V=bias_V, transform=transform, implementation=implementation, chunk=8)
    gradients = torch.autograd.grad(3 * got, parameters)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_only_the_rows_that_train_get_a_gradient(bias):
    hidden, weight, labels, bias_V = _inputs(bias)
    wanted = [hidden, weight] + ([bias_V] if bias else [])
    whole = _loss(hidden, weight, labels, bias_V=bias_V, implementation="chunked", chunk=8)
    part = _loss(hidden, weight, labels, bias_V=bias_V, implementation="chunked", chunk=8, first_row=9)
    assert torch.equal(whole, part)
    expected, got = torch.autograd.grad(whole, wanted), torch.autograd.grad(part, wanted)
    assert torch.equal(got[0], expected[0])
    assert not got[1][:9].any()
    torch.testing.assert_close(got[1][9:], expected[1][9:])


def test_frozen_head_gets_no_gradient_and_costs_none():
    hidden, weight, labels, _ = _inputs()
    loss = _loss(hidden, weight.detach(), labels, implementation="chunked", chunk=8)
    made = [gradient for gradient, _ in loss.grad_fn.gradients]
    assert made[0] is not None
    assert made[1] is None and made[2] is None
    loss.backward(retain_graph=True)
    assert hidden.grad is not None
    with pytest.raises(RuntimeError, match="only one backward pass"):  # its gradients were scaled in place
        loss.backward()


def test_the_weights_gradient_under_autocast_is_summed_in_fp32():
    hidden, weight, labels, _ = _inputs(n=512)
    rounded = [each.detach().bfloat16().float().requires_grad_() for each in (hidden, weight)]
    whole = _loss(*rounded, labels, implementation="chunked", chunk=8)
    (expected,) = torch.autograd.grad(whole, rounded[1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(hidden, weight, labels, implementation="chunked", chunk=8)
    (got,) = torch.autograd.grad(loss, weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.0, atol=4e-3 * float(expected.abs().max()))
    assert not torch.equal(got, got.bfloat16().float())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("implementation", ["chunked", "plain", "model"])
def test_installed_loss_is_the_models_own(family, implementation):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).float().eval()
    with torch.no_grad():  # far from zero logits, where a forgotten softcap or scale would show
        model.get_output_embeddings().weight.mul_(40)
    ids = torch.randint(3, 50, (2, 9))
    labels = torch.randint(3, 50, (2, 9))
    labels[0, 4] = -100
    expected = F.cross_entropy(model(input_ids=ids).logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    before = model.forward
    restore = install_head_loss(model, implementation)
    own_path = "forward_model" not in model.forward.__qualname__
    assert own_path == (implementation != "model"), "the model's head was not recognised"
    loss = model(input_ids=ids, shift_labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
    assert model(input_ids=ids).logits.shape == (2, 9, 50)
    restore()
    assert model.forward == before


def test_unknown_logit_arithmetic_falls_back_to_the_model():
    model = AutoModelForCausalLM.from_config(CONFIGS["gemma2"]).float()
    cap, model.config.final_logit_softcapping = model.config.final_logit_softcapping, None
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *_: torch.tanh(_[2] / cap) * cap)
    install_head_loss(model, "chunked")
    assert "forward_model" in model.forward.__qualname__


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("implementation", ["chunked", "plain"])
def test_several_losses_are_their_weighted_sum(implementation, bias):
    hidden, weight, labels, bias_V = _inputs(bias)
    other = (hidden * 0.3).detach().requires_grad_()
    parameters = [hidden, other, weight] + ([bias_V] if bias else [])
    options = {"bias_V": bias_V, "transform": LogitTransform(scale=0.5, softcap=4.0)}
    each = [_loss(block, weight, labels, implementation="plain", **options) for block in (hidden, other, other)]
    expected = torch.autograd.grad(each[0] + 0.25 * each[1] + 2 * each[2], parameters)
    loss, nats_S = head_cross_entropies(
        [hidden, other, other],
        weight,
        labels,
        weights=(1.0, 0.25, 2.0),
        implementation=implementation,
        chunk=8,
        **options,
    )
    torch.testing.assert_close(nats_S, torch.stack(each).detach())
    assert not nats_S.requires_grad
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_supervised_layers_have_the_loss_of_the_plain_formula(family):
    """Cross-entropy of an internal layer's hidden states through final norm, head and the transform of the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).float().eval()
    ids, labels = torch.randint(3, 50, (2, 9)), torch.randint(3, 50, (2, 9))
    labels[0, 4] = -100
    states = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    norm = model.get_submodule("transformer.ln_f" if family == "gpt2" else "model.norm")
    transform = LogitTransform.of(model.config)
    internal = transform(model.get_output_embeddings()(norm(states.hidden_states[1])))
    main, extra = (
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") for logits in (states.logits, internal)
    )
    (main + 0.5 * extra).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    restore = install_head_loss(model, "chunked", supervised={0: 0.5})
    output = model(input_ids=ids, shift_labels=labels)
    output.loss.backward()
    torch.testing.assert_close(output.loss, main + 0.5 * extra)
    torch.testing.assert_close(output.nats, torch.stack([main, extra]).detach())
    for name, parameter in model.named_parameters():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)
    restore()
    assert hooks == [len(module._forward_hooks) for module in model.modules()]


def test_layers_are_not_supervised_where_norm_and_head_are_not_all_of_the_rest():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).float()
    with pytest.raises(EloError, match="write head_loss: chunked"):
        install_head_loss(model, "model", supervised={0: 1.0})
    norm = model.model.norm.forward
    model.model.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] + len(model.model.layers),))
    model.model.register_forward_hook(lambda _, __, output: output.__setitem__("last_hidden_state", norm(output[0])))
    with pytest.raises(EloError, match="not those of its final norm"):
        install_head_loss(model, "chunked", supervised={0: 1.0})
    assert not [layer for layer in model.model.layers if layer._forward_hooks]
