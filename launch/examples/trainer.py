"""Trainer of transformers: batches dealt to data-parallel groups, whose ranks share each sequence.

torchrun --standalone --nproc-per-node 2 launch/examples/trainer.py [DATA_PARALLEL_GROUPS]
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from sparring.cp import ContextParallel
from sparring.kernels.patterns import SinkWindow
from sparring.launch.trainer import ContextParallelTrainer

LENGTH = 512
TINY = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=LENGTH,
)  # fmt: skip
dp = int(sys.argv[1]) if sys.argv[1:] else 1

args = TrainingArguments(  # joins the process group of torchrun
    output_dir="runs/trainer",
    max_steps=5,
    per_device_train_batch_size=1,
    per_device_eval_batch_size=2,
    gradient_accumulation_steps=4 // dp,  # four rows a step
    learning_rate=1e-3,
    ddp_find_unused_parameters=False,  # the loss is made after the forward of DDP
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
shape = (dp, args.world_size // dp)
mesh = init_device_mesh(args.device.type, shape, mesh_dim_names=("dp", "cp"))

tokens = torch.tensor(list(Path(argparse.__file__).read_bytes())).split(LENGTH)
rows = [{"input_ids": row, "labels": row.clone()} for row in tokens[:24]]
for i, row in enumerate(rows):
    row["labels"][: 15 * i] = -100  # prompts, of different lengths, without a loss

torch.manual_seed(0)  # the same weights on all ranks
pattern = SinkWindow(sink=64, window=256)  # VerticalSlash() looks at the values
cp = ContextParallel(mesh, axes=("cp",), data_axes=("dp",), pattern=pattern, grad_reduce="mean")
model = cp.attach(AutoModelForCausalLM.from_config(TINY))
trainer = ContextParallelTrainer(model, args, train_dataset=rows[:20], eval_dataset=rows[20:], cp=cp)
trainer.train()
loss = trainer.evaluate()["eval_loss"]
if trainer.is_world_process_zero():
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']} loss {entry['loss']:.7f}", flush=True)
    print(f"evaluation loss {loss:.7f}", flush=True)
dist.destroy_process_group()
