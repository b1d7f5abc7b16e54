"""A causal language model of transformers in a loop of one's own, its weights sharded by FSDP2.

torchrun --standalone --nproc-per-node 2 launch/examples/transformers_model.py [MODEL_DIR]
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from sparring.cp import ContextParallel
from sparring.kernels.patterns import SinkWindow

STEPS, LENGTH = 5, 1024
TINY = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=LENGTH,
)  # fmt: skip

device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
dist.init_process_group()
dp = 1  # groups of ranks; each group shares sequences
mesh = init_device_mesh(device.type, (dp, dist.get_world_size() // dp), mesh_dim_names=("dp", "cp"))

torch.manual_seed(0)
pattern = SinkWindow(sink=64, window=256)  # VerticalSlash() looks at the values
cp = ContextParallel(mesh, axes=("cp",), data_axes=("dp",), pattern=pattern, grad_reduce="mean")
if sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
else:
    model = AutoModelForCausalLM.from_config(TINY)
model = cp.attach(model.train())  # then activation checkpointing, then fully_shard, then the optimizer
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)  # sharded over "cp", copied over "dp"; gradients are averaged over both
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

rows = torch.tensor(list(Path(argparse.__file__).read_bytes())).split(LENGTH)  # bytes as tokens
for step in range(STEPS):
    row = rows[step * dp + mesh.get_local_rank("dp")][None].to(device)  # the same on all ranks of a group
    shard = cp.shard({"input_ids": row, "labels": row})
    loss = cp.loss(model(**shard.inputs), shard)  # the mean over all ranks
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step + 1} loss {loss.item():.7f}", flush=True)
dist.destroy_process_group()
