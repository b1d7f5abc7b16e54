"""A loop in plain PyTorch: any module that calls scaled_dot_product_attention, each sequence over all ranks.

torchrun --standalone --nproc-per-node 2 launch/examples/plain_loop.py
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from sparring.cp import ContextParallel
from sparring.kernels.patterns import SinkWindow

STEPS, LENGTH = 5, 1024


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, width=64, heads=4, layers=2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, 256)

    def forward(self, input_ids, position_ids):  # positions are given: the tokens of a rank have gaps
        return self.head(self.blocks(self.tokens(input_ids) + self.positions(position_ids)))


device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
dist.init_process_group()
dp = 1  # groups of ranks; each group shares sequences
mesh = init_device_mesh(device.type, (dp, dist.get_world_size() // dp), mesh_dim_names=("dp", "cp"))

torch.manual_seed(0)  # the same weights on all ranks
pattern = SinkWindow(sink=64, window=256)  # VerticalSlash() looks at the values
cp = ContextParallel(mesh, axes=("cp",), data_axes=("dp",), pattern=pattern, grad_reduce="sum")
model = cp.attach(Transformer().to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

rows = torch.tensor(list(Path(argparse.__file__).read_bytes())).split(LENGTH)  # text to learn from
for step in range(STEPS):
    row = rows[step * dp + mesh.get_local_rank("dp")][None].to(device)  # the same on all ranks of a group
    shard = cp.shard({"input_ids": row, "labels": row})
    loss = cp.loss(model(**shard.inputs), shard)  # the mean over all ranks
    loss.backward()
    cp.sum_gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step + 1} loss {loss.item():.7f}", flush=True)
dist.destroy_process_group()
