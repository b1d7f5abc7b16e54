"""The model of the job: a transformers Llama, built from the configuration alone."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .config import TrainConfig
from .data import BEGIN, VOCAB_SIZE


def llama_config(config: TrainConfig) -> LlamaConfig:
    """A Llama over bytes, embeddings tied, rotary base grown with the sequence length."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta(config.seq_len)},
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
    )


def rope_theta(seq_len: int) -> float:
    """Rotary base: 10,000 up to 2048 tokens, then in proportion (8192: 40,000; 131072: 640,000)."""
    return 10_000.0 * max(1.0, seq_len / 2048)


def build_model(config: TrainConfig, device: torch.device) -> LlamaForCausalLM:
    """The model in training mode, its weights drawn on the CPU from `config.seed` alone.

    So they are the same on all ranks and devices. The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(llama_config(config))
    return model.to(device=device, dtype=getattr(torch, config.dtype)).train()
