"""Models behind an OpenAI-compatible server: requests without loss, and generation.

The `openai` package talks to the server and retries temporary failures. This module adds a rate
limit that includes retries, one sentence for each permanent failure, and a file of replies, from
which an interrupted run resumes.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tqdm import tqdm

from derta.data import Chat
from derta.evaluation.generation.answers import Replies
from derta.evaluation.generation.local import SHOWN_AFTER_S, Written

if TYPE_CHECKING:
    import openai

Value = TypeVar("Value")

# Local servers accept any key, but the client needs one.
PLACEHOLDER = "none"


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
        max_retries: most retries of a request after a server error, a lost connection or a 429.
            Each waits as long as the server asks, or else ever longer.
        timeout_s: time limit for one reply, in seconds.
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


class Server:
    """A client for one served model that stores every reply in a file.

    Args:
        settings: see `ServerSettings`.
        kept: file of replies by a hash of address and request, which only its owner can read; None:
            replies are kept in memory.
    """

    def __init__(self, settings: ServerSettings, kept: Path | None = None) -> None:
        self.settings = settings
        self.replies = Replies(kept)

    def ask_all(
        self,
        queries: Sequence[Query],
        read: Callable[[str, Any], Value],
        *,
        chat: bool,
        title: str,
    ) -> list[Value]:
        """Send queries, and return what `read` makes of each reply; equal queries are sent once.

        After a permanent failure no request is started. Those in flight are finished and stored
        before the error is raised.

        Args:
            queries: queries in the order to send them.
            read: function from a reply's text and its choice to a JSON value to store.
            chat: if True, /chat/completions with "messages"; else /completions with "prompt".
            title: title of the progress bar.

        Returns:
            the stored values, in the order of the queries.

        Raises:
            ValueError: openai is not installed, or a query does not fit the model's context; names
                its id.
            ConnectionError: a request failed permanently; names its id and the reason, no text.
        """
        bodies = [self._body(query) for query in queries]
        keys = [self._key(chat, body) for body in bodies]
        missing: dict[str, tuple[str, dict[str, Any]]] = {}
        for key, query, body in zip(keys, queries, bodies, strict=True):
            if key not in self.replies:
                missing.setdefault(key, (query.id, body))
        if missing:
            pool = concurrent.futures.ThreadPoolExecutor(self.settings.concurrency)
            with (
                self._client() as client,
                tqdm(
                    total=len(missing), desc=title, unit="reply", delay=SHOWN_AFTER_S, leave=False
                ) as bar,
            ):
                try:
                    futures = {
                        pool.submit(self._ask, client, chat, key, id, body, read)
                        for key, (id, body) in missing.items()
                    }
                    self._finish(futures, bar)
                finally:  # requests are in flight only after a second interrupt
                    pool.shutdown(wait=False, cancel_futures=True)
        return [self.replies[key] for key in keys]

    def _body(self, query: Query) -> dict[str, Any]:
        fields = {"model": self.settings.model, **query.fields, **self.settings.body}
        return {name: value for name, value in fields.items() if value is not None}

    def _key(self, chat: bool, body: Mapping[str, Any]) -> str:
        asked = [self.settings.base_url, chat, body]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _finish(self, remaining: set[concurrent.futures.Future[None]], bar: tqdm) -> None:
        """Wait for replies; after a failure or an interrupt, only for those in flight."""
        failed: BaseException | None = None
        while remaining:
            try:
                if failed is not None:
                    remaining = {future for future in remaining if not future.cancel()}
                done, remaining = concurrent.futures.wait(
                    remaining, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    failed = failed or future.exception()
                bar.update(len(done))
            except KeyboardInterrupt as interrupt:
                if isinstance(failed, KeyboardInterrupt):  # a second one stops at once
                    raise
                failed = interrupt
        if failed is not None:
            raise failed

    def _ask(
        self,
        client: openai.OpenAI,
        chat: bool,
        key: str,
        id: str,
        body: Mapping[str, Any],
        read: Callable[[str, Any], Any],
    ) -> None:
        """Send a request and store its reply in the same thread, which no interrupt reaches."""
        import openai

        named = {name: body[name] for name in ("model", "messages" if chat else "prompt")}
        rest = {name: value for name, value in body.items() if name not in named}
        create: Any = client.chat.completions.create if chat else client.completions.create
        try:
            choice = create(**named, extra_body=rest).choices[0]
            text = choice.message.content if chat else choice.text
        except openai.OpenAIError as error:
            raise self._final(id, error) from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            # The client returns any body that comes with status 200.
            url = self.settings.base_url
            raise ConnectionError(f"{id}: {url} replied with something other than text") from error
        self.replies.keep({key: read(text or "", choice)})

    def _final(self, id: str, error: openai.OpenAIError) -> Exception:
        """Return an error that says what to fix, without the server's text: it may quote ours."""
        import openai

        url, model = self.settings.base_url, self.settings.model
        if isinstance(error, openai.APITimeoutError):
            return ConnectionError(f"{id}: {url} did not reply within {self.settings.timeout_s} s")
        if isinstance(error, openai.APIStatusError):
            said = str(error.body if error.body is not None else error.message)
            if error.status_code == 400 and re.search("context.{0,8}length", said):
                return ValueError(
                    f"{id}: the prompt and its answer exceed the context of {model!r}"
                )
            variable = self.settings.key_variable or "the variable that api_key_env names"
            advice = {
                401: f", expected a key that it knows in {variable}",
                403: f", expected a key with permission for this in {variable}",
                404: f", expected the model {model!r} at this address",
                429: ", too many requests: set requests_per_minute",
            }.get(error.status_code, "")
            return ConnectionError(f"{id}: {url} replied with status {error.status_code}{advice}")
        if isinstance(error, openai.APIConnectionError):
            return ConnectionError(f"{id}: {url} cannot be reached, or its replies break off")
        return ConnectionError(f"{id}: {url}: {type(error).__name__}")

    @contextmanager
    def _client(self) -> Iterator[openai.OpenAI]:
        try:
            import openai
        except ImportError:
            raise ValueError(
                "a server needs the openai package: pip install 'derta[server]'"
            ) from None
        pace = _pace(self.settings.requests_per_minute)
        http_client = openai.DefaultHttpxClient(event_hooks={"request": [lambda _: pace()]})
        with openai.OpenAI(
            base_url=self.settings.base_url,
            api_key=os.environ.get(self.settings.key_variable or "") or PLACEHOLDER,
            max_retries=self.settings.max_retries,
            timeout=self.settings.timeout_s,
            http_client=http_client,
        ) as client:
            if not self.settings.is_openai:  # other servers must not learn the OpenAI account
                client.organization = client.project = None
            yield client


def _pace(per_minute: float | None) -> Callable[[], None]:
    """Return a function that waits to keep a rate across all threads that call it."""
    if per_minute is None:
        return lambda: None
    lock, interval_s = threading.Lock(), 60.0 / per_minute
    next_at = time.monotonic()

    def wait() -> None:
        nonlocal next_at
        with lock:
            own = max(next_at, time.monotonic())
            next_at = own + interval_s
        time.sleep(max(0.0, own - time.monotonic()))

    return wait


class ServerGenerator:
    """Greedy answers of any OpenAI-compatible server that takes prompts of token ids, as vLLM does.

    The server gets the same tokens as a model on this machine and renders nothing. The model's own
    sampling settings are overridden. Equal prompts are sent once, the longest first.

    Args:
        server: client of the model.
        chat: the model's tokenizer and template. An answer ends at the end of a chat's turn, at the
            end of sequence, or at any other end that the server knows.
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
        self.stop_ids = {chat.closing_ids[-1], chat.tokenizer.eos_token_id} - {None}
        self.max_new_tokens = max_new_tokens
        self._ends = self.stop_ids | set(self.tokenizer.all_special_ids)

    def __call__(self, prompts: Sequence[Sequence[int]], *, ids: Sequence[str]) -> list[Written]:
        """Generate answers, see `derta.evaluation.generation.local.Generator`.

        Raises:
            ValueError: a prompt is empty, or does not fit the model's context together with its
                answer; names its id.
            ConnectionError: as `Server.ask_all`.
        """
        for id, prompt in zip(ids, prompts, strict=True):
            if not len(prompt):
                raise ValueError(f"{id}: the prompt is empty, expected at least one token")
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]), reverse=True)
        replies = self.server.ask_all(
            [Query(ids[place], self._fields(prompts[place])) for place in order],
            self._read,
            chat=False,
            title="generate",
        )
        written = [Written("", [])] * len(prompts)
        for place, reply in zip(order, replies, strict=True):
            written[place] = Written(**reply)
        return written

    def _fields(self, prompt: Sequence[int]) -> dict[str, Any]:
        return {
            "prompt": list(prompt),
            "max_tokens": self.max_new_tokens,
            "temperature": 0.0,
            "top_p": 1.0,
            # These are vLLM's, whose defaults come from the model's generation_config.
            "repetition_penalty": 1.0,
            "stop_token_ids": sorted(self.stop_ids),
            "return_token_ids": True,
        }

    def _read(self, text: str, choice: Any) -> dict[str, Any]:
        ids = getattr(choice, "token_ids", None)
        if ids is None:
            return {"text": text, "ids": self.chat.text_ids(text)}
        if choice.finish_reason == "stop" and ids and ids[-1] in self._ends:
            ids = ids[:-1]
        return {"text": str(self.tokenizer.decode(ids, skip_special_tokens=True)), "ids": ids}
