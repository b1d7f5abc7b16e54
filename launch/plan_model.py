"""A model as numbers: what memory and time of a training depend on. No weight is ever allocated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .config import TrainConfig
from .flops import flops_per_token
from .memory import FEED_FORWARD
from .model import LOCAL, add_adapters, decoder_layers, llama_config


@dataclass(frozen=True)
class Weights:
    """How many there are, and how many of them are trained."""

    count: int
    trained: int

    @property
    def frozen(self) -> int:
        return self.count - self.trained

    def __sub__(self, other: Weights) -> Weights:
        return Weights(self.count - other.count, self.trained - other.trained)


@dataclass(frozen=True)
class ModelSizes:
    """Of a causal LM of transformers.

    layers, width: of the residual stream. heads, key_heads, dim: of attention. mlp: inner width of the
    feed-forward part that a token meets, over its experts. vocab.
    whole, all_layers, largest_layer: weights, a tied one counted once; what no layer has is the root.
    head: of the output embedding, tied or not.
    flops: forward and backward of all weights for a token, see `flops_per_token`; layer_flops, mlp_flops,
    head_flops: forward of all layers, of their feed-forward parts, of the head.
    """

    layers: int
    width: int
    heads: int
    key_heads: int
    dim: int
    mlp: int
    vocab: int
    whole: Weights
    all_layers: Weights
    largest_layer: Weights
    head: Weights
    flops: float
    layer_flops: float
    mlp_flops: float
    head_flops: float

    @property
    def root(self) -> Weights:
        return self.whole - self.all_layers


def build_meta(config: TrainConfig) -> PreTrainedModel:
    """The model of `config`, with its adapters, of tensors that have shapes and no memory.

    Of a folder only config.json is read. ValueError if there is none.
    """
    if config.model is None:
        sizes = llama_config(config)
    elif (Path(config.model) / "config.json").is_file():
        sizes = AutoConfig.from_pretrained(config.model, attn_implementation="sdpa", **LOCAL)
    else:
        raise ValueError(
            f"--model {config.model}: no config.json there; give a folder made by save_pretrained"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes)
        if config.lora_rank:
            add_adapters(model, config)
    return model


def sizes_of(model: PreTrainedModel) -> ModelSizes:
    """The numbers of a model, on whatever device. NotImplementedError if its layers have no part `mlp`."""
    config, layers = model.config, decoder_layers(model)
    parts = [getattr(layer, FEED_FORWARD, None) for layer in layers]
    if None in parts:
        raise NotImplementedError(f"{type(layers[0]).__name__} has no part {FEED_FORWARD}")
    by_layer = [_count(layer.parameters()) for layer in layers]
    chosen = getattr(config, "num_experts_per_tok", None)
    head = model.get_output_embeddings()
    return ModelSizes(
        layers=len(layers),
        width=config.hidden_size,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        mlp=_inner_width(config, chosen),
        vocab=config.vocab_size,
        whole=_count(model.parameters()),
        all_layers=Weights(sum(x.count for x in by_layer), sum(x.trained for x in by_layer)),
        largest_layer=max(by_layer, key=lambda weights: weights.count),
        head=_count(head.parameters()),
        flops=flops_per_token(model),
        layer_flops=_forward_flops(layers, chosen),
        mlp_flops=_forward_flops(nn.ModuleList(parts), chosen),
        head_flops=_forward_flops(head, chosen),
    )


def _count(parameters: Iterable[nn.Parameter]) -> Weights:
    found = [(p.numel(), p.requires_grad) for p in parameters]
    return Weights(sum(n for n, _ in found), sum(n for n, trained in found if trained))


def _forward_flops(module: nn.Module, chosen: int | None) -> float:
    """2 for each weight that a token meets; of a stack of experts it meets `chosen`."""
    return sum(
        2 * p.numel() * (min(1.0, chosen / p.shape[0]) if chosen and p.ndim == 3 else 1.0)
        for p in module.parameters()
    )


def _inner_width(config, chosen: int | None) -> int:
    if not chosen:
        return config.intermediate_size
    expert = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return chosen * expert + (getattr(config, "shared_expert_intermediate_size", None) or 0)
