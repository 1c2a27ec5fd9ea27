"""Settings that several commands have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from derta.data.tokens.templates import CHAT_TEMPLATES
from derta.settings import setting


@dataclass(kw_only=True)
class TemplateSettings:
    """The chat template."""

    chat_template: str | None = setting(
        None,
        f"Chat template in place of the tokenizer's: {', '.join(CHAT_TEMPLATES)}, a file, or Jinja "
        "text. official is the paper's, for base models.",
        heading="model",
        shown="the tokenizer's",
    )


@dataclass(kw_only=True)
class DtypeSettings:
    """The dtype of the weights."""

    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Data type of the weights. auto: bfloat16 on a GPU that computes in it, else float32.",
        heading="model",
    )


@dataclass(kw_only=True)
class LoadingSettings(TemplateSettings, DtypeSettings):
    """A model that answers or is read, and its device."""

    device: str = setting(
        "auto",
        "Device, as torch names it: cpu, cuda:1. auto: a GPU if there is one.",
        heading="model",
    )
