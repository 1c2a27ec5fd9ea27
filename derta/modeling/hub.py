"""The model hub: whether it answers, before a client asks it again and again."""

from __future__ import annotations

import importlib
from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

SECONDS = 3.0


def check_hub(name: str) -> None:
    """Check that the model hub can be reached if a model can come from nowhere else.

    The hub's client tries a file that the cache lacks again for half a minute. One request tells
    sooner that nobody answers.

    Args:
        name: folder of a model, or a name on the model hub.

    Raises:
        OSError: the name is a file, or it is no folder, its config.json is not in the cache, and
            the hub does not answer within `SECONDS`.
    """
    if Path(name).is_dir():
        return
    if Path(name).exists():
        raise NotADirectoryError(f"{name}: is a file, expected the folder of a model")
    try:
        if try_to_load_from_cache(name, "config.json") is not None:
            return
    except HFValidationError:  # no name of a hub: loading says so
        return
    session = get_session()
    # httpx, or its successor: the client of the hub's version.
    client = importlib.import_module(type(session).__module__.partition(".")[0])
    try:
        session.head(constants.ENDPOINT, timeout=SECONDS)
    except client.TransportError as error:
        raise OSError(
            f"{name}: is no folder, its config.json is not in the model hub's local cache, and the "
            f"hub cannot be reached: {error}"
        ) from error
