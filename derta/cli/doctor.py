"""`derta doctor`: the packages, devices and ops of this machine; or what a folder holds."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch
from transformers.utils import logging

from derta import __version__
from derta.cli.settings.tools import DoctorConfig
from derta.modeling.verification import verify
from derta.terminal import say
from derta_kernels import attention, head_loss

PACKAGES = {
    "torch": "required",
    "transformers": "required",
    "accelerate": "required",
    "peft": "required",
    "triton": "optional",
    "flash-attn": "optional",
    "liger-kernel": "optional",
    "bitsandbytes": "optional",
}


def _packages() -> list[tuple[str, str]]:
    rows = []
    for name, need in PACKAGES.items():
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, f"not installed ({need})"))
    return rows


def _devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"cuda:{index}",
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"sm_{properties.major}{properties.minor}",
            )
        )
    if torch.backends.mps.is_available():
        rows.append(("mps", platform.processor()))
    return rows


def _ops(device: torch.device) -> list[tuple[str, str]]:
    return [
        (name, "{0.name}: {0.reason}".format(choose("auto", device)))
        for name, choose in (
            ("head_loss", head_loss.choose),
            ("interval_attention", attention.choose),
        )
    ]


def report() -> str:
    """Return the report as text."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    python = f"Python {platform.python_version()}, {platform.system()}"
    sections = {
        f"derta {__version__}, {python}": _packages(),
        "devices": _devices(),
        f"ops on {device.type}": _ops(device),
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {name:20}{text}" for name, text in rows]
    return "\n".join(lines)


def report_folder(folder: Path) -> str:
    """Return what a folder holds as text.

    Raises:
        ValueError, FileNotFoundError: it is damaged, see `verify`.
    """
    return "\n".join(f"{name:12}{text}" for name, text in verify(folder))


def run(config: DoctorConfig) -> None:
    """Print the report on this machine, or on a folder.

    Raises:
        ValueError, FileNotFoundError: the folder is damaged.
    """
    logging.set_verbosity_error()
    say(report() if config.folder is None else report_folder(Path(config.folder)))
