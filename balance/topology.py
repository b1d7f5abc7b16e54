"""The machine as numbers: which ranks share a node, what links cost, what the attention kernels cost.

Times are seconds, sizes bytes. `benchmarks/calibrate.py` measures `Constants` on a machine and keeps them in
a JSON file; `H200` are those that come with the package.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class LinkCost:
    """One message of n bytes takes latency + n / bandwidth. bandwidth: bytes per second, each way."""

    latency: float
    bandwidth: float

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class KernelCost:
    """Seconds of a whole device for attention in one direction, all heads counted.

    tile: for one tile of one head. row: for each query block of one head that has any tile in a launch, so
    that n tiles a row reach n / (n + c) of the full speed, c = row / tile. column: for one column and one
    query block of one head. launch: the least time of a launch that has anything to do: what its host needs.
    """

    tile: float
    row: float
    column: float
    launch: float

    def seconds(self, work: np.ndarray, blocks: np.ndarray | int, heads: int, block_size: int) -> np.ndarray:
        """[..., W, steps + 1] for work of that shape in tiles a head, as `work_matrices` gives it.

        blocks: query blocks that have tiles in a step, as many as a rank holds or fewer ([..., W, steps] or
        broadcast to it); more blocks than tiles are not counted. The last entry of work is that of columns.
        """
        tiles, columns = work[..., :-1] * heads, work[..., -1:] * heads * block_size
        rows = np.minimum(np.asarray(blocks) * heads, tiles)
        seconds = np.concatenate([self.tile * tiles + self.row * rows, self.column * columns], axis=-1)
        return np.maximum(seconds, self.launch * (work > 0))

    def scaled(self, factor: float) -> KernelCost:
        """So many times the work; launches take as long."""
        return KernelCost(self.tile * factor, self.row * factor, self.column * factor, self.launch)


@dataclass(frozen=True)
class Constants:
    """What a machine costs. source: where the numbers are from.

    forward, backward: of kernels for tiles of block_size x block_size pairs and heads of width dim. inside,
    between: links of a rank to the ranks of its node, and to other nodes. memory: bytes per second that a
    device reads and writes.
    """

    source: str
    block_size: int
    dim: int
    forward: KernelCost
    backward: KernelCost
    inside: LinkCost
    between: LinkCost
    memory: float

    def topology(self, world: int, nodes: int = 1, shared: bool = False) -> Topology:
        """So many ranks on so many nodes with these links; shared: see Topology."""
        if nodes < 1 or world % nodes:
            raise ValueError(f"{world} ranks on {nodes} nodes; there must be equally many on each")
        return Topology(nodes, world // nodes, self.inside, self.between, self.memory, shared)

    def with_dim(self, dim: int) -> Constants:
        """The same machine with heads of another width, to which the time of kernels is taken to be in
        proportion."""
        kernels = (self.forward.scaled(dim / self.dim), self.backward.scaled(dim / self.dim))
        return replace(self, dim=dim, forward=kernels[0], backward=kernels[1])


@dataclass(frozen=True)
class Topology:
    """Nodes of `inner` ranks each, numbered node by node, and their links.

    Every rank has a port of its own, each way, for messages inside its node, and one for messages between
    nodes; shared: the ranks of a node have one port between nodes in common.
    """

    nodes: int
    inner: int
    inside: LinkCost
    between: LinkCost
    memory: float
    shared: bool = False

    @property
    def world(self) -> int:
        return self.nodes * self.inner


# Kernels: relative least squares over seconds = tile * tiles + row * rows of `hopper`, D = 128, random tiles
# in benchmarks/results/kernels.csv (486bdb6; 32k and 128k, density .05 to 1, also in 8 ring steps): 600 and
# 503 TFLOP/s, c = 2.53 and 1.02, all seven points of each direction within 6 %.
# Not measured: columns (taken as twice their share of a tile), launches (10 us), links between nodes (nine
# tenths of one 400 Gbit/s adapter for each rank, the latency of the links inside).
# Links inside: NCCL sendrecv between two H200 over 18 NVLinks, both ways at once (90 us for 4 MB, 148 GB/s at
# 16 MB, 266 at 64 MB, 301 at 256 MB), each within 7 %. Memory: a copy on the same GPU.
H200 = Constants(
    source="one H200: benchmarks/results/kernels.csv; two H200 over NVLink; columns, launches, nodes assumed",
    block_size=128,
    dim=128,
    forward=KernelCost(tile=1.40e-8, row=3.54e-8, column=2.2e-10, launch=1e-5),
    backward=KernelCost(tile=4.17e-8, row=4.27e-8, column=6.5e-10, launch=1e-5),
    inside=LinkCost(latency=7.3e-5, bandwidth=350e9),
    between=LinkCost(latency=7.3e-5, bandwidth=45e9),
    memory=4.3e12,
)


def write_constants(constants: Constants, path: str | Path) -> None:
    """As JSON."""
    Path(path).write_text(json.dumps(asdict(constants), indent=1) + "\n")


def read_constants(path: str | Path) -> Constants:
    """The inverse of `write_constants`. Raises ValueError for a file that it did not write."""
    try:
        values = json.loads(Path(path).read_text())
        parts = {name: KernelCost(**values.pop(name)) for name in ("forward", "backward")}
        parts |= {name: LinkCost(**values.pop(name)) for name in ("inside", "between")}
        return Constants(**values, **parts)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} holds no cost constants ({error!r}); write it with benchmarks/calibrate.py"
        ) from error
