"""`derta eval`: attack success, over-refusal and refusal curves of models in local folders."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from derta.cli.settings.evaluation import EvaluateConfig
from derta.data import Chat, Request, Triple, read_requests
from derta.data.records.formats import Kind
from derta.data.records.reading import Reading, Wanted, read_placed
from derta.data.records.refusal_keywords import REFUSAL_KEYWORDS
from derta.data.records.sources import check_paths
from derta.evaluation import (
    Answered,
    AnswerFile,
    EvaluationData,
    EvaluationSettings,
    ModelGenerator,
    collect_answers,
    fingerprint,
    format_table,
    format_undecided,
    judge_answers,
    summarize,
    write_report,
)
from derta.evaluation.attacks import SLOT, thinking_tag
from derta.evaluation.defences import Defence, defended
from derta.evaluation.evaluate import refuse_what_takes_a_model, refuse_what_takes_responses
from derta.evaluation.generation.server import Server, ServerGenerator, ServerSettings
from derta.evaluation.judges.registry import make_judges, verdicts_file
from derta.evaluation.teacher_forcing import refusal_ids
from derta.modeling.adapters import read_adapters
from derta.modeling.folders import ADAPTER_CONFIG, read_object
from derta.modeling.loading import (
    base_of,
    find_device,
    load_tokenizer,
    load_tuned,
    tokenizer_of,
    weights_dtype,
)
from derta.modeling.shared_work import over_ranks, ranks
from derta.outputs import write_whole
from derta.settings import build
from derta.terminal import say


def model_folders(model: str | list[str] | dict[str, str]) -> dict[str, Path]:
    """Return the model folders by their names in the report.

    Raises:
        ValueError: two folders have one name, or none is given.
        FileNotFoundError: a folder does not exist.
    """
    if isinstance(model, dict):
        folders = {name: Path(path) for name, path in model.items()}
    else:
        paths = [Path(path) for path in ([model] if isinstance(model, str) else model)]
        folders = {path.resolve().name: path for path in paths}
        if len(folders) < len(paths):
            raise ValueError(
                "model: two folders have one name; name them: --model '{before: a/model, after: "
                "b/model}'"
            )
    if not folders:
        raise ValueError("model: expected at least one folder, got none")
    for path in folders.values():
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such model folder")
    return folders


def read_files(
    config: EvaluateConfig, paths: Sequence[str], kind: Kind, reading: Reading | None = None
) -> list[Request]:
    """Read the requests of files, each in its own format.

    Args:
        config: has formats and columns by file.
        paths: the files.
        kind, reading: see `read_requests`.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: as `read_requests`.
    """
    check_paths(paths)
    return [
        request
        for path in paths
        for request in read_requests(
            path,
            kind=kind,
            format=config.formats.get(path),
            columns=config.columns.get(path),
            reading=reading,
        )
    ]


def read_data(config: EvaluateConfig) -> EvaluationData:
    """Read the requests of all files. Ids may recur in several files.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: as `read_requests`.
    """

    def read(paths: str | list[str], kind: Kind) -> list[Request]:
        return read_files(config, [paths] if isinstance(paths, str) else paths, kind)

    def named(files: Mapping[str, str | list[str]], kind: Kind) -> dict[str, list[Request]]:
        found = {name: read(paths, kind) for name, paths in files.items()}
        return {
            name: [wrapped(one, config.wrappers.get(name, SLOT)) for one in requests]
            for name, requests in found.items()
        }

    return EvaluationData(
        harmful=read(config.harmful, "harmful"),
        benign=read(config.benign, "harmless"),
        borderline=read(config.borderline, "harmless"),
        helpful=read(config.helpful, "question"),
        multi_turn=read(config.multi_turn, "harmful"),
        attacks=named(config.attacks, "harmful"),
        completions=named(config.completions, "harmful"),
        exports=named(config.exports, "harmless"),
        questions=named(config.questions, "question"),
    )


def wrapped(request: Request, wrapper: str) -> Request:
    """Return the request with a text around its last message, at the wrapper's slot."""
    *before, last = request.messages
    content = wrapper.replace(SLOT, last["content"])
    return dataclasses.replace(
        request, prompt="", messages=[*before, {"role": "user", "content": content}]
    )


def write_exports(config: EvaluateConfig, name: str, answered: Answered) -> None:
    """Write a model's answers to the requests of `exports`, as AlpacaEval reads them.

    Only their owner can read them.
    """
    folder = Path(config.output_dir) / "exports" / safe_name(name)
    for title, pairs in answered.exports.items():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        rows = [
            {"dataset": title, "instruction": asked, "output": said, "generator": name}
            for asked, said in pairs
        ]
        path = folder / f"{safe_name(title)}.json"
        write_whole(path, json.dumps(rows, indent=1).encode(), private=True)


def safe_name(name: str) -> str:
    """Return a model's name as that of a file."""
    return re.sub(r"[^\w.-]", "_", name)


def rows_of(name: str, defences: Mapping[str, Defence]) -> dict[str, Defence | None]:
    """Return the rows of a model by their names: itself, and itself under each defence."""
    return {name: None, **{f"{name} + {title}": one for title, one in defences.items()}}


def check_files(kind: str, names: Iterable[str]) -> None:
    """Check that every name has a file of its own, see `safe_name`.

    Raises:
        ValueError: two have the same; names both.
    """
    named: dict[str, str] = {}
    for name in names:
        file = safe_name(name)
        if file in named:
            raise ValueError(
                f"{kind}: {named[file]!r} and {name!r} would both be {file!r} as a file, expected "
                "names that differ in more than signs"
            )
        named[file] = name


def read_templates(path: str | None) -> list[str]:
    """Read templates, one a line or a JSON list.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8, is empty or lists something else, or a template lacks its
            slot. The message names the line, or the place in the list, from 0.
    """
    if path is None:
        return []
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file of templates")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8, expected templates, one a line") from None
    listed, is_list = text.splitlines(), text.lstrip().startswith("[")
    if is_list:
        try:
            listed = json.loads(text)
        except json.JSONDecodeError as error:
            if text.lstrip()[1:].lstrip().startswith('"'):
                raise ValueError(f"{path}:{error.lineno}: is no JSON list of templates") from None
            is_list = False  # a template begins with a bracket, as in [INST]
    if not all(isinstance(template, str) for template in listed):
        raise ValueError(f"{path}: holds something else than texts, expected a list of templates")
    templates = {place: template for place, template in enumerate(listed) if template.strip()}
    if not templates:
        raise ValueError(f"{path}: is empty, expected templates, one a line")
    for place, template in templates.items():
        if SLOT not in template:
            where = f"{path}[{place}]" if is_list else f"{path}:{place + 1}"
            raise ValueError(f"{where}: must have the slot {SLOT}, got none")
    return list(templates.values())


def read_judges(config: EvaluateConfig) -> dict[str, Any]:
    """Return the judges' settings. A keyword judge without keywords of its own gets `keywords`.

    `make_judges` checks names and kinds.

    Raises:
        ValueError: `keywords` are given, and every keyword judge has its own, or there is none, nor
            an attack or a defence that takes them.
    """
    judges, with_own, are_taken = dict(config.judges), [], False
    for name, settings in config.judges.items():
        given = {} if settings is None else settings
        kind = given.get("kind", name) if isinstance(given, Mapping) else None
        if kind == "keyword" and "keywords" not in given:
            judges[name], are_taken = {**given, "keywords": config.keywords}, True
        elif kind in ("keyword", "official_keywords"):
            with_own.append(name)
    if are_taken or config.keywords == list(REFUSAL_KEYWORDS):
        return judges
    if with_own:
        raise ValueError(
            f"keywords: no judge takes them, as judges.{with_own[0]} has its own: leave them out, "
            "or add a judge of kind keyword without any"
        )
    if not config.refusal_banned and not any(
        isinstance(one, Mapping) and one.get("reinsert_header") for one in config.defences.values()
    ):
        raise ValueError(
            "keywords: there is no keyword judge, and neither refusal_banned nor a defence with "
            "reinsert_header to take them: leave them out"
        )
    return judges


def loss_history(folder: Path) -> Sequence[Mapping[str, Any]]:
    """Return the training log of this model, empty if `derta train` did not write its folder.

    Checkpoints beside it may belong to another run, and are not read.

    Raises:
        ValueError: the file of the log is damaged.
    """
    state = folder / TRAINER_STATE_NAME
    log = read_object(state).get("log_history") if state.is_file() else []
    if not isinstance(log, list):
        raise ValueError(f"{state}: log_history must be a list, got {log!r:.40}")
    return log


def find_generator(
    config: EvaluateConfig, name: str, folder: Path, loaded: Any, chat: Chat, dtype: Any
) -> ModelGenerator | ServerGenerator:
    """Return the generator of a model's answers: its server, or the loaded model."""
    kept = answers_file(config, name)
    if loaded is None:
        server = Server(server_settings(config, name), kept)
        return ServerGenerator(server, chat, max_new_tokens=config.max_new_tokens)
    model = fingerprint(*whole_model(folder), dtype=str(dtype))
    return ModelGenerator(
        loaded,
        chat,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        answers=AnswerFile(kept, chat.tokenizer, model),
    )


def whole_model(folder: Path) -> list[Path]:
    """Return the folders that make a model: its own, and that of the base model of adapters."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return [folder]
    return [folder, Path(base_of(folder, read_adapters(folder)))]


def server_settings(config: EvaluateConfig, name: str) -> ServerSettings:
    """Return the settings of a model's server.

    Raises:
        ValueError: a setting is wrong or missing; names the model.
    """
    settings = config.servers[name]
    if not isinstance(settings, Mapping):
        raise ValueError(f"servers.{name}: expected settings, as in {{base_url: ..., model: ...}}")
    try:
        return build(ServerSettings, {"settings": settings})
    except ValueError as error:
        raise ValueError(f"servers.{name}: {error}") from error


def read_defences(config: EvaluateConfig) -> dict[str, Defence]:
    """Return the defences by name.

    Raises:
        ValueError: a setting is wrong or missing; names the defence.
    """
    defences = {}
    for name, settings in config.defences.items():
        if not isinstance(settings, Mapping):
            raise ValueError(f"defences.{name}: expected settings, as in {{reinsert_header: true}}")
        try:
            defences[name] = build(Defence, {"settings": settings})
        except ValueError as error:
            raise ValueError(f"defences.{name}: {error}") from error
    return defences


def check_template(config: EvaluateConfig, folder: Path, defences: Sequence[Defence]) -> None:
    """Check that a model's chat template has what the evaluation needs, before any model answers.

    Raises:
        ValueError: it lacks a system message, a header or a thinking block; names the folder.
    """
    if not defences and not config.prefill_thinking:
        return
    tokens = tokenizer_of(folder)
    tokenizer = load_tokenizer(tokens, config.chat_template, local_files_only=True)
    try:
        chat = Chat(tokenizer, config.special_tokens_in_text)
        if config.prefill_thinking:
            thinking_tag(chat, config.prefill_thinking)
        for defence in defences:
            defended(chat, defence)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def answers_folder(config: EvaluateConfig) -> Path:
    """Return the folder of the answers."""
    return Path(config.output_dir) / "answers"


def answers_file(config: EvaluateConfig, name: str) -> Path:
    """Return the file of a model's answers."""
    return answers_folder(config) / f"{safe_name(name)}.jsonl"


def run(config: EvaluateConfig) -> None:
    """Evaluate every model, print the table, and write the report to `output_dir`.

    Several ranks share the prompts, the packs and the work of judges on this machine; the first one
    writes.

    Raises:
        ValueError: as `evaluate` and `over_ranks`.
    """
    with over_ranks(config.device) as ranks:
        summary = evaluate(config)
        if ranks.rank == 0:
            report(config, summary)


def evaluation_settings(config: EvaluateConfig) -> EvaluationSettings:
    """Return the settings of the evaluation of each model.

    Raises:
        ValueError: as `EvaluationSettings`, `read_templates` and `make_judges`.
    """
    return EvaluationSettings(
        prefill_depths=config.prefill_depths,
        templates=read_templates(config.templates),
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
        refusal=config.refusal,
        curve=config.curve,
        rank_attack=config.rank_attack,
        helpful=config.helpful_metric,
        judges=make_judges(read_judges(config), answers_folder(config)),
        keywords=config.keywords,
        lm_eval=config.lm_eval,
        samples=config.samples,
        special_tokens_in_text=config.special_tokens_in_text,
        refusal_banned=config.refusal_banned,
        sampling=config.sampling,
        temperature=config.temperature,
        seed=config.seed,
        prefill_thinking=config.prefill_thinking,
        in_context=config.in_context,
        empty_answers=config.empty_answers,
    )


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Return the summary of every model.

    Raises:
        ValueError: a server is for no model, two rows or exports have one name as a file, or as the
            functions above and `collect_answers`.
    """
    started = time.perf_counter()
    folders = model_folders(config.model)
    losses = {name: [log] for name, folder in folders.items() if (log := loss_history(folder))}
    for name in config.servers:
        if name not in folders:
            raise ValueError(f"servers: {name!r} is none of the models: {', '.join(folders)}")
        server_settings(config, name)
    defences = read_defences(config)
    check_files("model", (row for name in folders for row in rows_of(name, defences)))
    check_files("exports", config.exports)
    device = find_device(config.device)
    triples = safe_responses(config)
    data = dataclasses.replace(read_data(config), refusals=[one.safe for one in triples])
    settings = evaluation_settings(config)
    refuse_what_takes_responses(data, settings)
    if config.servers:
        refuse_what_takes_a_model(data, dataclasses.replace(settings, curve=False))
    for folder in folders.values():
        check_template(config, folder, list(defences.values()))
    kept = answers_folder(config)
    answered: dict[str, Answered] = {}
    for name, folder in folders.items():
        model: Any = None
        dtype = weights_dtype(config.dtype, device)
        if name in config.servers:
            tokenizer = load_tokenizer(str(folder), config.chat_template, local_files_only=True)
            own = dataclasses.replace(settings, curve=False)
        else:
            model, tokenizer = load_tuned(folder, dtype, config.chat_template)
            model.to(device)
            own = settings
        if triples and (own.curve or own.refusal_banned):
            refusal = refusal_ids(tokenizer, config.refusal, triples)
            own = dataclasses.replace(own, refusal=refusal)
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept.chmod(0o700)
        generator = find_generator(config, name, folder, model, Chat(tokenizer), dtype)
        for row, defence in rows_of(name, defences).items():
            answered[row] = collect_answers(
                model,
                tokenizer,
                data,
                dataclasses.replace(own, defence=defence),
                generator=generator,
            )
            if ranks().rank == 0:
                write_exports(config, row, answered[row])
        del model, generator
    results = judge_answers(list(answered.values()), settings)
    return summarize(
        {name: [result] for name, result in zip(answered, results, strict=True)},
        seconds=time.perf_counter() - started,
        loss=losses,
    )


def report(
    config: EvaluateConfig, summary: Mapping[str, Any], title: str = "Where models refuse"
) -> None:
    """Write the report, remove answers that are not to be kept, and print the table."""
    page = write_report(summary, config.output_dir, title=title)
    if not config.keep_answers:
        kept = answers_folder(config)
        for path in [
            *(answers_file(config, name) for name in summary["variants"]),
            *(verdicts_file(kept, name) for name in config.judges),
        ]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder holds files of the user
            kept.rmdir()
    parts = (format_table(summary), format_undecided(summary), f"report: {page}")
    say("\n\n".join(filter(None, parts)))


def safe_responses(config: EvaluateConfig) -> list[Triple]:
    """Return the triples of the harmful files. Their safe responses show how refusals start."""
    return [
        record
        for path in config.harmful
        for _, record in read_placed(
            [path], Wanted(None, config.formats.get(path), config.columns.get(path))
        )
        if isinstance(record, Triple)
    ]
