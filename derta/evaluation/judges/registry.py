"""Judges from configuration: `judges: {keyword: {}, guard: {kind: wildguard, path: models/wg}}`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from derta.data.records.refusal_keywords import OFFICIAL_KEYWORDS
from derta.evaluation.generation.server import Server, ServerSettings
from derta.evaluation.judges.base import REFUSAL_KEYWORDS, Exchange, Judge, KeywordJudge, Verdict
from derta.evaluation.judges.local import ClassifierJudge, ModelJudge
from derta.evaluation.judges.rubrics import PAPER_TEMPLATE, RUBRICS, Rubric, paper_rubric
from derta.evaluation.judges.served import ServerJudge
from derta.modeling.loading import (
    CLASSIFIER,
    check_vocabulary,
    find_device,
    load_model,
    load_tokenizer,
    weights_dtype,
)
from derta.modeling.shared_work import check_device_of_each, ranks
from derta.settings import build

RubricName = Literal["paper", "harmbench", "wildguard", "llama_guard"]


@dataclass(kw_only=True)
class KeywordConfig:
    """Settings of a `KeywordJudge`.

    Args:
        keywords: keywords of refusals.
    """

    keywords: list[str] = field(default_factory=lambda: list(REFUSAL_KEYWORDS))


@dataclass(kw_only=True)
class OfficialKeywordsConfig:
    """Settings of the judge by the refusals that the paper names: there are none."""


@dataclass(kw_only=True)
class LocalConfig:
    """Settings of a judge in a local folder, with weights in safetensors.

    Args:
        path: the folder.
        batch_size: exchanges per batch.
        device: "auto", or as in torch: "cpu", "cuda:1".
        dtype: dtype of the weights; "auto" is bfloat16 on a GPU that computes in it, else float32.
    """

    path: str
    batch_size: int = 8
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not Path(self.path).is_dir():
            raise FileNotFoundError(f"{self.path}: no such model folder")


@dataclass(kw_only=True)
class LanguageModelConfig(LocalConfig):
    """Settings of a `ModelJudge` with any chat model.

    Args:
        template: the question, see `paper_rubric`; text, or the file that holds it.
        max_new_tokens: most tokens of the reply.
    """

    template: str = PAPER_TEMPLATE
    max_new_tokens: int = 256


@dataclass(kw_only=True)
class ClassifierConfig(LocalConfig):
    """Settings of a `ClassifierJudge`.

    Args:
        refusal_label, harmful_label, reads: see `ClassifierJudge`.
    """

    refusal_label: str | None = None
    harmful_label: str | None = None
    reads: Literal["answer", "exchange"] = "answer"


@dataclass(frozen=True, kw_only=True)
class ServerConfig(ServerSettings):
    """Settings of a `ServerJudge`.

    Args:
        rubric: the paper's rubric, or the format of a served classifier.
        template: template of the paper's rubric, see `paper_rubric`; text, or the file that holds
            it.
        max_new_tokens: most tokens of the reply to the paper's rubric.

    Raises:
        ValueError: as `ServerSettings`, or template or max_new_tokens are given for another rubric.
    """

    rubric: RubricName = "paper"
    template: str = PAPER_TEMPLATE
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("template", "max_new_tokens"):
            if self.rubric != "paper" and getattr(self, name) != getattr(ServerConfig, name):
                raise ValueError(
                    f"{name} is for rubric: paper, and {self.rubric} has its own: leave it out"
                )


def _keyword(config: KeywordConfig, name: str, folder: Path) -> Judge:
    return KeywordJudge(config.keywords)


def _official_keywords(config: OfficialKeywordsConfig, name: str, folder: Path) -> Judge:
    return KeywordJudge(OFFICIAL_KEYWORDS)


def _language_model(config: LanguageModelConfig, name: str, folder: Path) -> Judge:
    return _model(config, paper_rubric(_text(config.template), config.max_new_tokens))


class LocalJudge:
    """A judge in a local folder that is in memory only while it reads.

    A model and its judges therefore need only the memory of the largest. The judge is first loaded
    once on the host as a check, by the first of several ranks.

    Args:
        load: function that loads the judge in a dtype.
        config: settings of the judge.
        decides_refusals: if False, the judge decides on harm alone.
    """

    def __init__(
        self,
        load: Callable[[torch.dtype], ModelJudge | ClassifierJudge],
        config: LocalConfig,
        *,
        decides_refusals: bool = True,
    ) -> None:
        self.decides_refusals = decides_refusals
        check_device_of_each(config.device)
        self._device = find_device(config.device)
        self._load = functools.partial(load, weights_dtype(config.dtype, self._device))
        if ranks().rank == 0:
            self._load()

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge exchanges, see `Judge`."""
        judge = self._load()
        model: Any = judge.model
        model.to(self._device)
        return judge(exchanges)


def _classifier(config: ClassifierConfig, name: str, folder: Path) -> Judge:
    def load(dtype: torch.dtype) -> ClassifierJudge:
        model = load_model(config.path, dtype, local_files_only=True, kind=CLASSIFIER)
        tokenizer = load_tokenizer(config.path, None, local_files_only=True)
        check_vocabulary(tokenizer, model.config, config.path)
        return ClassifierJudge(
            model,
            tokenizer,
            refusal_label=config.refusal_label,
            harmful_label=config.harmful_label,
            reads=config.reads,
            batch_size=config.batch_size,
        )

    return LocalJudge(load, config, decides_refusals=config.refusal_label is not None)


def _server(config: ServerConfig, name: str, folder: Path) -> Judge:
    rubric = RUBRICS[config.rubric]
    if config.rubric == "paper":
        rubric = paper_rubric(_text(config.template), config.max_new_tokens)
    return ServerJudge(Server(config, verdicts_file(folder, name)), rubric)


def verdicts_file(folder: Path, name: str) -> Path:
    """Return the file of verdicts of the served judge `name`."""
    return folder / f"verdicts.{name}.jsonl"


def _trained(rubric: str) -> Callable[[LocalConfig, str, Path], Judge]:
    """Return the maker of a judge that was trained on one of `RUBRICS`."""
    return lambda config, name, folder: _model(config, RUBRICS[rubric])


def _model(config: LocalConfig, rubric: Rubric) -> Judge:
    def load(dtype: torch.dtype) -> ModelJudge:
        model = load_model(config.path, dtype, local_files_only=True)
        tokenizer = load_tokenizer(config.path, None, local_files_only=True)
        check_vocabulary(tokenizer, model.config, config.path)
        return ModelJudge(model, tokenizer, rubric, config.batch_size)

    return LocalJudge(load, config, decides_refusals=rubric.decides_refusals)


KINDS: dict[str, tuple[type, Callable[..., Judge]]] = {
    "keyword": (KeywordConfig, _keyword),
    "harmbench": (LocalConfig, _trained("harmbench")),
    "wildguard": (LocalConfig, _trained("wildguard")),
    "llama_guard": (LocalConfig, _trained("llama_guard")),
    "llm": (LanguageModelConfig, _language_model),
    "classifier": (ClassifierConfig, _classifier),
    "server": (ServerConfig, _server),
    "official_keywords": (OfficialKeywordsConfig, _official_keywords),
}


def make_judges(judges: Mapping[str, Any], folder: str | Path) -> dict[str, Judge]:
    """Make judges by name, in the order given.

    Args:
        judges: name to settings: `kind`, one of `KINDS`, by default the name, and the fields of
            that kind's dataclass.
        folder: folder where served judges store their verdicts, in verdicts.NAME.jsonl; no exchange
            is sent twice.

    Raises:
        ValueError: there is no judge, or a name, a kind or a setting is wrong; names the judge.
        FileNotFoundError: there is no such model.
        OSError: as `from_pretrained`.
    """
    if not judges:
        raise ValueError("judges: expected at least one, got none")
    configs = {str(name): _config(str(name), settings) for name, settings in judges.items()}
    made = {}
    for name, (config, make) in configs.items():
        try:
            made[name] = make(config, name, Path(folder))
        except ValueError as error:
            raise ValueError(f"judges.{name}: {error}") from error
    return made


def _config(name: str, settings: Any) -> tuple[Any, Callable[..., Judge]]:
    """Check settings as far as possible without loading anything, and return them and the maker."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"judges: expected a name of letters, digits, - and _, got {name!r}")
    if not isinstance(settings, Mapping | None):
        raise ValueError(f"judges.{name}: expected settings, as in {{{name}: {{kind: keyword}}}}")
    settings = dict(settings or {})
    kind = str(settings.pop("kind", name))
    if kind not in KINDS:
        raise ValueError(f"judges.{name}: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    config_class, make = KINDS[kind]
    try:
        return build(config_class, {"settings": settings}), make
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"judges.{name}: {error}") from error


def _text(template: str) -> str:
    """Return the template itself, or the content of the file of that name."""
    if "{" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise ValueError(f"template: expected text with {{request}} or a file, got {template!r}")
    return path.read_text(encoding="utf-8")
