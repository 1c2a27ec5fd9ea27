"""Batched answers equal those to single prompts, whatever the model's settings."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedModel

from derta.data import Chat
from derta.evaluation import generate
from derta.evaluation.generation.local import stop_ids
from derta.modeling.patch import apply_derta
from tiny import ARCHITECTURES, tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [40], [17, 18], [5, 6, 7, 8], [17, 18], [99] * 7]
IDS = [f"prompt {place}" for place in range(len(PROMPTS))]


def one_at_a_time(
    model: PreTrainedModel, prompt: list[int], stop: set[int], limit: int
) -> list[int]:
    """Decode greedily by definition: full forward passes, no cache, no padding."""
    model.eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(limit):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token in stop:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_batched_answers_equal_single_ones(architecture: str, patched: bool) -> None:
    model = tiny_model(architecture)
    endless = [one_at_a_time(model, prompt, set(), 12) for prompt in PROMPTS]
    stop = {answer[2 * place] for place, answer in enumerate(endless)}
    expected = [one_at_a_time(model, prompt, stop, 12) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1
    if patched:
        apply_derta(model, 5)
    answers = generate(model, PROMPTS, ids=IDS, stop_ids=stop, max_new_tokens=12, batch_size=4)
    assert answers == expected


def test_adapters_are_used() -> None:
    torch.manual_seed(0)
    settings = dict(ids=IDS, stop_ids={3}, max_new_tokens=6, batch_size=6)
    before = generate(tiny_model("llama"), PROMPTS, **settings)
    model = get_peft_model(
        tiny_model("llama"),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    after = generate(model, PROMPTS, **settings)
    assert after == [one_at_a_time(model, prompt, {3}, 6) for prompt in PROMPTS]
    assert after != before


def test_the_models_generation_settings_are_ignored_and_restored() -> None:
    model = tiny_model("llama")
    settings = dict(ids=IDS, stop_ids={3}, max_new_tokens=8, batch_size=6)
    greedy = generate(model, PROMPTS, **settings)
    own = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        repetition_penalty=3.0,
        num_beams=3,
        max_new_tokens=1,
        suppress_tokens=sorted({token for answer in greedy for token in answer}),
        eos_token_id=[token for answer in greedy for token in answer][:1],
    )
    model.generation_config = own
    before = own.to_dict()
    assert generate(model, PROMPTS, **settings) == greedy
    assert model.generation_config is own
    assert own.to_dict() == before


def test_the_mode_of_every_module_is_restored_even_after_an_error(monkeypatch) -> None:
    model = tiny_model("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    settings = dict(ids=IDS, stop_ids={3}, max_new_tokens=2, batch_size=6)
    generate(model, PROMPTS, **settings)
    assert [module.training for module in model.modules()] == modes

    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    own = model.generation_config
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, **settings)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own
    assert torch.is_grad_enabled()


def test_equal_prompts_run_once(monkeypatch) -> None:
    model, seen = tiny_model("llama"), []
    run = model.generate

    def counting(**inputs: torch.Tensor) -> torch.Tensor:
        seen.append(len(inputs["input_ids"]))
        return run(**inputs)

    monkeypatch.setattr(model, "generate", counting)
    generate(model, PROMPTS, ids=IDS, stop_ids={3}, max_new_tokens=2, batch_size=3)
    assert seen == [3, 2]


def test_an_answer_ends_at_the_end_of_turn_or_any_end_of_sequence(
    chat: Chat, scripted: Callable[..., PreTrainedModel], chain: Callable[..., dict[int, int]]
) -> None:
    model = scripted(chain(50, 51, 52, 53))
    model.generation_config.eos_token_id = [52]
    ends = stop_ids(model, chat)
    assert ends == {52, chat.tokenizer.convert_tokens_to_ids("<|eot_id|>")}
    model.generation_config.eos_token_id = None
    assert stop_ids(model, chat) == {chat.tokenizer.convert_tokens_to_ids("<|eot_id|>")}
    settings = dict(ids=["a"], max_new_tokens=9, batch_size=1)
    assert generate(model, [[50]], stop_ids=ends, **settings) == [[51]]
    assert generate(model, [[50]], stop_ids={3}, **settings) == [[51, 52, 53]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"prompts": [[5], []], "ids": ["a", "b"]}, "b: the prompt is empty"),
        (
            {"prompts": [[5], [5] * 509], "ids": ["a", "b"]},
            "b: the prompt's 509 tokens and max_new_tokens (4) exceed the model's context of 512",
        ),
    ],
)
def test_invalid_prompts_and_limits_are_refused(changes: dict, message: str) -> None:
    settings: dict = dict(prompts=PROMPTS, ids=IDS, stop_ids={3}, max_new_tokens=4, batch_size=2)
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(tiny_model("llama"), **{**settings, **changes})
