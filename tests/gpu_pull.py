"""What the tests of one-sided reads run on every rank: windows by themselves, and layers that pull."""

from __future__ import annotations

import gpu_ring
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sparring.balance import from_assignment
from sparring.cp import ContextParallel
from sparring.cp.mesh import connect
from sparring.kernels.patterns import Dense, SinkWindow, VerticalSlash

AXES = ("nodes", "ranks")
PATTERNS = {  # unequal needs; in the backward, from the last to the first, more gradients each time
    0: Dense(),
    1: VerticalSlash(0.8, columns=(16, 200), slashes=(2, 8), segment=1024),
    2: SinkWindow(sink=20, window=300),
    "default": SinkWindow(sink=0, window=128),
}
LAYERS, SLEEP, TURNS = 4, 20_000_000, 24  # SLEEP: clock cycles, about 10 ms


def linger(turn: int) -> None:
    """One rank after the other is late: its device is, its host is not."""
    if turn % dist.get_world_size() == dist.get_rank():
        torch.cuda._sleep(SLEEP)


def shown(rank: int, turn: int, dtype: torch.dtype) -> torch.Tensor:
    """[64 + rank + turn, 256]"""
    rows = torch.arange(64 + rank + turn, device="cuda")[:, None] * 1000 + 100 * rank + turn
    return (rows + torch.arange(256, device="cuda")).to(dtype)


def windows(dtype: torch.dtype) -> bool:
    """Turns that nobody waits for on the host, with buffers that grow; whether all was right."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cuda", (1, world), mesh_dim_names=AXES)
    transport = connect(mesh, AXES, ()).ring
    assert transport.one_sided(torch.device("cuda"))
    pairs = []
    for turn in range(TURNS):
        mine = shown(transport.rank, turn, dtype)
        linger(turn)
        window = transport.publish(mine, 64 + world + turn, "keys")
        del mine  # its memory is used again at once
        for rank in range(world):
            expected = shown(rank, turn, dtype)
            places = torch.arange(1, len(expected), 3, device="cuda")
            by_place, part = torch.empty_like(expected[places]), torch.empty_like(expected[rank:])
            linger(turn + 1)
            finish = window.read([(by_place, rank, places), (part, rank, slice(rank, len(expected)))])
            finish()
            pairs += [(by_place, expected[places]), (part, expected[rank:])]
    right = all(torch.equal(x, y) for x, y in pairs)
    transport.close()
    return right


def nobody_comes() -> None:
    """Rank 0 shows rows, the others do not, and it waits for the device."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cuda", (1, world), mesh_dim_names=AXES)
    transport = connect(mesh, AXES, (), timeout=20.0).ring
    assert transport.one_sided(torch.device("cuda"))
    transport.publish(torch.zeros(8, 256, device="cuda"), 8, "keys")
    torch.cuda.synchronize()
    if transport.rank == 0:
        transport.publish(torch.zeros(8, 256, device="cuda"), 8, "keys")
        torch.cuda.synchronize()


def uneven(length: int, world: int):
    """The first rank holds about twice as much as any other, the blocks of all are dealt."""
    holders = [0, *range(world)]
    dealt = [[] for _ in range(world)]
    for block in range(-(-length // 128)):
        dealt[holders[block % len(holders)]].append(block)
    return from_assignment(dealt, 128)


def inputs(dtype: torch.dtype, shard, turn: int, layer: int) -> list[torch.Tensor]:
    """q, k, v, dout of this rank; those of other turns and layers are different."""
    at, tail = shard.geometry.positions, shard.geometry.num_tokens - shard.length
    moved = (
        x.roll(37 * (1 + turn * LAYERS + layer), 2)[:, :, : shard.length] for x in gpu_ring.tensors(dtype)
    )
    return [torch.nn.functional.pad(x, (0, 0, 0, tail))[:, :, at] for x in moved]


def layers(dtype: torch.dtype, exchange: str, nodes: int, layout, lengths) -> list[list[torch.Tensor]]:
    """For a batch of each length out, dq, dk, dv of all layers and ranks; no wait of the host in the second.

    nodes: that the mesh says the ranks lie on; those of one read, others send.
    """
    world = dist.get_world_size()
    mesh = init_device_mesh("cuda", (nodes, world // nodes), mesh_dim_names=AXES)
    options = dict(pattern=PATTERNS, exchange=exchange, recall_every=0, count_keys=0, deterministic=True)
    cp = ContextParallel(mesh, AXES, layout=layout, **options)
    results = []
    for turn, length in enumerate(lengths):
        shard = cp.shard({"input_ids": torch.arange(length, device="cuda")[None]})
        local = [inputs(dtype, shard, turn, layer) for layer in range(LAYERS)]
        leaves = [[x.requires_grad_() for x in each[:3]] for each in local]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if turn == 1 else "default")  # others make kernels, buffers
        outs = []
        for layer in range(LAYERS):
            linger(layer)
            outs.append(cp.attention(*leaves[layer], shard, layer))
        flat = [x for each in leaves for x in each]
        linger(turn)
        grads = torch.autograd.grad(outs, flat, [each[3] for each in local])
        torch.cuda.set_sync_debug_mode("default")
        results.append([cp.unshard(x, shard, dim=2).detach().cpu() for x in (*outs, *grads)])
    one_sided = nodes == 1 and exchange == "pull"
    assert bool(cp.transport.windows) == one_sided
    cp.close()
    return results


def compared(dtype: torch.dtype, even: bool) -> dict:
    """Rows that are read against rows that are sent, bit for bit, and against a ring, their difference."""
    world, length = dist.get_world_size(), gpu_ring.LENGTH
    # The halves of the buffers are larger than what is shown in the third, and too small in the fourth.
    setting = ("striped", (4000, 4000, 2000, length)) if even else (uneven(length, world), (length, length))
    read = layers(dtype, "pull", 1, *setting)
    sent = layers(dtype, "pull", world, *setting)
    ring = layers(dtype, "ring", 1, *setting)
    pairs = [pair for turn in zip(read, sent, strict=True) for pair in zip(*turn, strict=True)]
    others = [pair for turn in zip(read, ring, strict=True) for pair in zip(*turn, strict=True)]
    return {
        "equal": all(torch.equal(x, y) for x, y in pairs),
        "error": max(gpu_ring.relative(x, y) for x, y in others),
    }
