"""From a DeviceMesh to the groups that a rank talks in."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .transport import Alone, Distributed, Transport


@dataclass(frozen=True)
class Groups:
    """ring: the context-parallel ranks. everyone: they times the data ranks, whose gradients add up."""

    ring: Transport
    everyone: Transport


def connect(
    mesh: DeviceMesh | Transport | None,
    axes: str | tuple[str, ...],
    data_axes: str | tuple[str, ...],
    timeout: float = 300.0,
) -> Groups:
    """Groups of this rank. Every rank of the mesh must call it, in the same program order.

    mesh: a DeviceMesh with the named axes; None for a single process; or a Transport, whose ranks are
    the context-parallel group (ranks as threads). axes: one, or two, of the nodes and of the ranks inside a
    node. timeout: seconds to wait for another rank. Raises ValueError naming the axes that are missing.
    """
    if mesh is None:
        return Groups(Alone(), Alone())
    if isinstance(mesh, Transport):
        return Groups(mesh, mesh)
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"mesh is a {type(mesh).__name__}; give a DeviceMesh, or None for one process")
    axes, data_axes = ((x,) if isinstance(x, str) else tuple(x) for x in (axes, data_axes))
    names = mesh.mesh_dim_names or ()
    missing = [axis for axis in (*axes, *data_axes) if axis not in names]
    if missing or not axes:
        raise ValueError(
            f"axes {tuple(missing) or axes} are not in the mesh, which has {tuple(names)}; "
            'name its axes by init_device_mesh(..., mesh_dim_names=("dp", "cp"))'
        )
    if set(axes) & set(data_axes):
        raise ValueError(f"axes {axes} and data_axes {data_axes} overlap; an axis has one use")
    if len(axes) > 2:
        raise ValueError(
            f"axes {axes} are {len(axes)}; give one, or two: of nodes and of ranks inside a node"
        )
    channels = ("keys", "grads", "control", "headers")
    nodes = mesh.size(names.index(axes[0])) if len(axes) == 2 else 1
    if nodes > 1:
        channels += ("outer keys", "outer grads")
    ring = _transport(mesh, axes, channels, timeout, nodes)
    everyone = _transport(mesh, (*data_axes, *axes), ("control", "headers"), timeout) if data_axes else ring
    return Groups(ring, everyone)


def _transport(
    mesh: DeviceMesh, axes: tuple[str, ...], channels: tuple[str, ...], timeout: float, nodes: int = 1
) -> Transport:
    """The group of all ranks that differ from this one in the given axes only, in mesh order."""
    names = mesh.mesh_dim_names
    order = [names.index(axis) for axis in axes]
    others = [dim for dim in range(mesh.mesh.dim()) if dim not in order]
    table = mesh.mesh.permute(*others, *order).reshape(-1, *[mesh.mesh.shape[d] for d in order])
    me, patience = dist.get_rank(), timedelta(seconds=timeout)
    whole_job = mesh.mesh.numel() == dist.get_world_size()
    mine = None
    for ranks in table.flatten(1).tolist():
        if me in ranks and len(ranks) == 1:
            mine = Alone()
        elif me in ranks or (whole_job and len(ranks) > 1):
            # Ranks outside of a smaller mesh do not call this, so only members may be waited for.
            groups = {
                channel: dist.new_group(ranks, timeout=patience, use_local_synchronization=not whole_job)
                for channel in channels
            }
            if me in ranks:
                mine = Distributed(ranks.index(me), tuple(ranks), groups, timeout, nodes)
    if mine is None:
        raise ValueError(f"rank {me} is not in the mesh {mesh}; make ContextParallel on its ranks only")
    return mine
