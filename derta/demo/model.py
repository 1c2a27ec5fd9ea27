"""The embedded world's base model: a tokenizer and a small Llama, trained to answer every request.

It stands for a pre-trained model without safety tuning.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from derta.labels import IGNORE_INDEX

BATCH_SIZE = 32
LEARNING_RATE = 2e-3

_END = "<|end|>"
_PAD = "<|pad|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every word of the texts is one token.

    Args:
        texts: texts of fewer than 1,500 words.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2048,  # more than the number of words: merging stops early
            special_tokens=[_PAD, _END, *_ROLES],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=_PAD, eos_token=_END)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def new_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, seed: int
) -> LlamaForCausalLM:
    """Create a Llama of four layers with random weights; 1.1 M parameters at hidden size 128.

    Args:
        tokenizer: tokenizer of the model's vocabulary.
        hidden_size: a multiple of 8.
        seed: seed of the weights.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # Far above the usual 0.02: at this width, recipes are learned in half the steps.
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    steps: int,
    seed: int,
    title: str,
) -> None:
    """Train on the next token of all texts, in place.

    Args:
        model: the model to train.
        tokenizer: its tokenizer; it pads on the right, so the causal mask hides all padding.
        texts: the texts to draw from at random.
        steps: number of steps, of 32 texts each.
        seed: seed of the draws.
        title: title of the progress bar.
    """
    rng = random.Random(seed)
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    model.train()
    with tqdm(total=steps, desc=title, unit="step", dynamic_ncols=True) as bar:
        for _ in range(steps):
            batch = tokenizer.pad(
                {"input_ids": rng.choices(encoded, k=BATCH_SIZE)}, return_tensors="pt"
            )
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
            loss = model(input_ids=batch["input_ids"], labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            bar.update()
