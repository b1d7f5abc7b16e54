"""Run by torchrun from test_faults.py, and its parts by other processes: a ring in which one rank goes wrong.

torchrun --standalone --nproc-per-node 2 tests/fault_worker.py --fault kill --rank 1 --before 2
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import time

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from sparring.cp import ContextParallel
from sparring.cp.mesh import connect
from sparring.launch.config import TrainConfig
from sparring.launch.signals import orderly_signals
from sparring.launch.world import join_world

BLOCK, HEADS, DIM, VOCABULARY = 16, (2, 1), 8, 16  # logits are the attention's output: HEADS * DIM


class Fault(Exception):
    """What an injected exception is."""


class Faulty:
    """A transport whose rank does something, `act`, before its `before`-th message of a ring (from 1)."""

    def __init__(self, transport, before: int, act):
        self.transport, self.before, self.act, self.messages = transport, before, act, 0
        self.rank, self.size = transport.rank, transport.size
        self.ranks, self.nodes = transport.ranks, transport.nodes
        self.all_reduce, self.all_gather = transport.all_reduce, transport.all_gather
        self.all_to_all, self.publish = transport.all_to_all, transport.publish
        self.one_sided = transport.one_sided

    def exchange(self, *args):
        self.messages += 1
        if self.before in (self.messages, 0):  # 0: before every one
            self.act()
        return self.transport.exchange(*args)


def messages(world: int) -> dict[int, tuple[str, int]]:
    """Number of a message of one attention -> its channel and hop: forward, then backward."""
    forward = [("keys", hop) for hop in range(1, world)]
    backward = [x for hop in range(1, world) for x in (("keys", hop), ("grads", hop - 1))]
    return dict(enumerate([*forward, *(x for x in backward if x[1]), ("grads", world - 1)], 1))


def fail(error: type[Exception] = Fault):
    raise error("injected")


def actions() -> dict:
    """The faults, by name."""

    def signalled(number):
        return lambda: (faulthandler.disable(), os.kill(os.getpid(), number))

    return {
        "raise": fail,
        "kill": signalled(signal.SIGKILL),
        "segfault": signalled(signal.SIGSEGV),
        "stop": signalled(signal.SIGSTOP),
        "exit": lambda: os._exit(0),
        "memory": exhaust,
    }


def exhaust():
    """More than any GPU has; torch has no error of its own for a CPU."""
    if device() == "cuda":
        torch.empty(2**50, device="cuda")
    fail(torch.OutOfMemoryError)


def device() -> str:
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def batch(world: int) -> dict:
    tokens = torch.arange(4 * world * BLOCK, device=device())[None] % VOCABULARY
    return {"input_ids": tokens, "labels": tokens}


def inputs(shard, dtype=torch.float32) -> list[torch.Tensor]:
    """q, k, v of this rank: the same rows of the same tensors for any number of ranks."""
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(1, h, shard.length, DIM, generator=g) + 0.5 for h in (HEADS[0], HEADS[1], HEADS[1])]
    at = shard.geometry.positions
    return [t.to(at.device, dtype)[:, :, at].requires_grad_() for t in x]


def logits(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).flatten(2)


def step(cp: ContextParallel, layers: int = 1):
    """One step of attention layers: shard, output, gradients."""
    shard = cp.shard(batch(cp.transport.size))
    q, k, v = leaves = inputs(shard)
    for layer in range(layers):
        q = cp.attention(q, k, v, shard, layer=layer)
    cp.loss(logits(q), shard).backward()
    return shard, q, [x.grad for x in leaves]


def say(**what) -> None:
    line = json.dumps(what | {"time": time.time(), "pid": os.getpid()})
    os.write(1, f"{line}\n".encode())  # at once: ranks share the pipe


@record
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--before", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=60.0)
    options = parser.parse_args()
    with orderly_signals(), join_world(TrainConfig(device=options.device, timeout=options.timeout)) as world:
        ring = faulty = connect(world.mesh, ("cp_outer", "cp_inner"), (), options.timeout).ring
        say(ready=world.rank)

        def act():
            say(fault=options.fault)
            actions()[options.fault]()

        if world.rank == options.rank and options.fault != "none":
            faulty = Faulty(ring, options.before + len(messages(world.size)), act)  # in the second step
        cp = ContextParallel(faulty, pattern="dense", block_size=BLOCK, count_keys=0)
        try:
            while True:
                loss = step(cp)[1].sum().item()  # waits for the device
                say(loss=loss)
        except Exception as error:
            names = ("rank", "step", "layer", "hop", "peer")
            place = {name: getattr(error, name, None) for name in names}
            say(error=type(error).__name__, text=str(error), **place)
            raise


if __name__ == "__main__":
    main()
