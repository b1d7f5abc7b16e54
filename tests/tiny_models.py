"""Small models that several tests share, and one step of them: original, and sharded over threads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sparring.cp import ContextParallel, run_threads
from sparring.kernels.patterns import Dense

VOCAB = 48
BLOCK = 16  # of the context-parallel runs
IGNORE = -100


def llama(**options) -> nn.Module:
    """Grouped-query attention, 2 layers, the same weights for the same seed. Each has its own config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return build(LlamaForCausalLM, LlamaConfig, **options)


def qwen2(**options) -> nn.Module:
    """Biases in q, k, v and a head tied to the embedding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return build(Qwen2ForCausalLM, Qwen2Config, **{"tie_word_embeddings": True} | options)


def rope(kind: str, length: int, **options) -> dict:
    """Options of a model whose rotary frequencies change beyond `length` tokens."""
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} | options
    if kind == "longrope":
        factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
        parameters |= factors | {"original_max_position_embeddings": length}
    longest = length if kind == "dynamic" else 4 * length
    return {"rope_parameters": parameters, "max_position_embeddings": longest}


def build(model: Callable, config: Callable, seed: int = 0, **options) -> nn.Module:
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(config(**sizes | heads | options)).train()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.size)
        self.out = nn.Linear(width, width)
        self.options = {"is_causal": True, "enable_gqa": heads != kv_heads}  # of the attention function

    def forward(self, x):
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, kv_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def selective(operations) -> Callable:
    """The context_fn of a checkpoint that keeps what these operations of torch return."""
    return partial(create_selective_checkpoint_contexts, operations)


ATEN = torch.ops.aten
PRODUCTS = [ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.max.default, ATEN.amax.default]
# How a TinyGPT runs one of its blocks: (number of the block, block, x) -> x.
CHECKPOINTING = {
    None: lambda i, block, x: block(x),
    "reentrant": lambda i, block, x: checkpoint(block, x, use_reentrant=True),
    "non-reentrant": lambda i, block, x: checkpoint(block, x, use_reentrant=False),
    "one layer": lambda i, block, x: checkpoint(block, x, use_reentrant=False) if i == 1 else block(x),
    "selective": lambda i, block, x: checkpoint(
        block, x, use_reentrant=False, context_fn=selective([ATEN.addmm.default])
    ),
    "selective, products": lambda i, block, x: checkpoint(
        block, x, use_reentrant=False, context_fn=selective(PRODUCTS)
    ),
}


class TinyGPT(nn.Module):
    """nanoGPT with positions as an argument. checkpointing: a key of CHECKPOINTING."""

    def __init__(self, width=32, heads=4, kv_heads=4, layers=2, checkpointing=None, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(VOCAB, width)
            self.positions = nn.Embedding(512, width)
            self.blocks = nn.ModuleList(Block(width, heads, kv_heads) for _ in range(layers))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, VOCAB, bias=False)
        self.checkpointing = checkpointing

    def forward(self, input_ids, position_ids):
        x = self.tokens(input_ids) + self.positions(position_ids)
        for i, block in enumerate(self.blocks):
            x = CHECKPOINTING[self.checkpointing](i, block, x)
        return self.head(self.norm(x))


def make_batch(name: str, length: int = 110) -> tuple[dict, list]:
    """A batch of 2 rows and its documents [(row, start, end)].

    "whole", "packed", "padded", "mostly padded" (nothing else on the last two of 4 contiguous ranks), "few
    labels" (all on the first of them), "one label", "unequal" (the first row has 4 labels, the second all).
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2, length), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if name == "packed":
        documents = [(0, 0, 27), (0, 27, 90), (0, 90, length), (1, 0, 66), (1, 66, length)]
    elif "padded" in name:
        documents = [(0, 11, length), (1, 0, length - 23)] if name == "padded" else [(0, 0, 50), (1, 0, 40)]
        batch["attention_mask"] = torch.zeros_like(ids)
        for row, start, end in documents:
            batch["attention_mask"][row, start:end] = 1
    else:
        documents = [(0, 0, length), (1, 0, length)]
    if name == "few labels":
        batch["labels"][:, 20:] = IGNORE
    elif name == "one label":
        batch["labels"][0], batch["labels"][1, :77], batch["labels"][1, 78:] = IGNORE, IGNORE, IGNORE
    elif name == "unequal":
        batch["labels"][0, 5:] = IGNORE
    positions = torch.zeros_like(ids)
    for row, start, end in documents:
        positions[row, start:end] = torch.arange(end - start)
    if name == "packed":
        batch["position_ids"] = positions
    return batch, documents


def reference(model: nn.Module, batch: dict, documents: list) -> dict:
    """Loss, gradients and logits of the original model with a dense mask: knows nothing of the library."""
    ids = batch["input_ids"]
    size, length = ids.shape
    mask = torch.eye(length, dtype=torch.bool).repeat(size, 1, 1, 1)  # padding must see something
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, start, end in documents:
        mask[row, 0, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        positions[row, start:end] = torch.arange(end - start)
        labels[row, start : end - 1] = batch["labels"][row, start + 1 : end]
    if isinstance(model, TinyGPT):
        for block in model.blocks:
            options = block.attention.options
            block.attention.options = {"attn_mask": mask, "enable_gqa": options["enable_gqa"]}
        logits = model(ids, positions)
    else:
        assert model.config._attn_implementation == "sdpa"
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    loss.backward()
    return {"loss": loss.item(), "grads": gradients(model), "output": logits.detach()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the parameters that are trained."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def parallel(transport, **options) -> ContextParallel:
    """Small blocks; every visible tile; gradients are to be summed."""
    options = {"pattern": Dense(), "block_size": BLOCK, "grad_reduce": "sum"} | options
    return ContextParallel(transport, **options)


def sharded(model: nn.Module, batch: dict, world: int, pattern, *, plans=None, prepare=None, **options):
    """One step on `world` threads with copies of the model; what every rank has afterwards."""
    whole_logits = options.pop("whole_logits", False)
    replicas = [copy.deepcopy(model) for _ in range(world)]

    def body(transport):
        own = replicas[transport.rank]
        cp = parallel(transport, pattern=pattern, **options)
        cp.attach(own, whole_logits=whole_logits)
        if prepare is not None:
            prepare(own)
        with nullcontext() if plans is None else cp.replay(plans):
            shard = cp.shard(batch)
        output = own(**shard.inputs)
        loss = cp.loss(output, shard)
        loss.backward()
        local = gradients(own)
        cp.sum_gradients(own)
        output = output if isinstance(output, torch.Tensor) else output.logits
        return {
            "loss": loss.item(),
            "grads": gradients(own),
            "local": local,
            "output": cp.unshard(output, shard),
            "plans": cp.plans(shard),
            "covered": {layer: [int(n) for n in runs] for layer, runs in shard.record.covered.items()},
            "labels": int((shard.labels != IGNORE).sum()),
        }

    return run_threads(world, body, timeout=60)


def assert_same_step(results: list[dict], expected: dict) -> None:
    """Every rank: loss within 1e-6, each gradient within 1e-5 of that parameter's largest gradient."""
    for result in results:
        assert abs(result["loss"] - expected["loss"]) <= 1e-6 * max(1.0, expected["loss"])
        assert result["grads"].keys() == expected["grads"].keys()
        for name, gradient in expected["grads"].items():
            error = (result["grads"][name] - gradient).abs().max() / gradient.abs().max()
            assert error <= 1e-5, f"{name}: {error:.1e}"
