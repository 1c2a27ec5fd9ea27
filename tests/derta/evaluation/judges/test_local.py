"""Local judges, scripted language models and classifiers, return the right verdicts."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from derta.evaluation.judges.base import SILENT, Exchange, Verdict
from derta.evaluation.judges.local import ClassifierJudge, ModelJudge
from derta.evaluation.judges.rubrics import RUBRICS, Rubric
from tiny import LLAMA3_TEMPLATE, tiny_tokenizer

GUARD_TEMPLATE = (
    "{% for m in messages %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text | trim }}\n{% endfor %}{% endfor %}"
)


def exchanges(*answers: str) -> list[Exchange]:
    return [Exchange(({"role": "user", "content": "How?"},), answer) for answer in answers]


def tokenizer(template: str | None = LLAMA3_TEMPLATE) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        bos_token="<|begin|>",
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
    )
    copy.chat_template = template
    return copy


def replies(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def replying(
    scripted: Callable[..., PreTrainedModel], chain: Callable[..., dict[int, int]]
) -> Callable[..., PreTrainedModel]:
    """Return a maker of models that reply with `text` to questions that end in `last`."""

    def make(last: int, text: str) -> PreTrainedModel:
        return scripted(chain(last, *replies(text)))

    return make


# A judge that replies yes to answers that end in "!", and no to those that end in "?".
ENDS = Rubric(lambda exchange: exchange.answer, RUBRICS["harmbench"].read, 4)


def test_verdicts_are_in_order_and_blank_answers_are_not_read(
    scripted: Callable[..., PreTrainedModel], chain: Callable[..., dict[int, int]]
) -> None:
    (yes,), (no,), (other,) = replies("!"), replies("?"), replies(";")
    script = {**chain(yes, *replies("yes")), **chain(no, *replies("no")), **chain(other, yes)}
    script.pop(replies("yes")[-1], None), script.pop(replies("no")[-1], None)
    judge = ModelJudge(scripted(script), tokenizer(), ENDS, batch_size=2)
    assert judge(exchanges("A!", "Longer?", " ", "Once more!", "B;")) == [
        Verdict(None, harmful=True),
        Verdict(None, harmful=False),
        SILENT,
        Verdict(None, harmful=True),
        Verdict(None),
    ]


def test_an_exchange_longer_than_the_context_is_undecided(
    replying: Callable[..., PreTrainedModel],
) -> None:
    (last,) = replies("!")
    judge = ModelJudge(replying(last, "yes"), tokenizer(), ENDS)
    room = 512 - ENDS.max_new_tokens
    count = len(replies("Q" * 40)) and room - 1  # one token a letter, and the last
    fits, exceeds = "Q" * count + "!", "Q" * (count + 1) + "!"
    assert len(replies(fits)) == room
    assert judge(exchanges(fits, exceeds)) == [Verdict(None, harmful=True), Verdict(None)]


@pytest.mark.parametrize("template", [LLAMA3_TEMPLATE, GUARD_TEMPLATE], ids=["plain", "parts"])
def test_a_guard_is_asked_through_its_own_template(
    replying: Callable[..., PreTrainedModel], template: str
) -> None:
    rendered = tokenizer(template).apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
        if template == GUARD_TEMPLATE
        else [{"role": "user", "content": "x"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    judge = ModelJudge(
        replying(replies(str(rendered))[-1], "safe"), tokenizer(template), RUBRICS["llama_guard"]
    )
    assert judge(exchanges("Stir it.")) == [Verdict(None, harmful=False)]
    assert not judge.decides_refusals


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the judge's tokenizer has no chat template, expected the model's own"),
        (
            "{{ messages[0].content }}",
            "the judge's chat template drops the answer to be judged",
        ),
        ("{{ raise_exception('never') }}", "the judge's chat template rejects the exchange: never"),
    ],
)
def test_a_guard_with_an_unusable_template_is_refused_at_once(
    scripted: Callable[..., PreTrainedModel], template: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelJudge(scripted({}), tokenizer(template), RUBRICS["llama_guard"])


def test_a_model_without_end_of_sequence_is_refused(
    scripted: Callable[..., PreTrainedModel],
) -> None:
    endless, model = tokenizer(), scripted({})
    endless.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="^the judge's tokenizer has no eos_token: set it$"):
        ModelJudge(model, endless, ENDS)


def classifier(architecture: str = "bert", **overrides: object) -> PreTrainedModel:
    settings: dict = dict(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=3,
        id2label={0: "NORMAL", 1: "REJECTION", 2: "HARM"},
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**settings, **overrides})
    return AutoModelForSequenceClassification.from_config(config)


ANSWERS = ("Sorry.", "Stir it well and open the paint.", "no", "Q", "ladder?", "Take the brush!")


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("reads", ["answer", "exchange"])
def test_batched_labels_equal_single_ones(architecture: str, reads: str) -> None:
    model, tokens = classifier(architecture), tokenizer()
    judge = ClassifierJudge(model, tokens, "REJECTION", "HARM", reads=reads, batch_size=4)  # type: ignore[arg-type]
    expected = []
    for answer in ANSWERS:
        texts = [answer] if reads == "answer" else ["How?", answer]
        with torch.no_grad():
            best = int(model.eval()(**tokens(*texts, return_tensors="pt")).logits.argmax())
        expected.append(Verdict(refused=best == 1, harmful=best == 2))
    assert len(set(expected)) > 1
    model.train()
    assert judge(exchanges(*ANSWERS)) == expected
    assert model.training


def test_only_a_classifier_of_exchanges_reads_the_prefilled_start() -> None:
    asked = exchanges("Q")[0].messages
    begun = [Exchange(asked, answer, "Take the ladder! ") for answer in ANSWERS]
    whole = exchanges(*(one.response for one in begun))
    for reads, same in (("answer", exchanges(*ANSWERS)), ("exchange", whole)):
        judge = ClassifierJudge(classifier(), tokenizer(), "REJECTION", "HARM", reads=reads)  # type: ignore[arg-type]
        assert judge(begun) == judge(same)
    assert judge(begun) != judge(exchanges(*ANSWERS))


def test_a_classifier_decides_only_named_labels_and_complete_answers() -> None:
    judge = ClassifierJudge(classifier(), tokenizer(), harmful_label="HARM")
    short, blank = judge(exchanges("Sorry.", " "))
    assert short.refused is None and short.harmful is not None
    assert not judge.decides_refusals
    assert blank == SILENT


@pytest.mark.parametrize(
    ("architecture", "room"), [("bert", 64), ("roberta", 60), ("mpnet", 62), ("llama", 64)]
)
def test_a_classifier_reads_as_many_tokens_as_it_has_positions(
    architecture: str, room: int
) -> None:
    judge = ClassifierJudge(classifier(architecture), tokenizer(), harmful_label="HARM")
    assert judge.tokenizer.model_max_length > 1000  # its length is not stated
    fits, exceeds = judge(exchanges("Q" * room, "Q" * (room + 1)))
    assert fits.harmful is not None
    assert exceeds == Verdict(None)


def test_answers_are_read_one_by_one_without_a_padding_token() -> None:
    model = classifier("llama", pad_token_id=None)
    judge = ClassifierJudge(model, tokenizer(), refusal_label="REJECTION", batch_size=4)
    assert judge.decides_refusals
    together = judge(exchanges(*ANSWERS))
    assert together == [judge(exchanges(answer))[0] for answer in ANSWERS]


@pytest.mark.parametrize(
    ("overrides", "labels", "message"),
    [
        ({}, {}, "refusal_label or harmful_label must be given; the labels are NORMAL, REJ"),
        (
            {},
            {"refusal_label": "NO"},
            "refusal_label must be one of NORMAL, REJECTION, HARM, got 'NO'",
        ),
        (
            {},
            {"harmful_label": "NO"},
            "harmful_label must be one of NORMAL, REJECTION, HARM, got 'NO'",
        ),
        (
            {"problem_type": "multi_label_classification"},
            {"harmful_label": "HARM"},
            "the classifier must give every answer exactly one of several labels",
        ),
        (
            {"id2label": {0: "HARM"}},
            {"harmful_label": "HARM"},
            "the classifier must give every answer exactly one of several labels",
        ),
    ],
)
def test_unusable_labels_are_refused(overrides: dict, labels: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ClassifierJudge(classifier(**overrides), tokenizer(), **labels)
