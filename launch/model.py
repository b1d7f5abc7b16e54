"""The model of the job: a Llama built from the configuration, or a transformers model of a local folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .config import TrainConfig
from .tokens import BEGIN, VOCAB_SIZE

LOCAL = {"local_files_only": True, "trust_remote_code": False}  # no download, no code of a folder


def build_model(config: TrainConfig, vocab_size: int = VOCAB_SIZE) -> PreTrainedModel:
    """The model in training mode on the CPU: of the folder `config.model`, or with weights drawn by seed.

    Both are the same on all ranks and devices. The caller's random state is left as it was.
    """
    if config.model is not None:
        return load_model(Path(config.model), vocab_size).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(llama_config(config, vocab_size)).train()


def load_model(folder: Path, vocab_size: int = VOCAB_SIZE) -> PreTrainedModel:
    """The causal LM that `save_pretrained` wrote into `folder`, in the dtype of its safetensors files.

    ValueError if there is none, or if its vocabulary is smaller than that of the data, `vocab_size`.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder}: no config.json there; give a folder made by save_pretrained")
    # Attention by name: a name in config.json would be followed, to kernels of the hub even.
    config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa", **LOCAL)
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"--model {folder} has a vocabulary of {config.vocab_size} tokens, the data has {vocab_size}; "
            f"give the tokenizer of the model"
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation="sdpa", dtype="auto", use_safetensors=True, **LOCAL
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers, in the order in which they run."""
    return model.get_decoder().layers


def add_adapters(model: PreTrainedModel, config: TrainConfig) -> None:
    """LoRA (arXiv 2106.09685) of rank `config.lora_rank` in all linear layers but the head; all else freezes.

    After `cp.attach`. The first factors come from torch's random state.
    """
    adapters = lora_config(config)
    from peft import inject_adapter_in_model

    inject_adapter_in_model(adapters, model)


def lora_config(config: TrainConfig):
    """The peft LoraConfig of `add_adapters`."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("--lora-rank needs the package peft; pip install peft") from error
    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules="all-linear")


def llama_config(config: TrainConfig, vocab_size: int = VOCAB_SIZE) -> LlamaConfig:
    """A Llama over `vocab_size` tokens, embeddings tied, rotary base grown with the sequence length."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta(config.seq_len)},
        tie_word_embeddings=True,
        bos_token_id=BEGIN if vocab_size == VOCAB_SIZE else None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
    )


def rope_theta(seq_len: int) -> float:
    """Rotary base: 10,000 up to 2048 tokens, then in proportion (8192: 40,000; 131072: 640,000)."""
    return 10_000.0 * max(1.0, seq_len / 2048)
