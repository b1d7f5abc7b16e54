"""Floating-point operations that training asks for. What is computed again in the backward does not count."""

from __future__ import annotations

from transformers import PreTrainedModel

#: Forward QK^T and PV, backward dV, dP, dQ and dK: 6 products, 2 operations for each element of a head.
ATTENTION = 12


def flops_per_token(model: PreTrainedModel) -> float:
    """Of all weights, forward and backward, for one token: 6 N (arXiv 2001.08361), N weights that it meets.

    A trained weight takes 6 operations, a frozen one 4. An embedding that is not the head as well is a table
    and takes none; of a stack of experts [E, ...] a token meets num_experts_per_tok.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = None if head is not None and head.weight is embedding.weight else embedding.weight
    chosen = getattr(model.config, "num_experts_per_tok", None)
    total = 0.0
    for weight in model.parameters():
        if weight is not table:
            met = min(1.0, chosen / weight.shape[0]) if chosen and weight.ndim == 3 else 1.0
            total += (6 if weight.requires_grad else 4) * met * weight.numel()
    return total


def flops_per_pair(model: PreTrainedModel) -> int:
    """Of attention, forward and backward, for a pair of a query and a key of a query head: 12 head_dim."""
    config = model.config
    return ATTENTION * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
