"""Forbidden tokens are not written, and draws follow the model whatever the batch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from derta.data import Chat
from derta.evaluation import (
    AnswerFile,
    Decoding,
    Server,
    ServerGenerator,
    ServerSettings,
    generate,
)
from derta.evaluation.generation.choice import TokenChoice, draw, draws
from derta.evaluation.generation.decoding import GREEDY
from derta.evaluation.generation.local import stop_ids
from served import Served, said, serving
from tiny import tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40], [17, 18], [5, 6, 7, 8], [99] * 7]
IDS = [f"prompt {place}" for place in range(len(PROMPTS))]
SETTINGS: dict[str, Any] = dict(ids=IDS, stop_ids={3}, max_new_tokens=10, batch_size=2)


def by_definition(
    model: PreTrainedModel, prompt: list[int], decoding: Decoding, limit: int
) -> list[int]:
    """Decode with full forward passes, no cache, no padding; draw with NumPy."""
    model.eval()
    ids = list(prompt)
    shares = draws(decoding, prompt, limit)
    for step in range(limit):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        scores = logits.double().numpy()
        if step < decoding.banned_for:
            scores[list(decoding.banned)] = -np.inf
        token = int(scores.argmax())
        if decoding.temperature:
            p = np.exp((scores - scores.max()) / decoding.temperature)
            token = int(np.searchsorted(np.cumsum(p) / p.sum(), shares[step], side="right"))
        if token == 3:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "changes",
    [
        {"banned_for": 3},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.5, "sample": 2, "banned_for": 4},
    ],
)
def test_answers_follow_from_the_definition(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = tiny_model("llama")
    greedy = generate(model, PROMPTS, **SETTINGS)
    banned = tuple({token for answer in greedy for token in answer[:2]})
    decoding = Decoding(banned=banned, **changes)
    answers = generate(model, PROMPTS, **SETTINGS, decoding=decoding)
    assert answers == [by_definition(model, prompt, decoding, 10) for prompt in PROMPTS]
    assert answers != greedy
    if decoding.banned_for:
        assert not {token for one in answers for token in one[: decoding.banned_for]} & set(banned)


def test_samples_depend_on_no_batch_and_no_order_but_on_seed_and_number() -> None:
    model = tiny_model("llama")
    decoding = Decoding(temperature=1.0)
    answers = generate(model, PROMPTS, **SETTINGS, decoding=decoding)
    turned = generate(model, PROMPTS[::-1], **SETTINGS | {"batch_size": 5}, decoding=decoding)
    assert turned[::-1] == answers
    for other in (Decoding(temperature=1.0, seed=1), Decoding(temperature=1.0, sample=1)):
        assert generate(model, PROMPTS, **SETTINGS, decoding=other) != answers
    shorter = generate(model, PROMPTS, **SETTINGS | {"max_new_tokens": 4}, decoding=decoding)
    assert shorter == [answer[:4] for answer in answers]


@pytest.mark.parametrize(
    "decoding", [GREEDY, Decoding(banned=(5,), banned_for=2), Decoding(temperature=1.0)]
)
def test_no_token_is_chosen_by_logits_that_are_no_numbers(decoding: Decoding) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[-1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="^no token can be chosen: the model's logits are"):
        generate(model, PROMPTS, **SETTINGS, decoding=decoding)


def test_one_logit_that_is_no_number_is_remembered_to_the_end() -> None:
    """It may be of one answer of a batch, and of one step."""
    choose = TokenChoice(GREEDY, [(1, 2), (3, 4)], max_new_tokens=3)
    numbers = torch.zeros(2, 5)
    for scores in (numbers, torch.tensor([[0.0] * 5, [0.0, 1, torch.nan, 0, 0]]), numbers):
        choose(torch.ones(2, 2, dtype=torch.long), scores)
    with pytest.raises(FloatingPointError, match="^no token can be chosen: the model's logits are"):
        choose.check()


def test_draws_have_the_probabilities_of_the_logits() -> None:
    p = np.array([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    count = 4000
    shares = np.array([draws(Decoding(sample=n), [7], 1)[0] for n in range(count)])
    logits = torch.from_numpy(np.log(np.maximum(p, 0), where=p > 0, out=np.full(6, -np.inf)))
    drawn = draw(logits.expand(count, -1), torch.from_numpy(shares))
    seen = np.bincount(drawn.numpy(), minlength=6)
    assert (seen[p == 0] == 0).all()
    bound = 4 * np.sqrt(count * p * (1 - p))  # four standard deviations
    assert (np.abs(seen - count * p) <= bound).all()
    # The ends of the range: no token of probability 0, whatever the rounding.
    ends = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert draw(logits.expand(2, -1), ends).tolist() == [1, 4]


def test_stored_answers_are_taken_only_for_the_same_decoding(tmp_path: Path, chat: Chat) -> None:
    model = tiny_model("llama")
    decodings = [
        GREEDY,
        Decoding(temperature=1.0),
        Decoding(temperature=1.0, sample=1),
        Decoding(banned=(5, 6), banned_for=2),
        Decoding(banned=(5, 6), banned_for=3),
    ]
    apart = [generate(model, PROMPTS, **SETTINGS, decoding=one) for one in decodings]
    kept = AnswerFile(tmp_path / "model.jsonl", chat.tokenizer, "a model")
    for _ in range(2):
        shared = [
            generate(model, PROMPTS, **SETTINGS, decoding=one, answers=kept) for one in decodings
        ]
        assert shared == apart
    lines = (tmp_path / "model.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 5 * len(PROMPTS)


def test_a_server_writes_the_forbidden_start_apart_and_goes_on(
    chat: Chat,
    scripted: Callable[..., PreTrainedModel],
    chain: Callable[..., dict[int, int]],
) -> None:
    """The server runs the same model, with the bias added to the logits."""
    model = scripted({**chain(50, 51, 52, 53), **chain(40, 41, 40), **chain(60, 61, 60)})
    ends = stop_ids(model, chat)

    one_at_a_time = Lock()  # the server has threads, and a run replaces the model's settings

    def run(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        banned = tuple(map(int, body.get("logit_bias", {})))
        with one_at_a_time:
            (ids,) = generate(
                model,
                [body["prompt"]],
                ids=["a"],
                stop_ids=body["stop_token_ids"],
                max_new_tokens=body["max_tokens"],
                batch_size=1,
                decoding=Decoding(banned=banned, banned_for=body["max_tokens"]),
            )
        stopped = len(ids) < body["max_tokens"]  # like vLLM, it returns the token that ended
        return said("", [*ids, *list(ends)[:stopped]], "stop" if stopped else "length")

    prompts = [[50], [40], [41], [60]]
    names = ["a", "b", "c", "endless"]
    for banned_for in (2, 9):
        decoding = Decoding(banned=(41, 51), banned_for=banned_for)
        local = generate(
            model,
            prompts,
            ids=names,
            stop_ids=ends,
            max_new_tokens=6,
            batch_size=3,
            decoding=decoding,
        )
        with serving(run) as served:
            server = Server(ServerSettings(base_url=served.base_url, model="m"))
            generator = ServerGenerator(server, chat, max_new_tokens=6)
            written = generator(prompts, ids=names, decoding=decoding)
        assert [one.ids for one in written] == local
        assert len(local[-1]) == 6
        assert [one.text for one in written] == [
            chat.tokenizer.decode(ids, skip_special_tokens=True) for ids in local
        ]


def test_samples_of_a_server_have_seeds_and_fixed_fields_are_refused(chat: Chat) -> None:
    def generator(served: Served, **body: Any) -> ServerGenerator:
        settings = ServerSettings(base_url=served.base_url, model="m", body=body)
        return ServerGenerator(Server(settings), chat, max_new_tokens=4)

    with serving(lambda path, body: said("Yes.")) as served:
        for sample in range(3):
            decoding = Decoding(temperature=0.5, sample=sample)
            generator(served)([[1], [2]], ids=["a", "b"], decoding=decoding)
        assert {asked.body["temperature"] for asked in served.asked} == {0.5}
        assert set(Counter(asked.body["seed"] for asked in served.asked).values()) == {1}
        # Nothing is left to the generation_config of the server's model, unless a server is strict.
        all_tokens = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        assert all(all_tokens.items() <= asked.body.items() for asked in served.asked)
        served.asked.clear()
        generator(served, top_k=None)([[1]], ids=["a"], decoding=Decoding(temperature=1.0))
        generator(served)([[1]], ids=["a"])
        assert ["top_k" in asked.body for asked in served.asked] == [False, False]
        assert ["min_p" in asked.body for asked in served.asked] == [True, False]
        for body, decoding in (
            ({"logit_bias": None}, Decoding(banned=(5,), banned_for=1)),
            ({"seed": 1}, Decoding(temperature=1.0)),
        ):
            message = f"body: sets {next(iter(body))}, which an attack sets: remove it, or leave"
            with pytest.raises(ValueError, match=re.escape(message)):
                generator(served, **body)([[1]], ids=["a"], decoding=decoding)


@pytest.mark.parametrize("name", ["banned_for", "temperature", "seed", "sample"])
def test_numbers_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be a number from 0 on, got -1$"):
        Decoding(**{name: -1})
    with pytest.raises(ValueError, match="^temperature must be a number from 0 on, got inf$"):
        Decoding(temperature=float("inf"))
