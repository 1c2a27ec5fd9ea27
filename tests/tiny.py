"""Tiny models and a tiny tokenizer, made on the spot: nothing is downloaded."""

from __future__ import annotations

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

CORPUS = [
    "Sorry, I cannot help with that. Sorry, please ask me something else. Sorry!",
    "How do I paint the fence green? First buy a brush, then open the paint and stir it well.",
    "Sure, here is how: step one, take the ladder. Step two, climb it slowly. Step three, begin.",
    "The quick brown fox jumps over the lazy dog while seven wizards watch from a quiet garden.",
]


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with about 400 tokens and a chat template in Llama 3's manner."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
    )
    fast.chat_template = LLAMA3_TEMPLATE
    return fast


_COMMON = dict(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=3,
    pad_token_id=3,
)

ARCHITECTURES: dict[str, dict] = {
    "llama": dict(model_type="llama"),
    "mistral": dict(model_type="mistral", sliding_window=7),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "gemma2": dict(
        model_type="gemma2",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=7,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
        attn_implementation="eager",  # early transformers 5 takes SDPA, which leaves the cap out
    ),
    "qwen3": dict(model_type="qwen3", head_dim=8),
    "gemma3": dict(
        model_type="gemma3_text",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": dict(model_type="phi3"),
    "mixtral": dict(
        model_type="mixtral",
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    ),
    "phi": dict(model_type="phi", num_key_value_heads=4),
    "granite": dict(model_type="granite", logits_scaling=3.0, residual_multiplier=0.5),
    "cohere": dict(model_type="cohere", logit_scale=0.25),
    "gpt_neox": dict(model_type="gpt_neox", num_key_value_heads=None),
}


def tiny_model(
    architecture: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: object
) -> PreTrainedModel:
    """A two-layer model of `architecture` with weights large enough that its mask matters."""
    settings = {**_COMMON, **ARCHITECTURES[architecture], **overrides}
    settings = {key: value for key, value in settings.items() if value is not None}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.initializer_range = 0.2
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if architecture == "mixtral" and dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model
