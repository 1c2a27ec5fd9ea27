"""An HTTP client for the `openai` package whose replies are bounded, and text or a failure.

A server may be broken, or another's. Its reply is read up to `MAX_REPLY_BYTES` and `timeout_s`, is
never redirected, and is checked before it counts. A reply that fails is passed on as status 502,
so that the package retries it like any other temporary failure; `fault_of` tells the reason.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openai

# A long answer with the ids of its tokens takes less than 1 MiB.
MAX_REPLY_BYTES = 16 * 2**20

_FAULT, _VALUE = "derta_fault", "derta_value"
_BAD_GATEWAY = 502
# Such a reply is seldom due to load, so its retry need not wait long.
_RETRY_AT_ONCE = {"retry-after-ms": "100"}
# Only these are quoted: anything else may hold a server's text.
_FINISHES = ("length", "content_filter", "tool_calls", "function_call", "stop")


class Unusable(ValueError):
    """A reply that is no answer; says why, without the server's text."""


def fault_of(response: Any) -> str | None:
    """Return why this client refused a reply, as a clause about the server, or None."""
    return response.extensions.get(_FAULT)


def value_of(response: Any) -> Any:
    """Return what `read` made of a reply."""
    return response.extensions[_VALUE]


def broke_off(error: openai.APIConnectionError) -> bool:
    """Return True if a server was reached and its reply broke off."""
    http = _http(error.request)
    return isinstance(error.__cause__, http.RemoteProtocolError | http.ReadError | http.WriteError)


def _http(request: Any) -> Any:
    """Return the package that openai sends by, httpx or httpx2."""
    return sys.modules[type(request).__module__]


def bounded_client(
    read: Callable[[str, Mapping[str, Any]], Any],
    *,
    chat: bool,
    timeout_s: float,
    pace: Callable[[], Awaitable[None]],
) -> openai.DefaultAsyncHttpxClient:
    """Return a client for one kind of completion.

    Args:
        read: function from a reply's text and its choice to a value; raises ValueError if the
            choice is not as asked.
        chat: if True, replies are those of /chat/completions.
        timeout_s: time limit of a whole reply, headers and body, in seconds.
        pace: awaited before each request.

    Raises:
        ImportError: openai is not installed.
    """
    import openai

    class Bounded(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, **_: Any) -> Any:
            await pace()
            about: dict[str, Any] = {}
            status, content = _BAD_GATEWAY, b""
            headers: Mapping[str, str] = _RETRY_AT_ONCE
            try:
                async with asyncio.timeout(timeout_s):
                    response = await super().send(request, stream=True, follow_redirects=False)
                    try:
                        content = await _body(response)
                    finally:
                        await response.aclose()
                if response.is_success:
                    about[_VALUE] = _checked(response.headers, content, chat, read)
                status, headers = response.status_code, response.headers
            except (TimeoutError, Unusable) as error:
                late = f"did not reply within {timeout_s} s"
                about[_FAULT] = late if isinstance(error, TimeoutError) else str(error)
                content = b""
            return _http(request).Response(
                status, headers=headers, content=content, request=request, extensions=about
            )

    return Bounded(follow_redirects=False, headers={"accept-encoding": "identity"})


async def _body(response: Any) -> bytes:
    """Return the body; compressed ones, which nobody asked for, may expand without limit."""
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Unusable("replied with a compressed body, which it was asked not to send")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_REPLY_BYTES:
            raise Unusable(f"replied with more than {MAX_REPLY_BYTES >> 20} MiB")
    return bytes(content)


def _checked(
    headers: Mapping[str, str],
    content: bytes,
    chat: bool,
    read: Callable[[str, Mapping[str, Any]], Any],
) -> Any:
    """Return what `read` makes of the only choice of a completion.

    Raises:
        Unusable: the body is no completion with one choice, whose text is text.
    """
    try:
        if not headers.get("content-type", "").split(";")[0].strip().lower().endswith("json"):
            raise ValueError("another type of content")
        (choice,) = json.loads(content.decode())["choices"]
        text = (choice["message"] if chat else choice)["content" if chat else "text"]
        if text is None:
            raise Unusable(_without_text(choice))
        text.encode()  # a lone surrogate is not text
        return read(text, choice)
    except Unusable:
        raise
    # Anything may have come: other types, other shapes, too deep, or not UTF-8.
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise Unusable("replied with something other than text") from error


def _without_text(choice: Mapping[str, Any]) -> str:
    finish = choice.get("finish_reason")
    if finish == "length":
        return "replied without text: max_tokens ran out before its answer (finish_reason: length)"
    return "replied without text" + (f" (finish_reason: {finish})" if finish in _FINISHES else "")
