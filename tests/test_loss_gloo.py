"""The losses over the ranks of a group, and over a vocabulary in slices: values and gradients of one device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from loss_cases import Case, make_labels, make_linear, ours, plain

import seqpar_attn
from seqpar_attn import LoopbackGroup
from seqpar_attn.testing.distributed import RankPool

CASE = Case(tokens=29, vocab=31, hidden=8, label_smoothing=0.1, z_loss=1e-3, softcap=5.0, bias=True)
DTYPE = torch.float64


@pytest.fixture(scope="module", params=[1, 2, 3])
def pool(request):
    with RankPool(request.param, timeout=120) as pool:
        yield pool


@pytest.fixture(scope="module")
def three():
    with RankPool(3, timeout=120) as pool:
        yield pool


def problem(case=CASE):
    inputs, labels = make_linear(case, DTYPE), make_labels(case)
    return inputs, labels, plain(inputs, labels, case)


def as_logits(inputs):
    return {"logits": torch.nn.functional.linear(inputs["hidden"], inputs["weight"], inputs["bias"])}


def close(x, y, name=""):
    assert x.shape == y.shape and (x - y).abs().max() < 1e-12, name


# The mean over all tokens of a group ---------------------------------------------------------------------------------


def cuts(tokens, world_size):
    """Shards of different lengths; the last rank of three has none."""
    inner = {1: [], 2: [11], 3: [20, tokens]}[world_size]
    return [0, *inner, tokens]


def share_of_mean(rank, world_size, inputs, labels, case, grad_reduction):
    bounds = cuts(len(labels), world_size)
    mine = slice(bounds[rank], bounds[rank + 1])
    results = []
    for kind in ("linear", "chunks", "logits", "inplace"):
        given = {**inputs, "hidden": inputs["hidden"][mine]} if kind in ("linear", "chunks") else None
        if given is None:
            given = {"logits": as_logits(inputs)["logits"][mine]}
        extra = {"chunks": {"logits_bytes": 32 * 8 * 4}, "inplace": {"inplace": True}}.get(kind, {})
        got = ours(given, labels[mine], case, group=None, grad_reduction=grad_reduction, **extra)
        results.append((kind, got))
    return results


@pytest.mark.parametrize("grad_reduction", ["sum", "mean"])
@pytest.mark.parametrize("valid", ["some", "one rank's", "none"])
def test_mean_over_all_tokens(pool, grad_reduction, valid):
    """Adding or averaging the ranks' losses and gradients gives those of one device."""
    inputs, labels, _ = problem()
    bounds = cuts(len(labels), pool.world_size)
    if valid != "some":
        labels[bounds[1] if valid == "none" and pool.world_size == 1 else 0 if valid == "none" else bounds[1] :] = -100
        labels[: bounds[1]] = -100 if valid == "none" else labels[: bounds[1]].abs() % 31
    truth = plain(inputs, labels, CASE)
    dlogits = plain(as_logits(inputs), labels, CASE)["dlogits"]
    ranks = pool.run(share_of_mean, inputs, labels, CASE, grad_reduction)
    scale = 1.0 if grad_reduction == "sum" else 1 / pool.world_size
    for number, (kind, _) in enumerate(ranks[0]):
        got = [results[number][1] for results in ranks]
        close(sum(x["loss"] for x in got) * scale, truth["loss"], kind)
        if "dlogits" in got[0]:
            close(torch.cat([x["dlogits"] for x in got]) * scale, dlogits, kind)
            continue
        close(torch.cat([x["dhidden"] for x in got]) * scale, truth["dhidden"], kind)
        for name in ("dweight", "dbias"):
            close(sum(x[name] for x in got) * scale, truth[name], f"{kind} {name}")
        if valid == "one rank's":
            assert all(not x["dweight"].any() and not x["loss"] for x in got[1:])
        if valid == "none":
            assert all(not g.any() for x in got for g in x.values())


def ddp_step(rank, world_size, inputs, labels):
    """A module whose gradients DistributedDataParallel averages."""
    model = torch.nn.Linear(8, 31).double()
    with torch.no_grad():
        model.weight.copy_(inputs["weight"])
        model.bias.copy_(inputs["bias"])
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    bounds = cuts(len(labels), world_size)
    mine = slice(bounds[rank], bounds[rank + 1])
    loss = seqpar_attn.cross_entropy(
        wrapped(inputs["hidden"][mine]), labels[mine], grad_reduction="mean", **CASE.options
    )
    loss.backward()
    return model.weight.grad, model.bias.grad


def test_distributed_data_parallel(pool):
    inputs, labels, truth = problem()
    for dweight, dbias in pool.run(ddp_step, inputs, labels):
        close(dweight, truth["dweight"])
        close(dbias, truth["dbias"])


def count_collectives(rank, world_size, inputs, labels):
    calls = []
    for name in ("all_reduce", "all_gather_into_tensor"):
        original = getattr(dist, name)
        setattr(dist, name, lambda *a, f=original, n=name, **k: (calls.append(n), f(*a, **k))[1])
    ours(inputs, labels, CASE)
    ours(inputs, labels, CASE, reduction="sum")
    ours(inputs, labels, CASE, group=LoopbackGroup(1))
    return calls


def test_one_all_reduce(three):
    inputs, labels, _ = problem()
    assert three.run(count_collectives, inputs, labels) == [["all_reduce"]] * 3


# A vocabulary in slices ----------------------------------------------------------------------------------------------


def sliced(rank, world_size, inputs, labels, case, vocab_size, upstream):
    group = dist.group.WORLD
    alone = {} if upstream is not None else {"group": LoopbackGroup(1)}
    share = -(-case.vocab // world_size)
    mine = slice(rank * share, max(rank * share, min((rank + 1) * share, case.vocab)))
    results = []
    for kind in ("linear", "chunks", "logits", "inplace"):
        if kind in ("linear", "chunks"):
            given = {"hidden": inputs["hidden"], "weight": inputs["weight"][mine], "bias": inputs["bias"][mine]}
        else:
            given = {"logits": as_logits(inputs)["logits"][:, mine]}
        extra = {"chunks": {"logits_bytes": 16 * 8 * 4}, "inplace": {"inplace": True}}.get(kind, {})
        got = ours(given, labels, case, upstream, tp_group=group, vocab_size=vocab_size, **alone, **extra)
        results.append((kind, got))
    return results


@pytest.mark.parametrize("upstream", [False, True], ids=["mean", "none"])
@pytest.mark.parametrize("vocab", [30, 31, 4, 1])
def test_vocabulary_in_slices(pool, vocab, upstream):
    """Equal slices, a shorter last one, and ranks with no words at all."""
    case = dataclasses.replace(CASE, vocab=vocab)
    inputs, labels, _ = problem(case)
    weights = torch.randn(case.tokens, dtype=DTYPE) if upstream else None
    truth = plain(inputs, labels, case, None, weights)
    dlogits = plain(as_logits(inputs), labels, case, None, weights)["dlogits"]
    ranks = pool.run(sliced, inputs, labels, case, None if vocab % pool.world_size == 0 else vocab, weights)
    for number, (kind, _) in enumerate(ranks[0]):
        got = [results[number][1] for results in ranks]
        for x in got:
            for name in ("loss", "tokens", "dhidden"):  # everyone's
                if name in x:
                    close(x[name], truth[name], f"{kind} {name}")
        if "dlogits" in got[0]:
            close(torch.cat([x["dlogits"] for x in got], 1), dlogits, kind)
        else:
            for name in ("dweight", "dbias"):
                close(torch.cat([x[name] for x in got]), truth[name], f"{kind} {name}")


def both_groups(rank, world_size, inputs, labels):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "tp"))
    sp, tp = mesh["sp"].get_local_rank(), mesh["tp"].get_local_rank()
    tokens = slice(0, 11) if sp == 0 else slice(11, None)
    words = slice(0, 16) if tp == 0 else slice(16, None)
    given = {"hidden": inputs["hidden"][tokens], "weight": inputs["weight"][words], "bias": inputs["bias"][words]}
    return ours(given, labels[tokens], CASE, group=mesh["sp"], tp_group=mesh["tp"], vocab_size=31)


def test_tokens_and_vocabulary():
    inputs, labels, truth = problem()
    with RankPool(4, timeout=120) as pool:
        got = pool.run(both_groups, inputs, labels)
    close(got[0]["loss"] + got[2]["loss"], truth["loss"])
    close(got[1]["loss"] + got[3]["loss"], truth["loss"])
    close(torch.cat([got[0]["dhidden"], got[3]["dhidden"]]), truth["dhidden"])
    close(torch.cat([got[0]["dweight"] + got[2]["dweight"], got[1]["dweight"] + got[3]["dweight"]]), truth["dweight"])


# What is wrong on one rank is an error on all ------------------------------------------------------------------------


def complaint(rank, world_size, common, odd, tp):
    arguments = {"labels": torch.zeros(4, dtype=torch.long), "width": 6, "words": 9} | common
    arguments |= odd if rank == 1 else {}
    width, words, labels = (arguments.pop(name) for name in ("width", "words", "labels"))
    if tp:
        arguments |= {"tp_group": dist.group.WORLD, "group": LoopbackGroup(1)}
    try:
        seqpar_attn.linear_cross_entropy(torch.zeros(4, width), torch.zeros(words, width), labels, **arguments)
    except ValueError as error:
        return str(error)
    return "no error"


ODD = {
    "label": ({"labels": torch.tensor([0, 9, 0, 0])}, False, ("out", "such labels")),
    "shape": ({"labels": torch.zeros(3, dtype=torch.long)}, False, ("rank 1", "labels of the shape of hidden")),
    "smoothing": ({"label_smoothing": 2.0}, False, ("rank 1", "label_smoothing")),
    "grad_reduction": ({"grad_reduction": "mean"}, False, ("rank 1", "grad_reduction")),
    "tp width": ({"width": 5}, True, ("rank 1", "hidden size")),
    "tp slice": ({"words": 8}, True, ("rank 1", "vocabulary slice")),
    "tp vocab_size": ({"vocab_size": 26}, True, ("rank 1",)),
    "tp softcap": ({"softcap": 5.0}, True, ("rank 1", "softcap")),
    "tp logits_bytes": ({"logits_bytes": 99}, True, ("rank 1", "logits_bytes")),
}


@pytest.mark.parametrize("name", ODD)
def test_everyone_raises(three, name):
    odd, tp, words = ODD[name]
    for message in three.run(complaint, {}, odd, tp):
        assert "expected" in message and "got" in message, message
        assert all(word in message for word in words if word != "out"), message
