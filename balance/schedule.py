"""Schedules: in which order keys move between ranks and are computed with, as plain data.

A schedule says, for one rank, what each step computes and which messages are in flight meanwhile. It
names no device, group or tensor, so the engine, tests and a simulator walk the same object. Ranks are
places in the context-parallel group; the transport turns them into global ranks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Transfer:
    """One message out and one message in, in flight together.

    A message is named by its source: the rank that owns the keys that it holds, or whose keys the
    gradients that it holds belong to.
    """

    send_to: int
    sends: int
    recv_from: int
    receives: int


@dataclass(frozen=True)
class Step:
    """Computation with the keys of one source, and the messages around it.

    source: the rank that owns the keys of this step; they have arrived when the step computes.
    keys: started before the computation and in flight during it; brings the keys of a later step.
    gradients: started after the computation, in flight during later steps. It sends on the gradient of
        the keys of `source`, this rank's share and all those received for it added up.
    """

    source: int
    keys: Transfer | None = None
    gradients: Transfer | None = None


@dataclass(frozen=True)
class Schedule:
    """What one rank does in the forward and in the backward of one attention call.

    A message is waited for where it is used: keys by the step that computes with them, gradients by the
    step that adds to them or, those of this rank's own keys, at the end.
    """

    name: str
    rank: int
    world: int
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]

    def __str__(self) -> str:
        """Readable text, one line a step."""
        lines = [f"{self.name}, rank {self.rank} of {self.world}"]
        for phase, steps in (("forward", self.forward), ("backward", self.backward)):
            lines += [f"  {phase} {number}: {_line(step)}" for number, step in enumerate(steps)]
        return "\n".join(lines)


def ring(rank: int, world: int) -> Schedule:
    """The flat ring (Liu et al., arXiv 2310.01889): step t computes with the keys of rank - t.

    Meanwhile those keys go on to rank + 1 and the next ones come from rank - 1: world - 1 hops. In the
    backward the gradient of each source follows one step behind its keys, collects every rank's share
    and arrives home with the last of its world hops.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, world is {world}; a ring needs 0 <= rank < world")
    return Schedule(
        "ring",
        rank,
        world,
        forward=tuple(_ring_step(rank, world, step, False) for step in range(world)),
        backward=tuple(_ring_step(rank, world, step, True) for step in range(world)),
    )


def _ring_step(rank: int, world: int, step: int, backward: bool) -> Step:
    source = (rank - step) % world
    hop = Transfer((rank + 1) % world, source, (rank - 1) % world, (source - 1) % world)
    return Step(
        source,
        keys=hop if step < world - 1 else None,
        gradients=hop if backward and world > 1 else None,
    )


def _line(step: Step) -> str:
    parts = [f"compute with the keys of {step.source}"]
    for what, transfer in (("keys", step.keys), ("gradients", step.gradients)):
        if transfer is not None:
            parts.append(
                f"{what} of {transfer.sends} to {transfer.send_to}, "
                f"of {transfer.receives} from {transfer.recv_from}"
            )
    return "; ".join(parts)
