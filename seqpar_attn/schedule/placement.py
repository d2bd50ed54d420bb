"""Placements: which rank computes which (query block, key block) pairs in which step. A method is one of these."""

from __future__ import annotations

from .data import Block

Placement = list[list[list[tuple[Block, Block]]]]
"""``[step][rank]`` -> (query block, key block) pairs."""


def ring_placement(
    shards: list[Block],
    owners_per_step: int,
    ranks_per_host: int,
    own_number_last: bool = False,
    few_last: bool = False,
) -> Placement:
    """A ring of hosts around a ring of the ranks in each; with one host, ring attention (Liu et al. 2023).

    Rank g of host h attends, for every distance of hosts (the outer ring) and for every distance of ranks (the inner
    one), the keys of rank g - inner of host h - outer, ``owners_per_step`` of them in each step; its own first of all.
    With several hosts this is the order of LoongTrain's Double-Ring-Attention (Gu et al. 2024, arXiv 2406.18485).

    ``own_number_last``: of the ranks of another host, the one with the own number comes last instead of first.
    ``few_last``: the last step takes the keys of one rank only. Backward's last dk and dv return after all work, and
    the fewer they are, the less there is to wait for.
    """
    world_size = len(shards)
    placement: Placement = []
    for outer in range(0, world_size, ranks_per_host):
        first = 1 if outer and own_number_last else 0
        end = ranks_per_host
        if few_last and outer + end == world_size and end > 2:
            end -= 1
        steps = [range(i, min(i + owners_per_step, end)) for i in range(0 if outer else 1, end, owners_per_step)]
        steps += [range(end, ranks_per_host)] if end < ranks_per_host else []
        for step in steps if outer else [range(1), *steps]:
            row = []
            for rank in range(world_size):
                number = rank % ranks_per_host
                host = (rank - number - outer) % world_size
                owners = [host + (number - first - inner) % ranks_per_host for inner in step]
                row.append([(shards[rank], shards[owner]) for owner in owners])
            placement.append(row)
    return placement


def own_work_last(placement: Placement, shards: list[Block]) -> Placement:
    """The same, but half of the work on the own keys comes last: that of the later chunk's queries on the earlier keys.

    Backward's last step is followed by the return of its dk and dv, which nothing would hide otherwise. What stays
    first, while the first keys are on their way, begins the sums of all own keys.
    """
    first = [[(Block(x.owner, (chunk,)), Block(x.owner, (chunk,))) for chunk in x.chunks] for x in shards]
    last = [[(Block(x.owner, x.chunks[1:]), Block(x.owner, x.chunks[:1]))] for x in shards]
    return [first, *placement[1:], last]


def dist_flash_placement(shards: list[Block]) -> Placement:
    """DistFlashAttn's balanced causal schedule (Li et al. 2023) on contiguous shards, complete for every world size.

    Rank r at step t attends the keys of rank r - t if there is one, else it helps rank W + r - t: that rank's queries
    on its own keys. Helping covers the distances W - t, so at odd W it goes on to the last step (W - 1) / 2; at even
    W the last distance W / 2 belongs to both ranks of a pair, which take half of its queries each.
    """
    world_size = len(shards)
    placement: Placement = [[[(shard, shard)] for shard in shards]]
    for t in range(1, world_size // 2 + 1):
        row: list[list[tuple[Block, Block]]] = []
        for r in range(world_size):
            helping = r < t
            query = shards[world_size + r - t] if helping else shards[r]
            key = shards[r] if helping else shards[r - t]
            if 2 * t == world_size:
                half = len(query.chunks) // 2
                query = Block(query.owner, query.chunks[:half] if helping else query.chunks[half:])
            row.append([(query, key)])
        placement.append(row)
    return placement
