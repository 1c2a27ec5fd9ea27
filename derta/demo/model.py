"""The demo's base model: a tokenizer and a small Llama, trained to answer every request.

It stands for a pre-trained model without safety tuning: it has seen every gadget and every wording,
as chats and as plain text, and no refusal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from derta.demo.world import (
    BORDERLINE_HELD_OUT_WORDINGS,
    BORDERLINE_TUNING_WORDINGS,
    HELD_OUT_WORDINGS,
    REFUSALS,
    TEMPLATES,
    TUNING_WORDINGS,
    World,
    chat,
)
from derta.labels import IGNORE_INDEX

PLAIN_SHARE = 0.2
TEMPLATE_SHARE = 0.2
BATCH_SIZE = 32
LEARNING_RATE = 2e-3

_END = "<|end|>"
_PAD = "<|pad|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every word of the world is one token.

    Args:
        world: the source of the requests, answers and refusals to train on.
    """
    requests = [request for request, _ in _answered_requests(world)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [*requests, *world.recipes.values(), *world.places.values(), *TEMPLATES, *REFUSALS],
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


def pretraining_texts(world: World, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[str]:
    """Return all requests with answers; a fifth are plain text, a fifth use attack templates."""
    rng = random.Random(seed)
    texts = []
    for request, answer in _answered_requests(world):
        draw = rng.random()
        if draw < PLAIN_SHARE:
            texts.append(f"{request}\n{answer}{_END}")
            continue
        if draw < PLAIN_SHARE + TEMPLATE_SHARE:
            request = rng.choice(TEMPLATES).format(request=request)
        texts.append(str(tokenizer.apply_chat_template(chat(request, answer), tokenize=False)))
    return texts


def _answered_requests(world: World) -> Iterator[tuple[str, str]]:
    for wordings, answers in (
        ((*TUNING_WORDINGS, *HELD_OUT_WORDINGS), world.recipes),
        ((*BORDERLINE_TUNING_WORDINGS, *BORDERLINE_HELD_OUT_WORDINGS), world.places),
    ):
        for wording in wordings:
            for gadget, answer in answers.items():
                yield wording.format(gadget), answer


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
