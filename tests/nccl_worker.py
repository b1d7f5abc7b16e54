"""Run by torchrun from test_gpu_ring.py: rings over NCCL against one GPU, without host synchronisation."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from gpu_ring import PATTERNS, make_batch, one_device, relative, tensors
from torch.distributed.device_mesh import init_device_mesh

from sparring.cp import ContextParallel


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("cp",))
    results = []
    for name, pattern in PATTERNS.items():
        for dtype in (torch.float32, torch.bfloat16):
            cp = ContextParallel(mesh, pattern=pattern, layout="auto", recall_every=1)
            q, k, v, dout = tensors(dtype)
            for attempt in range(2):  # communicators and kernels are made in the first
                shard = cp.shard(make_batch())
                at = shard.geometry.positions
                pad = (0, 0, 0, shard.geometry.num_tokens - q.shape[2])
                local = [torch.nn.functional.pad(x, pad)[:, :, at].requires_grad_() for x in (q, k, v)]
                grad = torch.nn.functional.pad(dout, pad)[:, :, at]
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error" if attempt else "default")
                out = cp.attention(*local, shard)
                grads = torch.autograd.grad(out, local, grad)
                torch.cuda.set_sync_debug_mode("default")
            full = [cp.unshard(x, shard, dim=2) for x in (out, *grads)]
            expected = one_device(q, k, v, dout, cp.plans(shard)[0])
            alone = one_device(q, k, v, dout, cp.plans(shard)[0], dtype, "auto")
            report = cp.report(shard)
            results.append(
                {
                    "pattern": name,
                    "dtype": str(dtype),
                    "errors": [relative(a, b) for a, b in zip(full, expected, strict=True)],
                    "alone": [relative(a, b) for a, b in zip(alone, expected, strict=True)],
                    "density": report.density,
                    "recall": report.recall,
                }
            )
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
