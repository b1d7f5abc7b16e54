"""A loop with accelerate, which wraps the model in DDP over all ranks; micro-batches are accumulated.

torchrun --standalone --nproc-per-node 2 launch/examples/accelerate_loop.py
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from sparring.cp import ContextParallel
from sparring.kernels.patterns import SinkWindow

STEPS, MICRO_BATCHES, LENGTH = 5, 2, 512
TINY = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=LENGTH,
)  # fmt: skip

accelerator = Accelerator(cpu=not torch.cuda.is_available())  # joins the process group of torchrun
dp = 1  # groups of ranks; each group shares sequences
shape = (dp, accelerator.num_processes // dp)
mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("dp", "cp"))

torch.manual_seed(0)  # the same weights on all ranks
pattern = SinkWindow(sink=64, window=256)  # VerticalSlash() looks at the values
cp = ContextParallel(mesh, axes=("cp",), data_axes=("dp",), pattern=pattern, grad_reduce="mean")
model = cp.attach(AutoModelForCausalLM.from_config(TINY).train())
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

tokens = torch.tensor(list(Path(argparse.__file__).read_bytes())).split(LENGTH)
rows = [{"input_ids": row, "labels": row} for row in tokens[: STEPS * MICRO_BATCHES * dp]]
# Not prepared: accelerate would deal batches to single ranks. The ranks of a group read the same rows.
loader = iter(DataLoader(rows[mesh.get_local_rank("dp") :: dp], batch_size=1))
for step in range(STEPS):
    batches = [next(loader) for _ in range(MICRO_BATCHES)]
    shards = [cp.shard({name: x.to(accelerator.device) for name, x in batch.items()}) for batch in batches]
    labels = sum(shard.tokens for shard in shards)  # of the whole step, on all ranks
    total = 0.0
    for i, shard in enumerate(shards):
        last = i + 1 == MICRO_BATCHES
        with nullcontext() if last else accelerator.no_sync(model):
            loss = cp.loss(model(**shard.inputs), shard, tokens=labels)
            accelerator.backward(loss)
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    if accelerator.is_main_process:
        print(f"step {step + 1} loss {total:.7f}", flush=True)
accelerator.end_training()
