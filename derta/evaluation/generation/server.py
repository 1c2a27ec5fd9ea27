"""Models behind an OpenAI-compatible server: requests that none is lost of, and generation by them.

The `openai` package speaks to the server and repeats what fails for a time. What is ours: a pace
that repetitions keep too, one sentence for what fails for good, and a file of replies, so that a
run that was cut short goes on where it was.
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

# Servers on this machine take any key, the client none at all.
PLACEHOLDER = "none"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a model behind an OpenAI-compatible server is asked.

    Args:
        base_url: where the server is, up to and including its version: "http://localhost:8000/v1".
        model: what the server calls the model.
        api_key_env: the environment variable that holds the key, if the server wants one; None:
            OPENAI_API_KEY for OpenAI's own server, which alone it is meant for, and no key for any
            other.
        concurrency: requests under way at once.
        requests_per_minute: the most that are sent, repetitions included; None: as many as go.
        max_retries: how often a request is sent again after a server's error, a lost connection, or
            a 429: after what the server says of when, or else after ever longer.
        timeout_s: for one reply, in seconds.
        body: fields for the body of every request, beside ours or in their place; null leaves one
            of ours out, as a server may ask that does not know it.

    Raises:
        ValueError: base_url is no address or holds a password, or a number is out of its range.
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
            raise ValueError("base_url must hold no password, api_key_env names the key's variable")
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
        """The environment variable of the key that this server is sent, if it is sent one."""
        return self.api_key_env or ("OPENAI_API_KEY" if self.is_openai else None)

    @property
    def is_openai(self) -> bool:
        """Whether the server is OpenAI's own, reached in a way that keeps a key secret."""
        parts = urllib.parse.urlsplit(self.base_url)
        return parts.scheme == "https" and f".{parts.hostname}".endswith(".openai.com")


class Query(NamedTuple):
    """What one request asks: what it is called in errors, and the fields of its body."""

    id: str
    fields: Mapping[str, Any]


class Server:
    """Sends requests to one model and keeps every reply in a file.

    Args:
        settings: see `ServerSettings`.
        kept: file of replies by a hash of address and request, which only its owner can read; None
            keeps them for this object's lifetime.
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
        """What `read` makes of the reply to each query; equal ones are sent once.

        When a request fails for good no other is begun, those under way are waited for and kept,
        and then the run ends.

        Args:
            queries: to send, the first one first.
            read: makes of a reply's text, and of the choice it is from, what is to be kept, in
                terms of JSON.
            chat: whether to ask /chat/completions, with "messages", or /completions, with "prompt".
            title: what the progress bar is called.

        Returns:
            what was read, in the order of the queries.

        Raises:
            ValueError: openai is not installed, or a query does not fit the model's context; names
                its id.
            ConnectionError: a request failed for good; names its id and the reason, no text.
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
                finally:  # nothing is under way any more, but after a second interrupt
                    pool.shutdown(wait=False, cancel_futures=True)
        return [self.replies[key] for key in keys]

    def _body(self, query: Query) -> dict[str, Any]:
        fields = {"model": self.settings.model, **query.fields, **self.settings.body}
        return {name: value for name, value in fields.items() if value is not None}

    def _key(self, chat: bool, body: Mapping[str, Any]) -> str:
        asked = [self.settings.base_url, chat, body]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _finish(self, remaining: set[concurrent.futures.Future[None]], bar: tqdm) -> None:
        """Waits for replies; after a failure, or an interrupt, only for those under way."""
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
                if isinstance(failed, KeyboardInterrupt):  # a second one means at once
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
        """Keeps what is read itself: no interrupt, which is the main thread's, comes between."""
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
            # The client hands on whatever a server says with status 200.
            url = self.settings.base_url
            raise ConnectionError(f"{id}: {url} replied with something else than a text") from error
        self.replies.keep({key: read(text or "", choice)})

    def _final(self, id: str, error: openai.OpenAIError) -> Exception:
        """A sentence that tells what to mend; what the server wrote may quote what it was sent."""
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
                403: f", expected a key that may do this in {variable}",
                404: f", expected a model {model!r} and this address there",
                429: ", too many requests: set requests_per_minute",
            }.get(error.status_code, "")
            return ConnectionError(f"{id}: {url} replied with status {error.status_code}{advice}")
        if isinstance(error, openai.APIConnectionError):
            return ConnectionError(f"{id}: {url} cannot be reached, or breaks off its replies")
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
            if not self.settings.is_openai:  # whose accounts are nobody else's business either
                client.organization = client.project = None
            yield client


def _pace(per_minute: float | None) -> Callable[[], None]:
    """A function that returns no more often than that, whichever threads call it."""
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

    The prompts are those of an evaluation on this machine, token by token: nothing is rendered by
    the server. Sampling settings that the server took from the model play no part. Equal prompts
    are sent once, the longest first.

    Args:
        server: of the model.
        chat: the model's tokenizer and template. What closes a chat's turn ends an answer, as does
            its end of sequence, and whatever else the server knows to end one.
        max_new_tokens: longest answer.

    Raises:
        ValueError: max_new_tokens is below 1.
    """

    def __init__(self, server: Server, chat: Chat, *, max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.server = server
        self.tokenizer = chat.tokenizer
        self.stop_ids = {chat.closing_ids[-1], chat.tokenizer.eos_token_id} - {None}
        self.max_new_tokens = max_new_tokens
        self._ends = self.stop_ids | set(self.tokenizer.all_special_ids)

    def __call__(self, prompts: Sequence[Sequence[int]], *, ids: Sequence[str]) -> list[Written]:
        """See `derta.evaluation.generation.local.Generator`.

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
            # vLLM's own: its defaults are those of the model's generation_config.
            "repetition_penalty": 1.0,
            "stop_token_ids": sorted(self.stop_ids),
            "return_token_ids": True,
        }

    def _read(self, text: str, choice: Any) -> dict[str, Any]:
        ids = getattr(choice, "token_ids", None)
        if ids is None:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return {"text": text, "ids": ids}
        if choice.finish_reason == "stop" and ids and ids[-1] in self._ends:
            ids = ids[:-1]
        return {"text": str(self.tokenizer.decode(ids, skip_special_tokens=True)), "ids": ids}
