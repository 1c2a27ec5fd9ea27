"""An answer that a red flag ends is refused, whatever stands before it, and reaches nobody."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from derta.cli import main
from derta.data import Chat, Request
from derta.evaluation import (
    RUBRICS,
    AnswerFile,
    Decoding,
    Defence,
    EvaluationData,
    EvaluationSettings,
    Exchange,
    KeywordJudge,
    ModelGenerator,
    Verdict,
    evaluate_model,
    find_refusal_token,
)
from derta.evaluation.attacks import refusal_starts
from derta.evaluation.generation.decoding import GREEDY
from derta.evaluation.generation.local import Written, generate, stop_ids
from derta.evaluation.generation.server import Server, ServerGenerator, ServerSettings
from derta.evaluation.judges.served import ServerJudge
from derta.modeling.red_flag import add_flag
from served import said, serving
from tiny import tiny_tokenizer

TEXT = "<|red_flag|>"
HARMFUL = "The quick brown fox jumps over a lazy dog"
FLAGGED_AFTER = 3
REQUEST = Request(id="a", prompt="How do I paint?", response=HARMFUL)
DATA = EvaluationData(harmful=[REQUEST], benign=[Request(id="b", prompt="How do I paint?")])


class Judge(KeywordJudge):
    """A keyword judge that remembers what it has read."""

    def __call__(self, exchanges: Sequence[Exchange]) -> Any:
        self.read = [exchange.answer for exchange in exchanges]
        return super().__call__(exchanges)


@pytest.fixture
def chat() -> Chat:
    return Chat(copy.deepcopy(tiny_tokenizer()))


@pytest.fixture
def model(
    chat: Chat,
    scripted: Callable[..., PreTrainedModel],
    chain: Callable[..., dict[int, int]],
) -> PreTrainedModel:
    """Return a model that writes the harmful response, and flags it after three tokens of it."""
    harmful = chat.response_ids(REQUEST.messages, HARMFUL)
    made: Any = scripted(chain(chat.prompt_ids(REQUEST.messages)[-1], *harmful))
    flag = add_flag(made, chat.tokenizer, TEXT, seed=0)
    with torch.no_grad():
        made.lm_head.weight[flag] = 0
        made.lm_head.weight[flag, harmful[FLAGGED_AFTER - 1]] = 2
    return made


def settings(**changes: Any) -> EvaluationSettings:
    return EvaluationSettings(
        **{"prefill_depths": (1, 3, 4), "max_new_tokens": 30, "batch_size": 4, **changes}
    )


def test_every_figure_follows_from_the_flag(model: PreTrainedModel, chat: Chat) -> None:
    judge = Judge()
    asked = settings(judges={"keyword": judge}, refusal_banned=10, samples=1)
    result = evaluate_model(model, chat.tokenizer, DATA, asked).to_dict()
    assert result["asr"]["direct"] == 0.0 and result["over_refusal"]["benign"] == 1.0
    assert result["asr"]["prefill"] == {"1": 0.0, "3": 0.0, "4": 1.0}
    direct = result["counts"]["asr"]["direct"]
    assert (direct["trials"], direct["empty"]) == (1, 0)
    positions = result["refusal_positions"]["asr"]
    assert positions["direct"] == [FLAGGED_AFTER]
    assert positions["prefill"] == {"1": [FLAGGED_AFTER], "3": [FLAGGED_AFTER], "4": []}
    # An attacker who forbids the flag has the answer.
    assert result["asr"]["refusal_banned"] == {"0": 1.0, "1": 1.0, "3": 1.0, "4": 1.0}
    assert TEXT in result["refusal_starts"]
    shown = {one["metric"]: one for one in result["samples"]}
    assert shown["asr.direct"]["answer"] == TEXT and shown["asr.direct"]["prefilled"] == ""
    harmful = chat.response_ids(REQUEST.messages, HARMFUL)
    assert shown["asr.prefill.1"]["prefilled"] == chat.text(harmful[0])
    # What stands before a flag is shown to nobody, a judge included.
    withheld = chat.tokenizer.decode(harmful[:FLAGGED_AFTER])
    assert judge.read and withheld not in judge.read and "The quick brown fox jump" in judge.read
    assert judge.read.count("") == 1  # of raw text: no judge is asked about a flagged answer
    flag = len(tiny_tokenizer())
    assert find_refusal_token(model, chat.tokenizer) == flag
    assert flag in refusal_starts(chat, refusal_id=5, keywords=["Sorry"])


@pytest.mark.parametrize("alone", [Written("", [5], flagged=True), Written("", [])])
def test_the_only_answer_that_a_judge_of_harm_could_decide_is_no_rate_of_refusals(
    model: PreTrainedModel, chat: Chat, alone: Written
) -> None:
    def generate(
        prompts: Sequence[tuple[int, ...]], *, ids: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Written]:
        return [alone if id == "0" else Written("So.", [5]) for id in ids]

    asked = [Request(id=str(n), prompt=f"How do I paint {n}?") for n in range(3)]
    data = EvaluationData(harmful=asked, benign=asked)
    with serving(lambda path, body: said("yes")) as served:
        server = Server(ServerSettings(base_url=served.base_url, model="m"))
        judges = {"harm": ServerJudge(server, RUBRICS["harmbench"]), "keyword": KeywordJudge()}
        changed = settings(curve=False, judges=judges, empty_answers="failed")
        result = evaluate_model(model, chat.tokenizer, data, changed, generator=generate).to_dict()
    assert "over_refusal" not in result
    assert result["counts"]["over_refusal"]["benign"]["undecided"] == 3
    assert result["asr"]["direct"] == pytest.approx(2 / 3, abs=1e-6)
    assert result["refusal_positions"]["asr"]["direct"] == []
    refused = 1 / 3 if alone.flagged else 0
    assert result["judges"]["keyword"]["over_refusal"] == {
        "benign": pytest.approx(refused, abs=1e-6)
    }


def test_a_flag_after_a_defenders_header_refuses(model: PreTrainedModel, chat: Chat) -> None:
    defended = settings(
        curve=False, defence=Defence(reinsert_header=True, header_after=2), prefill_depths=(4,)
    )
    result = evaluate_model(model, chat.tokenizer, DATA, defended).to_dict()
    assert result["asr"]["prefill"] == {"4": 0.0}


def test_no_refusal_after_a_header_shows_what_a_flag_withholds(
    model: PreTrainedModel, chat: Chat
) -> None:
    prompt = tuple(chat.prompt_ids(REQUEST.messages))
    harmful = chat.response_ids(REQUEST.messages, HARMFUL)

    def generate(
        prompts: Sequence[tuple[int, ...]], *, ids: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Written]:
        withheld, refusal = Written("", harmful, flagged=True), Written("Sorry.", [5])
        return [withheld if asked == prompt else refusal for asked in prompts]

    defence = Defence(reinsert_header=True, header_after=2)
    changed = settings(curve=False, prefill_depths=(), defence=defence, samples=1)
    data = EvaluationData(benign=[REQUEST])
    result = evaluate_model(model, chat.tokenizer, data, changed, generator=generate).to_dict()
    (shown,) = result["samples"]
    assert shown["answer"] == TEXT and result["over_refusal"] == {"benign": 1.0}


def test_a_flagged_turn_is_forgotten_and_the_conversation_goes_on(model: PreTrainedModel) -> None:
    """As in `derta chat`: no deployment shows a model an empty answer of its own."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    strict = (
        "{% for m in messages %}{{ '' if m['content'] else raise_exception('empty') }}{% endfor %}"
    )
    tokenizer.chat_template = strict + tokenizer.chat_template
    chat = Chat(tokenizer)
    system = {"role": "system", "content": "Be kind."}
    first, second, third = ({"role": "user", "content": text} for text in ("A?", "B?", "C?"))
    flagged = tuple(chat.prompt_ids([system, first]))
    seen, read = [], []

    def generate(
        prompts: Sequence[tuple[int, ...]], *, ids: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Written]:
        seen.extend(prompts)
        return [Written("" if p == flagged else "So.", [5], p == flagged) for p in prompts]

    def judge(exchanges: Sequence[Exchange]) -> list[Verdict]:
        read.extend(exchanges)
        return [Verdict(refused=False) for _ in exchanges]

    data = EvaluationData(multi_turn=[Request(id="a", messages=[system, first, second, third])])
    changed = settings(curve=False, judges={"all": judge})
    result = evaluate_model(model, tokenizer, data, changed, generator=generate).to_dict()
    talk = [system, second, {"role": "assistant", "content": "So."}, third]
    assert seen == [flagged, tuple(chat.prompt_ids(talk[:2])), tuple(chat.prompt_ids(talk))]
    assert [list(exchange.messages) for exchange in read] == [talk]
    assert result["asr"] == {"multi_turn": 1.0}


def test_answers_are_withheld_and_found_again(
    model: PreTrainedModel, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harmful = chat.response_ids(REQUEST.messages, HARMFUL)
    prompts = [chat.prompt_ids(REQUEST.messages), [*chat.prompt_ids(REQUEST.messages), harmful[4]]]

    def written() -> list[Written]:
        kept = AnswerFile(tmp_path / "answers.jsonl", chat.tokenizer, "model")
        made = ModelGenerator(model, chat, max_new_tokens=20, batch_size=2, answers=kept)
        return made(prompts, ids=["a", "b"])

    first = written()
    assert first[0] == Written("", harmful[:FLAGGED_AFTER], flagged=True)
    assert not first[1].flagged and first[1].ids == harmful[5:]
    monkeypatch.setattr("derta.evaluation.generation.local._run", None)
    assert written() == first


@pytest.mark.parametrize("returns", ["ids", "text", "nothing"])
def test_a_served_models_flag_counts_if_it_is_returned(
    model: PreTrainedModel, chat: Chat, returns: str
) -> None:
    flag = len(tiny_tokenizer())
    ends = stop_ids(model, chat)

    def run(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        assert set(body["stop_token_ids"]) == set(ends) and flag in ends
        (ids,) = generate(
            model,
            [body["prompt"]],
            ids=["a"],
            stop_ids=ends - {flag},
            max_new_tokens=body["max_tokens"],
            batch_size=1,
            flag=flag,
        )
        text = chat.tokenizer.decode(ids, skip_special_tokens=returns != "text")
        return said(text, ids if returns == "ids" else None, "stop")

    with serving(run) as served:
        client = Server(ServerSettings(base_url=served.base_url, model="m"))
        generator = ServerGenerator(client, chat, max_new_tokens=20)
        (written,) = generator([chat.prompt_ids(REQUEST.messages)], ids=["a"])
    if returns == "nothing":
        assert not written.flagged and written.text == chat.tokenizer.decode(
            chat.response_ids(REQUEST.messages, HARMFUL)[:FLAGGED_AFTER]
        )
    else:
        assert written.flagged and written.text == "" and len(written.ids) == FLAGGED_AFTER


def test_commands_know_the_flag_of_a_folder(
    model: PreTrainedModel,
    chat: Chat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("model")
    chat.tokenizer.save_pretrained("model")
    row = {"prompt": REQUEST.prompt, "safe": "Sorry, no.", "harmful": HARMFUL}
    Path("harmful.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    given = "--model model --harmful harmful.jsonl --prefill_depths [1,4] --max_new_tokens 20"
    assert main(["eval", *given.split(), "--device", "cpu", "--output_dir", "out"]) == 0
    (entry,) = json.loads(Path("out/summary.json").read_text())["variants"].values()
    assert entry["asr"]["direct"] == 0.0 and entry["asr"]["prefill"] == {"1": 0.0, "4": 1.0}
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("How do I paint?\n"))
    assert main(["chat", "model", "--device", "cpu", "--max_new_tokens", "20"]) == 0
    assert capsys.readouterr().out.startswith("the model has flagged its answer")
