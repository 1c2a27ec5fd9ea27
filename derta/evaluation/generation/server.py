"""Models behind an OpenAI-compatible server: requests without loss, and generation.

The `openai` package talks to the server and retries temporary failures, through a client that
bounds and checks every reply. This module adds a rate limit that includes retries, one sentence for
each permanent failure, and a file of replies, from which an interrupted run resumes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
import os
import re
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from derta.data import Chat
from derta.data.tokens.red_flag import flag_of
from derta.evaluation.generation.answers import Replies
from derta.evaluation.generation.bounded import bounded_client, broke_off, fault_of, value_of
from derta.evaluation.generation.decoding import GREEDY, Decoding
from derta.evaluation.generation.local import SHOWN_AFTER_S, Written, decode, written
from derta.modeling.shared_work import ranks

if TYPE_CHECKING:
    import openai

Value = TypeVar("Value")

# Local servers accept any key, but the client needs one.
PLACEHOLDER = "none"
# Failed queries with no reply between them, after which the server counts as broken.
LOST_IN_A_ROW = 20
# Statuses below 500 that may be due to one request's content.
OWN_STATUSES = (400, 408, 409, 413, 422)
# The lowest bias that the interface allows.
BAN = -100
# vLLM and SGLang take what is missing from the model's generation_config, llama.cpp from its own
# defaults. All three draw from every token at -1; older vLLM and SGLang refuse 0.
WHOLE_DISTRIBUTION = {"top_k": -1, "min_p": 0.0}
# Rows by which a head, padded to a round size, may exceed its tokenizer. They may be said, and have
# no text. Ids beyond them are another model's, or none.
PADDING = 1024


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings for requests to a model behind an OpenAI-compatible server.

    Args:
        base_url: address of the server, including its version: "http://localhost:8000/v1".
        model: name of the model on the server.
        api_key_env: environment variable of the key, if the server needs one; None: OPENAI_API_KEY
            for OpenAI's own server, and no key for any other.
        concurrency: number of concurrent requests.
        requests_per_minute: most requests sent per minute, including retries; None: no limit.
        max_retries: most retries of a request after a server error, a lost connection, a 429 or a
            reply that is not text. Each waits as long as the server asks, or else ever longer.
        timeout_s: time limit for one whole reply, headers and body, in seconds.
        body: fields of every request's body, added to the defaults or replacing them; null removes
            a default that the server does not support.

    Raises:
        ValueError: base_url is not an address or holds a password, or a number is out of range.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    concurrency: int = 8
    requests_per_minute: float | None = None
    max_retries: int = 8
    timeout_s: float = 600.0
    body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must start with http:// or https://, got {self.base_url!r}")
        if "@" in urllib.parse.urlsplit(self.base_url).netloc:
            raise ValueError(
                "base_url must not hold a password, api_key_env names the key's variable"
            )
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {self.concurrency}")
        if self.max_retries < 0:
            raise ValueError(f"max_retries must be at least 0, got {self.max_retries}")
        for name in ("requests_per_minute", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")

    @property
    def key_variable(self) -> str | None:
        """The environment variable of the key for this server, or None."""
        return self.api_key_env or ("OPENAI_API_KEY" if self.is_openai else None)

    @property
    def is_openai(self) -> bool:
        """True if the server is OpenAI's own, over HTTPS."""
        parts = urllib.parse.urlsplit(self.base_url)
        return parts.scheme == "https" and f".{parts.hostname}".endswith(".openai.com")


class Query(NamedTuple):
    """One request: its name in errors, and the fields of its body."""

    id: str
    fields: Mapping[str, Any]


class _Lost(Exception):
    """A request without a usable reply, which says nothing about the others.

    Args:
        reason: a clause about the server.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Run:
    """The course of one `Server.ask_all`: its failures, and whether requests still start.

    Attributes:
        stopped_by: the failure or interrupt after which no request starts.
        lost: names of the requests without a reply, by reason.
    """

    def __init__(self) -> None:
        self.stopped_by: BaseException | None = None
        self.lost: dict[str, list[str]] = {}
        self.abort: Callable[[], object] = lambda: None
        self._in_a_row = 0

    def lose(self, id: str, reason: str) -> None:
        """Count a request without a reply; stop if none of the latest has one."""
        self.lost.setdefault(reason, []).append(id)
        self._in_a_row += 1
        if self._in_a_row >= LOST_IN_A_ROW:
            self.stop(self.failure())

    def answered(self) -> None:
        """Count a reply."""
        self._in_a_row = 0

    def stop(self, cause: BaseException) -> None:
        """Start no other request; the first cause is kept."""
        self.stopped_by = self.stopped_by or cause

    def failure(self) -> ConnectionError:
        """Return the error that names every request without a reply."""
        return ConnectionError(
            "; ".join(f"{', '.join(ids)}: {reason}" for reason, ids in self.lost.items())
        )


class Server:
    """A client for one served model that stores every reply in a file.

    Args:
        settings: see `ServerSettings`.
        kept: file of replies by a hash of address and request, which only its owner can read; None:
            replies are kept in memory.
    """

    def __init__(self, settings: ServerSettings, kept: Path | None = None) -> None:
        self.settings = settings
        self.replies = Replies(kept if ranks().rank == 0 else None)

    def ask_all(
        self,
        queries: Sequence[Query],
        read: Callable[[str, Mapping[str, Any]], Value],
        *,
        chat: bool,
        title: str,
    ) -> list[Value]:
        """Send queries, and return what `read` makes of each reply; equal queries are sent once.

        Inside `over_ranks`, the first rank asks for all: it has as many requests in flight as the
        settings allow.

        A reply fails if it is not a completion with text, exceeds 16 MiB or `timeout_s`, is
        compressed, or comes with a status of an error. A query whose replies keep failing is left
        open, and the others are asked and stored; then the error names all open ones. A rerun asks
        only for those.

        No other request is started, and those in flight are finished and stored, after a failure
        that every query would meet: a server that cannot be reached, a redirect, a refused key, an
        unknown model, a 429, a prompt beyond the context, or 20 failed queries with no reply
        between them.

        Args:
            queries: queries in the order to send them.
            read: function from a reply's text and its choice, as JSON, to a JSON value to store;
                raises ValueError if the choice is not as asked, which fails the reply.
            chat: if True, /chat/completions with "messages"; else /completions with "prompt".
            title: title of the progress bar.

        Returns:
            the stored values, in the order of the queries.

        Raises:
            ValueError: openai is not installed, or a query does not fit the model's context; names
                its id.
            ConnectionError: queries are left open; names their ids and the reasons, no text.
        """
        return ranks().from_first(lambda: self._ask_all(queries, read, chat, title))

    def _ask_all(
        self,
        queries: Sequence[Query],
        read: Callable[[str, Mapping[str, Any]], Value],
        chat: bool,
        title: str,
    ) -> list[Value]:
        bodies = [self._body(query) for query in queries]
        keys = [self._key(chat, body) for body in bodies]
        missing: dict[str, tuple[str, dict[str, Any]]] = {}
        for key, query, body in zip(keys, queries, bodies, strict=True):
            if key not in self.replies:
                missing.setdefault(key, (query.id, body))
        if missing:
            run = _Run()
            # No interrupt reaches the thread, so that it stores every reply it receives.
            pool = concurrent.futures.ThreadPoolExecutor(1)
            try:
                future = pool.submit(
                    asyncio.run, self._ask_missing(missing, read, chat, title, run)
                )
                _wait(future, run)
            finally:
                pool.shutdown(wait=False)
            if run.stopped_by is not None:
                raise run.stopped_by
            if run.lost:
                raise run.failure()
        return [self.replies[key] for key in keys]

    def _body(self, query: Query) -> dict[str, Any]:
        fields = {"model": self.settings.model, **query.fields, **self.settings.body}
        return {name: value for name, value in fields.items() if value is not None}

    def _key(self, chat: bool, body: Mapping[str, Any]) -> str:
        asked = [self.settings.base_url, chat, body]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    async def _ask_missing(
        self,
        missing: Mapping[str, tuple[str, dict[str, Any]]],
        read: Callable[[str, Mapping[str, Any]], Any],
        chat: bool,
        title: str,
        run: _Run,
    ) -> None:
        """Ask for replies by key, several at a time."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        run.abort = lambda: loop.call_soon_threadsafe(task.cancel)
        queue = iter(missing.items())

        async def work(client: openai.AsyncOpenAI, bar: tqdm) -> None:
            while run.stopped_by is None and (query := next(queue, None)) is not None:
                key, (id, body) = query
                try:
                    self.replies.keep({key: await self._ask(client, chat, id, body)})
                    run.answered()
                except _Lost as lost:
                    run.lose(id, lost.reason)
                except (ValueError, OSError) as error:
                    run.stop(error)
                bar.update()

        async with self._client(read, chat) as client:
            with tqdm(
                total=len(missing), desc=title, unit="reply", delay=SHOWN_AFTER_S, leave=False
            ) as bar:
                await asyncio.gather(*(work(client, bar) for _ in range(self.settings.concurrency)))

    async def _ask(
        self, client: openai.AsyncOpenAI, chat: bool, id: str, body: Mapping[str, Any]
    ) -> Any:
        """Send a request, and return what was read of its reply."""
        import openai

        named = {name: body[name] for name in ("model", "messages" if chat else "prompt")}
        rest = {name: value for name, value in body.items() if name not in named}
        completions: Any = client.chat.completions if chat else client.completions
        try:
            raw = await completions.with_raw_response.create(**named, extra_body=rest)
        except openai.OpenAIError as error:
            raise self._final(id, error) from error
        return value_of(raw.http_response)

    def _final(self, id: str, error: openai.OpenAIError) -> Exception:
        """Return an error that says what to fix, without the server's text: it may quote ours."""
        import openai

        url, model = self.settings.base_url, self.settings.model
        if isinstance(error, openai.APIStatusError):
            if fault := fault_of(error.response):
                return _Lost(f"{url} {fault}")
            status = error.status_code
            said = str(error.body if error.body is not None else error.message)
            if status == 400 and re.search("context.{0,8}length", said):
                return ValueError(
                    f"{id}: the prompt and its answer exceed the context of {model!r}"
                )
            variable = self.settings.key_variable or "the variable that api_key_env names"
            elsewhere = (
                ", a redirect, which is not followed: expected the final address in base_url"
            )
            advice = {
                401: f", expected a key that it knows in {variable}",
                403: f", expected a key with permission for this in {variable}",
                404: f", expected the model {model!r} at this address",
                429: ", too many requests: set requests_per_minute",
            }.get(status, elsewhere if 300 <= status < 400 else "")
            reason = f"{url} replied with status {status}{advice}"
            if status in OWN_STATUSES or status >= 500:
                return _Lost(reason)
            return ConnectionError(f"{id}: {reason}")
        if isinstance(error, openai.APIConnectionError):
            reason = f"{url} cannot be reached, or its replies break off"
            return _Lost(reason) if broke_off(error) else ConnectionError(f"{id}: {reason}")
        return ConnectionError(f"{id}: {url}: {type(error).__name__}")

    @asynccontextmanager
    async def _client(
        self, read: Callable[[str, Mapping[str, Any]], Any], chat: bool
    ) -> AsyncIterator[openai.AsyncOpenAI]:
        try:
            import openai
        except ImportError:
            raise ValueError(
                "a server needs the openai package: pip install 'derta[server]'"
            ) from None
        http_client = bounded_client(
            read,
            chat=chat,
            timeout_s=self.settings.timeout_s,
            pace=_pace(self.settings.requests_per_minute),
        )
        async with openai.AsyncOpenAI(
            base_url=self.settings.base_url,
            api_key=os.environ.get(self.settings.key_variable or "") or PLACEHOLDER,
            max_retries=self.settings.max_retries,
            timeout=None,  # the client's own limit is that of a whole reply
            http_client=http_client,
        ) as client:
            if not self.settings.is_openai:  # other servers must not learn the OpenAI account
                client.organization = client.project = None
            yield client


def _wait(future: concurrent.futures.Future[None], run: _Run) -> None:
    """Wait for the replies; after an interrupt, only for those in flight."""
    while True:
        try:
            return future.result()
        except KeyboardInterrupt as interrupt:
            if isinstance(run.stopped_by, KeyboardInterrupt):  # a second one stops at once
                run.abort()
                raise
            run.stopped_by = interrupt


def _pace(per_minute: float | None) -> Callable[[], Awaitable[None]]:
    """Return a function that waits to keep a rate over all tasks that await it."""
    interval_s = 0.0 if per_minute is None else 60.0 / per_minute
    next_at = time.monotonic()

    async def wait() -> None:
        nonlocal next_at
        own = max(next_at, time.monotonic())
        next_at = own + interval_s
        await asyncio.sleep(own - time.monotonic())

    return wait


class ServerGenerator:
    """Answers of any OpenAI-compatible server that takes prompts of token ids, as vLLM does.

    The server gets the same tokens as a model on this machine and renders nothing. The model's own
    sampling settings are overridden. Equal prompts are sent once, the longest first.

    Tokens are forbidden by `logit_bias`: the server first writes the tokens to which that applies,
    and then continues without it. Samples are the server's own draws from the whole distribution,
    each from a seed of its own.

    Args:
        server: client of the model.
        chat: the model's tokenizer and template. An answer ends at the end of a chat's turn, at the
            end of sequence, at the model's red flag, or at any other end that the server knows. A
            flag counts if the server returns it: as a token id, as vLLM does, or as text.
        max_new_tokens: most tokens of an answer.

    Raises:
        ValueError: max_new_tokens is below 1.
    """

    def __init__(self, server: Server, chat: Chat, *, max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.server = server
        self.chat = chat
        self.tokenizer = chat.tokenizer
        self.flag = flag_of(chat.tokenizer)
        self.stop_ids = {chat.closing_ids[-1], chat.tokenizer.eos_token_id, self.flag} - {None}
        self.max_new_tokens = max_new_tokens
        self._ends = self.stop_ids | set(self.tokenizer.all_special_ids)

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, ids: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Written]:
        """Generate answers, see `derta.evaluation.generation.local.Generator`.

        Raises:
            ValueError: a prompt is empty, or does not fit the model's context together with its
                answer (names its id); or the server's `body` sets what the decoding needs.
            ConnectionError: as `Server.ask_all`.
        """
        for id, prompt in zip(ids, prompts, strict=True):
            if not len(prompt):
                raise ValueError(f"{id}: the prompt is empty, expected at least one token")
        needed = {"logit_bias"} if decoding.bans else set()
        needed |= {"temperature", "seed"} if decoding.temperature else set()
        if fixed := needed & self.server.settings.body.keys():
            raise ValueError(
                f"body: sets {min(fixed)}, which an attack sets: remove it, or leave out the attack"
            )
        biased = min(decoding.banned_for, self.max_new_tokens) if decoding.bans else 0
        started = [_Part("", [], ended=False)] * len(prompts)
        if biased:
            bias = {"logit_bias": dict.fromkeys(map(str, decoding.banned), BAN)}
            started = self._parts(prompts, ids, decoding, biased, bias)
        open_ = [n for n, part in enumerate(started) if not part.ended]
        rest = self.max_new_tokens - biased
        if rest:
            longer = [[*prompts[n], *started[n].ids] for n in open_]
            later = self._parts(longer, [ids[n] for n in open_], decoding, rest, {})
            for n, part in zip(open_, later, strict=True):
                started[n] = started[n].joined(part, self.tokenizer)
        return [written(part.text, part.ids, self.flag) for part in started]

    def _parts(
        self,
        prompts: Sequence[Sequence[int]],
        ids: Sequence[str],
        decoding: Decoding,
        max_tokens: int,
        bias: Mapping[str, Any],
    ) -> list[_Part]:
        """Return what the server writes after each prompt."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]), reverse=True)
        replies = self.server.ask_all(
            [
                Query(ids[n], {**self._fields(prompts[n], decoding, max_tokens), **bias})
                for n in order
            ],
            self._read,
            chat=False,
            title="generate",
        )
        parts = [_Part("", [], ended=True)] * len(prompts)
        for place, reply in zip(order, replies, strict=True):
            parts[place] = _Part(**reply)
        return parts

    def _fields(self, prompt: Sequence[int], decoding: Decoding, max_tokens: int) -> dict[str, Any]:
        drawn: dict[str, Any] = {}
        if decoding.temperature:
            drawn = {"seed": decoding.seed_of(prompt) % 2**31, **WHOLE_DISTRIBUTION}
        return {
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": float(decoding.temperature),
            "top_p": 1.0,
            # vLLM takes what is missing from the model's generation_config.
            "repetition_penalty": 1.0,
            "stop_token_ids": sorted(self.stop_ids),
            "return_token_ids": True,
            **drawn,
        }

    def _read(self, text: str, choice: Mapping[str, Any]) -> dict[str, Any]:
        ids = choice.get("token_ids")
        ended = choice.get("finish_reason") != "length"
        if ids is None:
            before = text if self.flag is None else text.partition(self.chat.text(self.flag))[0]
            flags = [self.flag] if len(before) < len(text) else []
            ids = [*self.chat.text_ids(before), *flags]
            return {"text": before, "ids": ids, "ended": ended or bool(flags)}
        known = range(len(self.tokenizer) + PADDING)
        if type(ids) is not list or not all(type(id) is int and id in known for id in ids):
            raise ValueError("token_ids: expected ids of the tokenizer, or of a head's padding")
        if self.flag in ids:
            ids, ended = ids[: ids.index(self.flag) + 1], True
        elif choice.get("finish_reason") == "stop" and ids and ids[-1] in self._ends:
            ids = ids[:-1]
        return {"text": decode(self.tokenizer, ids), "ids": ids, "ended": ended}


class _Part(NamedTuple):
    """A part of an answer; `ended` if nothing follows it."""

    text: str
    ids: list[int]
    ended: bool = True  # in replies that versions without parts have stored

    def joined(self, rest: _Part, tokenizer: PreTrainedTokenizerBase) -> _Part:
        """Return this part with the rest of the answer."""
        if not self.ids:
            return rest
        ids = [*self.ids, *rest.ids]
        return _Part(decode(tokenizer, ids), ids, rest.ended)
