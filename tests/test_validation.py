"""Bad input is a ValueError that says expected and got, before anything is computed."""

import pytest
import torch

import seqpar_attn
from seqpar_attn import LoopbackGroup

GROUP = LoopbackGroup(4)


def tensors(q=(1, 16, 4, 8), kv=(1, 16, 2, 8), dtypes=(torch.float32,) * 3):
    return [torch.zeros(shape, dtype=dtype) for shape, dtype in zip((q, kv, kv), dtypes)]


TENSORS = {
    "three dimensions": (tensors(q=(16, 4, 8)), "shape"),
    "batch": (tensors(kv=(2, 16, 2, 8)), "one batch"),
    "seqlen": (tensors(kv=(1, 8, 2, 8)), "one seqlen"),
    "headdim": (tensors(kv=(1, 16, 2, 16)), "one headdim"),
    "heads": (tensors(kv=(1, 16, 3, 8)), "multiple"),
    "no heads": (tensors(kv=(1, 16, 0, 8)), "multiple"),
    "no headdim": (tensors(q=(1, 16, 4, 0), kv=(1, 16, 2, 0)), "headdim"),
    "k and v": ([*tensors()[:2], torch.zeros(1, 16, 4, 8)], "k and v of one shape"),
    "mixed dtypes": (tensors(dtypes=(torch.float32, torch.bfloat16, torch.float32)), "one dtype"),
    "integers": (tensors(dtypes=(torch.int32,) * 3), "bfloat16"),
    "devices": ([torch.zeros(1, 16, 4, 8), *(torch.zeros(1, 16, 2, 8, device="meta") for _ in "kv")], "one device"),
    "length": (tensors(q=(1, 12, 4, 8), kv=(1, 12, 2, 8)), "divisible by 8"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name):
    (q, k, v), words = TENSORS[name]
    with pytest.raises(ValueError, match=f"expected.*{words}") as error:
        seqpar_attn.ring_attention(q, k, v, group=GROUP)
    assert "got" in str(error.value)


ARGUMENTS = {
    "layout": ({"layout": "spiral"}, "layout"),
    "transfer": ({"transfer": "push"}, "transfer"),
    "backend": ({"backend": "fastest"}, "auto or one of"),
    "unavailable backend": ({"backend": "cudnn"}, "cudnn"),
    "window": ({"window_size": 0}, "window_size"),
    "window bool": ({"window_size": True}, "window_size"),
    "window without causality": ({"window_size": 4, "causal": False}, "causal=True"),
    "softcap": ({"softcap": -1.0}, "softcap"),
    "softcap inf": ({"softcap": float("inf")}, "softcap"),
    "scale": ({"softmax_scale": float("nan")}, "softmax_scale"),
    "scale sign": ({"softmax_scale": 0.0}, "softmax_scale"),
    "empty documents": ({"cu_seqlens": []}, "start at 0"),
    "documents from 1": ({"cu_seqlens": [1, 16]}, "start at 0"),
    "unsorted documents": ({"cu_seqlens": [0, 9, 5, 16]}, "ascending"),
    "short documents": ({"cu_seqlens": [0, 9]}, "global length 16"),
    "float documents": ({"cu_seqlens": [0, 9.5, 16]}, "integers"),
    "two-dimensional documents": ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, "one-dimensional"),
    "dropout": ({"dropout_p": 0.5}, "dropout_p=0"),
    "group": ({"group": "world"}, "ProcessGroup"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    arguments, words = ARGUMENTS[name]
    with pytest.raises(ValueError, match=words) as error:
        seqpar_attn.ring_attention(*tensors(), **({"group": GROUP} | arguments))
    assert "expected" in str(error.value) and "got" in str(error.value)


def test_dist_flash_needs_contiguous_shards():
    with pytest.raises(ValueError, match=r"expected layout 'contiguous'.*got 'zigzag'"):
        seqpar_attn.dist_flash_attention(*tensors(), group=GROUP, layout="zigzag")
    with pytest.raises(ValueError, match="got 'all_gather'"):
        seqpar_attn.dist_flash_attention(*tensors(), group=GROUP, transfer="all_gather")


def test_loopback_group():
    with pytest.raises(ValueError, match="world_size"):
        LoopbackGroup(0)


def test_documents_may_be_a_tensor_or_numbers():
    q, k, v = (torch.randn(1, 16, 2, 8) for _ in range(3))
    results = [
        seqpar_attn.ring_attention(q, k, v, group=GROUP, cu_seqlens=form)
        for form in ((0, 3, 16), [0, 3, 16], torch.tensor([0, 3, 16], dtype=torch.int32))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
