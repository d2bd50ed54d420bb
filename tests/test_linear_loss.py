"""A Hugging Face model's loss without its logits: the same loss and gradients."""

import pytest
import torch

pytest.importorskip("transformers")
from hf_models import VOCABULARY, build, gradients

import seqpar_attn
from seqpar_attn.integrations.linear_loss import use_linear_loss
from seqpar_attn.integrations.transformers import enable


def ids():
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("num_items", [None, 40], ids=["mean", "given"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_loss_and_gradients(family, num_items):
    labels = ids().masked_fill(ids() % 3 == 0, -100)
    plain, model = build(family), build(family)
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    expected = plain(input_ids=ids(), labels=labels, use_cache=False, **options).loss
    expected.backward()
    handle = use_linear_loss(model)
    found = model(input_ids=ids(), labels=labels, use_cache=False, **options)
    found.loss.backward()
    assert found.logits is None
    torch.testing.assert_close(found.loss.double(), expected.double(), rtol=1e-6, atol=0)
    scale = max(x.abs().max().item() for x in gradients(plain).values())
    for name, x in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], x, rtol=0, atol=2e-6 * scale, msg=name)
    logits = plain(input_ids=ids(), use_cache=False).logits
    assert torch.equal(model(input_ids=ids(), use_cache=False).logits, logits)
    handle.remove()
    assert "forward" not in model.__dict__


def test_virtual_ranks_and_autocast():
    model, group = build("llama").float(), seqpar_attn.LoopbackGroup(3)
    expected = model(input_ids=ids(), labels=ids(), use_cache=False).loss
    enable(model, group, backend="reference")
    use_linear_loss(model)
    batch = seqpar_attn.shard_batch(ids(), group=group)
    call = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    targets = {"labels": batch.labels, "shift_labels": batch.labels}
    torch.testing.assert_close(model(**call, **targets).loss, expected, rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**call, **targets).loss, expected, rtol=2e-2, atol=0)


def test_refused():
    with pytest.raises(ValueError, match="expected a causal language model with a head, got LlamaModel"):
        use_linear_loss(build("llama").model)
    with pytest.raises(ValueError, match="expected a causal language model with a head, got Linear"):
        use_linear_loss(torch.nn.Linear(2, 2))
    model = build("llama")
    model.config.logits_scaling = 8.0
    with pytest.raises(
        ValueError, match=r"expected a model whose logits are its head's output, got \{'logits_scaling'"
    ):
        use_linear_loss(model)
    model = build("gpt_oss")
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="expected output_router_logits=False, got True"):
        use_linear_loss(model)
