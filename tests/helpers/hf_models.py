"""Small models of real architectures."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

VOCABULARY = 64
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}  # fmt: skip


def llama(**changes: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes}))


def gpt2() -> nn.Module:
    """Conv1D, a tied head, and dropout, which draws random numbers."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4, **ends)
    )


def mixtral() -> nn.Module:
    """Experts as stacks of matrices."""
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))


def frozen_llama():
    model = llama(tie_word_embeddings=True)
    model.model.layers[0].requires_grad_(False)
    return model
