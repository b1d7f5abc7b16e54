"""A loop of one's own on the workers of Ray Train, each of which is a rank.

cd launch/examples; python ray_job.py [WORKERS]
"""

import argparse
import sys
from pathlib import Path

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig

from sparring.cp import ContextParallel
from sparring.kernels.patterns import SinkWindow

STEPS, LENGTH = 5, 1024
TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
}  # fmt: skip


def train() -> None:
    """What every worker runs; its process group is there already."""
    device, world = get_device(), ray.train.get_context().get_world_size()
    dp = 1  # groups of ranks; each group shares sequences
    mesh = init_device_mesh(device.type, (dp, world // dp), mesh_dim_names=("dp", "cp"))

    torch.manual_seed(0)  # the same weights on all ranks
    pattern = SinkWindow(sink=64, window=256)  # VerticalSlash() looks at the values
    cp = ContextParallel(mesh, axes=("cp",), data_axes=("dp",), pattern=pattern, grad_reduce="sum")
    model = cp.attach(AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).to(device).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    rows = torch.tensor(list(Path(argparse.__file__).read_bytes())).split(LENGTH)  # bytes as tokens
    for step in range(STEPS):
        row = rows[step * dp + mesh.get_local_rank("dp")][None].to(device)  # the same in a group
        shard = cp.shard({"input_ids": row, "labels": row})
        loss = cp.loss(model(**shard.inputs), shard)  # the mean over all ranks
        loss.backward()
        cp.sum_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        if ray.train.get_context().get_world_rank() == 0:
            print(f"step {step + 1} loss {loss.item():.7f}", flush=True)


if __name__ == "__main__":
    workers = int(sys.argv[1]) if sys.argv[1:] else 2
    ray.init("local", num_cpus=workers, object_store_memory=128 * 2**20, include_dashboard=False)
    scaling = ray.train.ScalingConfig(
        num_workers=workers, use_gpu=torch.cuda.is_available(), placement_strategy="PACK"
    )
    storage = ray.train.RunConfig(name="ray", storage_path=str(Path("runs").absolute()))
    TorchTrainer(train, scaling_config=scaling, run_config=storage).fit()
    ray.shutdown()
