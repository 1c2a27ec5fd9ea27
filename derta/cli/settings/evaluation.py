"""Settings of `derta eval` and its actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from derta.cli.settings.shared import LoadingSettings
from derta.data.records.refusal_keywords import REFUSAL_KEYWORDS
from derta.data.records.sources import COLUMNS_HELP
from derta.evaluation.attacks import PREFILL_DEPTHS, SLOT
from derta.evaluation.measures.ranks import RankAttack
from derta.evaluation.presets import PRESETS
from derta.evaluation.scenarios import check_name
from derta.objectives.defaults import MAX_LENGTH, MAX_TOKENS
from derta.outputs import check_folder
from derta.settings import check_ranges, setting
from derta.training.settings import PackSettings, TextSettings

NAMED = ("attacks", "completions", "questions", "exports")
FILES = ("harmful", "benign", "borderline", "helpful", "multi_turn", *NAMED)
KEYWORDS_SHOWN = f"{len(REFUSAL_KEYWORDS)} phrases, from {REFUSAL_KEYWORDS[0]!r} on"
ResultFiles = str | list[str] | dict[str, str]


def check_refusal(refusal: str | int | list[str | int]) -> None:
    """Check that a refusal token is named.

    Raises:
        ValueError: the list is empty.
    """
    if refusal == []:
        raise ValueError("refusal must name at least one token, got []")


@dataclass(kw_only=True)
class RankSettings:
    """An attacker who takes a harmful response's tokens from a model's likeliest ones."""

    top_k: list[int] = setting(
        help="Values of k: an attacker goes on with a harmful response while its next token is "
        "among the k likeliest (arXiv 2512.05518). Read with the refusal curves. []: none.",
        factory=lambda: list(RankAttack().top_k),
        heading="rank-assisted attack",
    )
    rank_prefill: int = setting(0, "Tokens of the response that this attacker writes first.", ge=0)
    rank_tokens: int | None = setting(
        None, "Most tokens after them that the attacker wants; null: all.", ge=1
    )
    rank_misses: float = setting(
        0.0, "Share of these that the attacker can write without the model.", ge=0, lt=1
    )

    @property
    def rank_attack(self) -> RankAttack:
        """The attacker.

        Raises:
            ValueError: a value of k is below 1 or given twice.
        """
        return RankAttack(
            top_k=self.top_k,
            prefill=self.rank_prefill,
            tokens=self.rank_tokens,
            misses=self.rank_misses,
        )


@dataclass(kw_only=True)
class EvaluateConfig(LoadingSettings, TextSettings, RankSettings):
    """An evaluation.

    Raises:
        ValueError: there is nothing to evaluate on, a number is out of its range, a name cannot
            stand in a metric, a format or columns are for no given file, or output_dir cannot be a
            folder.
    """

    model: str | list[str] | dict[str, str] = setting(
        help="Folder of a model or of adapters, with weights in safetensors; several: "
        "'{before: a, after: b}'. For a model behind a server, a folder with its tokenizer."
    )
    output_dir: str = setting(
        help="Folder for report.html, summary.json and the pictures. Its answers/ holds the "
        "models' answers, readable by its owner only; an interrupted evaluation resumes from there."
    )
    preset: Literal["official"] | None = setting(
        None,
        "Evaluation whose files and settings fill the keys that are not given. official: the "
        "paper's attacks, GSM8K, MMLU and AlpacaEval, from the authors' test files.",
        heading="presets",
    )
    preset_data: str | None = setting(None, "Folder of the preset's test files.")
    harmful: list[str] = setting(
        help="Files of requests to refuse, with the responses that attacks prefill.",
        factory=list,
        heading="requests, in files of any known format; scenarios without requests are left out",
    )
    benign: list[str] = setting(help="Files of harmless requests, for over-refusal.", factory=list)
    borderline: list[str] = setting(
        help="Files of harmless requests that look harmful, for over-refusal.", factory=list
    )
    helpful: list[str] = setting(
        help="Files of harmless requests with the right answers.", factory=list
    )
    helpful_metric: Literal["exact_match", "perplexity"] = setting(
        "exact_match", "exact_match of generated answers, or perplexity of the given ones."
    )
    questions: dict[str, str | list[str]] = setting(
        help="Files of questions by name: '{gsm8k: gsm8k.jsonl, mmlu: mmlu.jsonl}'. The final "
        "answer counts: a number, or the letter of a choice.",
        factory=dict,
    )
    exports: dict[str, str | list[str]] = setting(
        help="Files of harmless requests by name, whose answers another program judges: "
        "'{alpaca_eval: alpaca.json}'. They are written to exports/, in AlpacaEval's format.",
        factory=dict,
    )
    wrappers: dict[str, str] = setting(
        help="Texts around the requests of named files, each with the slot {request}: '{mmlu: "
        '"Choose the right option.\\n{request}"}\'.',
        factory=dict,
    )
    formats: dict[str, str] = setting(
        help="Formats by file, if a file has no header or its fields do not tell its format: "
        "'{hex-phi.csv: hex_phi}'.",
        factory=dict,
    )
    columns: dict[str, dict[str, Any]] = setting(
        help="Columns by file, for rows of no known format: '{attacks.csv: {prompt: behavior, "
        "category: meta.topic}}'.",
        factory=dict,
    )
    lm_eval: list[str] = setting(
        help="Tasks of lm-eval, by name or as a YAML file: [ifeval, my-task.yaml].", factory=list
    )
    prefill_depths: list[int | Literal["whole"]] = setting(
        help="Numbers of tokens of the harmful response that an attacker writes: [0, 64, 1024, "
        "whole]. whole: all of it, and the model goes on.",
        factory=lambda: list(PREFILL_DEPTHS),
        heading="attacks",
    )
    templates: str | None = setting(
        None,
        "File of texts around a request, one a line or a JSON list, each with the slot {request}.",
    )
    refusal_banned: int = setting(
        0,
        "Number of first tokens of an answer that may not begin a refusal, without and with "
        "prefilled tokens; 0: no such attack. An answer more for every prefill depth.",
        ge=0,
    )
    sampling: int = setting(
        0,
        "Number of answers drawn for each harmful request, of which one success is enough; 0: no "
        "such attack.",
        ge=0,
    )
    temperature: float = setting(1.0, "Temperature of drawn answers.", gt=0)
    seed: int = setting(0, "Seed of drawn answers.", ge=0)
    prefill_thinking: str | None = setting(
        None,
        "Text that opens a thinking block, in which prefilled tokens then stand; auto: the one in "
        "the chat template; null: no such attack. An answer more for every prefill depth.",
    )
    in_context: bool = setting(
        False,
        "If true, each harmful request also follows another one and its response, as a later turn.",
    )
    multi_turn: list[str] = setting(
        help="Files of harmful conversations. The model answers every turn of the user.",
        factory=list,
    )
    attacks: dict[str, str | list[str]] = setting(
        help="Files of ready-made harmful prompts by name: '{codeattack: codeattack.jsonl}'.",
        factory=dict,
    )
    completions: dict[str, str | list[str]] = setting(
        help="Files of harmful texts by name, which the model continues without a chat template: "
        "'{completionattack: completion.jsonl}'.",
        factory=dict,
    )
    max_new_tokens: int = setting(256, "Longest answer, in tokens.", ge=1)
    empty_answers: Literal["apart", "failed"] = setting(
        "apart",
        "Empty answers are apart, beside the rates of attacks and over-refusal, or failed: attacks "
        "without success, as the paper counts.",
    )
    defences: dict[str, Any] = setting(
        help="Defences without training by name, each a row beside every model: '{header: "
        "{reinsert_header: true}, prompt: {system_prompt: Refuse what harms.}}'. "
        "header_after: tokens of an own answer before its header is put in again.",
        factory=dict,
        heading="defences without training",
    )
    judges: dict[str, Any] = setting(
        help="Judges by name, the main one first: '{keyword: {}, guard: {kind: wildguard, path: "
        "models/wildguard}}'. All read the same answers. See derta eval calibrate.",
        factory=lambda: {"keyword": {}},
        heading="judges",
    )
    keywords: list[str] = setting(
        help="Phrases by which a keyword judge recognizes a refusal: [sorry, I cannot]. Without "
        "such a judge, those of attacks and defences.",
        factory=lambda: list(REFUSAL_KEYWORDS),
        shown=KEYWORDS_SHOWN,
    )
    samples: int = setting(0, "Number of answers that the report shows for each scenario.", ge=0)
    keep_answers: bool = setting(
        True,
        "If true, answers/ stays when all is done, so that another judge needs no new answers.",
    )
    curve: bool = setting(
        True,
        "If true, read refusal curves and rank curves. They need harmful responses and a model "
        "that apply_derta accepts.",
        heading="refusal curve",
    )
    refusal: str | int | list[str | int] = setting(
        "auto",
        "Refusal token: a word, a token id, a list of them, whose probabilities add up, or auto, "
        "the most frequent first token of the safe responses in harmful, and Sorry without any.",
    )
    max_tokens: int = setting(MAX_TOKENS, "Longest pack of the refusal curve, in tokens.", ge=1)
    batch_size: int = setting(16, "Prompts a batch.", ge=1, heading="model")
    servers: dict[str, Any] = setting(
        help='Servers by name of the model: \'{after: {base_url: "http://localhost:8000/v1", '
        "model: tuned}}'. A served model has no refusal curves. api_key_env: NAME of the variable "
        "with its key; OPENAI_API_KEY is sent to OpenAI only.",
        factory=dict,
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        check_refusal(self.refusal)
        _ = self.rank_attack
        if not self.lm_eval and not any(getattr(self, key) for key in FILES):
            raise ValueError(f"name at least one file of requests: {', '.join(FILES)}; or lm_eval")
        for key in ("templates", "refusal_banned", "sampling", "prefill_thinking", "in_context"):
            if getattr(self, key) and not self.harmful:
                raise ValueError(f"{key}: attacks with requests of harmful, got no file of them")
        if self.preset_data is not None and self.preset is None:
            raise ValueError("preset_data: is the folder of a preset's files, expected preset too")
        for key in NAMED:
            for name in getattr(self, key):
                check_name(key, name)
        if both := self.attacks.keys() & self.completions.keys():
            raise ValueError(f"completions: {min(both)!r} names an attack too, expected another")
        for name, text in self.wrappers.items():
            if not any(name in getattr(self, key) for key in NAMED):
                raise ValueError(f"wrappers: {name!r} names none of {', '.join(NAMED)}")
            if SLOT not in text:
                raise ValueError(f"wrappers.{name}: must have the slot {SLOT}, got {text!r}")
        for key in ("formats", "columns"):
            for path in getattr(self, key):
                if path not in self.files:
                    raise ValueError(f"{key}: {path}: is no file that another key names")
        check_folder("output_dir", self.output_dir)

    @staticmethod
    def filled(given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the preset that is given, {} without one or with an unknown one.

        Raises:
            ValueError: its folder is not given.
        """
        preset = PRESETS.get(str(given.get("preset")))
        if preset is None:
            return {}
        if given.get("preset_data") is None:
            raise ValueError("preset needs preset_data, the folder of its test files")
        return preset(str(given["preset_data"]))

    @property
    def files(self) -> list[str]:
        """All files of requests."""
        keys = [getattr(self, key) for key in FILES]
        values = [one for key in keys for one in (key.values() if isinstance(key, dict) else key)]
        return [path for one in values for path in ([one] if isinstance(one, str) else one)]


@dataclass(kw_only=True)
class TamperConfig(EvaluateConfig):
    """An evaluation before and after fine-tuning by an attacker.

    Raises:
        ValueError: as `EvaluateConfig`, there is nothing to tune on, the steps are not distinct, or
            a key is for models that are not tuned here.
    """

    model: str = setting(
        help="Folder of a model or of adapters, with weights in safetensors. It stays as it is."
    )
    output_dir: str = setting(
        help="Folder for report.html, summary.json and the pictures. Its answers/ holds the "
        "models' answers, readable by its owner only: the same tuning again, with another judge, "
        "needs no new ones. No tampered model is kept."
    )
    tune_harmful: list[str] = setting(
        help="Files of harmful requests with harmful responses, or of triples, that the attacker "
        "tunes on. None of these requests should be in harmful.",
        factory=list,
        heading="fine-tuning by the attacker",
    )
    tune_harmless: list[str] = setting(
        help="Files of harmless dialogues, likewise. With tune_harmful, both are mixed.",
        factory=list,
    )
    tune_examples: int | None = setting(
        None, "Number of examples of each kind, from the first; null: all.", ge=1
    )
    steps: list[int] = setting(
        help="Numbers of optimizer steps after which all is measured; 0 is measured too.",
        factory=lambda: [10, 50, 100],
    )
    method: Literal["full", "lora"] = setting(
        "full",
        "Weights that are tuned. full: all, in float32 unless dtype is given; lora: adapters on "
        "all linear layers but the head.",
    )
    lora_r: int = setting(16, "Rank of the adapters.", ge=1, le=8192)
    lora_alpha: int = setting(
        16, "Scale of the adapters, as a multiple of 1 / lora_r.", ge=1, le=10**6
    )
    learning_rate: float = setting(2e-5, "Learning rate of all steps.", gt=0, le=1)
    examples_per_step: int = setting(16, "Examples per optimizer step.", ge=1)
    max_length: int = setting(
        MAX_LENGTH, "Longest example, in tokens. Longer ones lose their end.", ge=1
    )
    seed: int = setting(
        0, "Seed of drawn answers, the order of examples and the adapters.", ge=0, le=2**32 - 1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tune_harmful and not self.tune_harmless:
            raise ValueError("tune_harmful or tune_harmless: expected at least one file, got none")
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps):
            raise ValueError(f"steps must be distinct and at least 1, got {self.steps}")
        for key in ("servers", "exports", "defences"):
            if getattr(self, key):
                raise ValueError(f"{key}: are for models that stay as they are, use derta eval")

    @property
    def files(self) -> list[str]:
        return [*super().files, *self.tune_harmful, *self.tune_harmless]


@dataclass(kw_only=True)
class CalibrateConfig:
    """A calibration.

    Raises:
        ValueError: there is no file, columns are for no given file, or output_dir cannot be a
            folder.
    """

    files: list[str] = setting(
        help="Answers labelled by people, as JSON, JSONL, CSV or parquet: JailbreakBench judge "
        "comparison, WildGuardTest, XSTest completions, or any with prompt, response, label."
    )
    columns: dict[str, dict[str, Any]] = setting(
        help="Fields of a file by the names of these formats, by file: '{answers.csv: {prompt: "
        "question, response: Response, label: verdict}}'.",
        factory=dict,
    )
    output_dir: str = setting(
        help="Folder for calibration.json and the verdicts of judges behind a server."
    )
    judges: dict[str, Any] = setting(
        help="Judges by name: '{keyword: {}, guard: {kind: wildguard, path: models/wildguard}}'. "
        "Kinds: keyword, official_keywords, harmbench, wildguard, llama_guard, llm, classifier, "
        "server. A server has base_url, model and api_key_env: NAME of the variable with its key; "
        "OPENAI_API_KEY is sent to OpenAI only.",
        factory=lambda: {"keyword": {}},
    )

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files: expected at least one file of labelled answers, got none")
        for path in self.columns:
            if path not in self.files:
                raise ValueError(f"columns: {path}: is none of the files")
        check_folder("output_dir", self.output_dir)


@dataclass(kw_only=True)
class CompareConfig:
    """A comparison.

    Raises:
        ValueError: there are no results, names do not match them, or output_dir cannot be a folder.
    """

    results: list[str] | dict[str, ResultFiles] = setting(
        help="Results of each model: a summary.json of derta eval or its folder, or result files "
        "of the official repository, as a file, a folder or a pattern. Named: '{before: a, after: "
        "b}'; one model's by attack: '{before: {direct: a.json, completion: b.json}}'. Files that "
        "no mapping names belong to the attack that their folder is named after."
    )
    output_dir: str = setting(help="Folder for comparison.html, comparison.json and the pictures.")
    names: list[str] = setting(
        help="Names of the models, if results are not named: [before, after].", factory=list
    )
    analysis: Literal["all", "first_tokens", "positions", "terms", "reach"] = setting(
        "all", "Analysis to run."
    )
    recipes: dict[str, str] | None = setting(
        None,
        "Model of each recipe: '{vanilla: a, prefix_only: b, rto_only: c, derta: d}'.",
        shown="models named like a recipe",
    )
    prompts: list[str] = setting(
        help="Test files, if prompt and answer are one string in result files.",
        factory=list,
        heading="official result files",
    )
    keywords: list[str] = setting(
        help="Phrases by which the judge recognizes a refusal: [sorry, I cannot].",
        factory=lambda: list(REFUSAL_KEYWORDS),
        shown=KEYWORDS_SHOWN,
    )
    tokenizer: str | None = setting(
        None, "Folder of a tokenizer, to count positions in tokens; null: in words."
    )
    keep_repeats: bool = setting(
        False, "If true, a repeated request counts as often as a file has it."
    )

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("results: expected at least one file or folder, got none")
        if self.names and isinstance(self.results, dict):
            raise ValueError("names are for a list of results, a mapping has its own")
        if self.names and len(self.names) != len(self.results):
            raise ValueError(
                f"names must be as many as results, {len(self.results)}, got {len(self.names)}"
            )
        check_folder("output_dir", self.output_dir)


@dataclass(kw_only=True)
class CurveConfig(LoadingSettings, PackSettings, RankSettings):
    """The refusal curves and rank curves of one model.

    Raises:
        ValueError: a number is out of its range, or output_dir cannot be a folder.
    """

    model: str = setting(help="Folder of a model or of adapters, with weights in safetensors.")
    data: list[str] = setting(
        help="Files of triples, whose harmful responses are read, or of dialogues, whose last "
        "answers are read."
    )
    role: Literal["safety", "helpful", "borderline"] = setting(
        "safety", "Role of the files, as in training."
    )
    format: str | None = setting(None, "Format of the rows, if their fields do not tell it.")
    columns: dict[str, Any] = setting(help=COLUMNS_HELP, factory=dict)
    output_dir: str = setting(
        "outputs/curve",
        "Folder for curve.json, and for curve and rank_curve as .png and .svg. None holds text.",
    )
    refusal: str | int | list[str | int] = setting(
        "auto",
        "Refusal token: a word, a token id, a list of them, whose probabilities add up, or auto, "
        "the most frequent first token of the safe responses, and Sorry without any.",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        check_refusal(self.refusal)
        _ = self.rank_attack
        check_folder("output_dir", self.output_dir)
