"""The manifest of a checkpoint or model: its files with sizes and SHA-256, and its run.

It is written last. A folder without one is not known to be whole; one whose files differ from it is
damaged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from derta._version import __version__
from derta.outputs import in_bytes, write_whole

MANIFEST = "manifest.json"
# A model within its folder whose files are all written, and on their way to their places.
COMPLETE = ".model.complete"
# Names of a checkpoint's files that no model is read from.
STATES = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "running_*",
    "pytorch_model_fsdp*",
    "global_step*",
    "latest",
    "zero_to_*.py",
)
# Names of files that loaders read where they find them, whether or not they belong there.
LOADED = (
    "*model*.safetensors",
    "*model*.bin",
    "*model*.index.json",
    "pytorch_model_fsdp*",
    "global_step*",
    "latest",
    "optimizer*",
    "rng_state*",
)
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "bitsandbytes",
    "torchao",
    "deepspeed",
)


class DamagedError(ValueError):
    """A folder is not what its manifest says, or has none."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a whole folder.

    Attributes:
        kind: "checkpoint" (a run can resume from it), "model" (all weights) or "adapters".
        files: size in bytes and SHA-256 in hexadecimal of every file, by path in the folder.
        step: optimizer steps done; None: not the result of a run.
        finished: True if the run ended with it.
        world_size: number of processes of the run.
        engine: engine whose files a checkpoint holds, see `SavingTrainer.engine`; None: unknown.
        run: the fingerprint of the run, see `derta.training.fingerprint`.
        versions: versions of derta and the packages that wrote it.
    """

    kind: str
    files: dict[str, tuple[int, str]]
    step: int | None = None
    finished: bool = False
    world_size: int = 1
    engine: str | None = None
    run: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())


def write_manifest(folder: Path, kind: str, **about: Any) -> Manifest:
    """Describe all files of a folder in its manifest.

    Args:
        folder: the folder.
        kind: see `Manifest`.
        about: the other attributes of `Manifest`, but for versions.

    Returns:
        the manifest.
    """
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    with ThreadPoolExecutor(8) as pool:
        described = list(pool.map(_described, (folder / name for name in names)))
    manifest = Manifest(
        kind=kind, files=dict(zip(names, described, strict=True)), versions=_versions(), **about
    )
    values = dataclasses.asdict(manifest)
    text = json.dumps({**values, "sha256": _sealed(values)}, indent=1)
    write_whole(folder / MANIFEST, f"{text}\n".encode())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder, without a look at its files.

    Raises:
        DamagedError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        if values.pop("sha256") != _sealed(values):
            raise ValueError("sha256")
        files = {str(name): (int(size), str(sha)) for name, (size, sha) in values["files"].items()}
        return Manifest(**{**values, "files": files})
    except FileNotFoundError:
        raise DamagedError(
            f"{folder}: it has no {MANIFEST}, which is written last: it was not saved to its end, "
            "or not by derta"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path}: damaged, it is not the manifest that was written") from error


def verify(folder: Path, *, ignored: Sequence[str] = ()) -> Manifest:
    """Compare the files of a folder with its manifest, byte for byte.

    Files that the manifest does not name are not looked at, unless a loader would read them.

    Args:
        folder: the folder.
        ignored: patterns of names in it that are not looked at.

    Returns:
        the manifest.

    Raises:
        DamagedError: there is no manifest, a file is missing or differs from it, or one is there
            that does not belong to the others; names the file.
    """
    manifest = read_manifest(folder)

    def matters(name: Path) -> bool:
        return not any(fnmatch(name.parts[0], pattern) for pattern in ignored)

    files = {name: one for name, one in manifest.files.items() if matters(Path(name))}
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path}: missing, {MANIFEST} names it")
        found = path.stat().st_size
        if found != size:
            raise DamagedError(f"{path}: damaged, it has {found:,} bytes, expected {size:,}")
    for path in itertools.chain.from_iterable(map(folder.glob, LOADED)):
        within = path.rglob("*") if path.is_dir() else [path]
        for one in within:
            own = one.relative_to(folder)
            if one.is_file() and own.as_posix() not in manifest.files and matters(own):
                raise DamagedError(f"{one}: unexpected, {MANIFEST} does not name it")
    with ThreadPoolExecutor(8) as pool:
        described = pool.map(_described, (folder / name for name in files))
        for (name, expected), same in zip(files.items(), described, strict=True):
            if same != expected:
                raise DamagedError(
                    f"{folder / name}: damaged, its SHA-256 is not the one in {MANIFEST}"
                )
    return manifest


def check_model(folder: Path) -> None:
    """Compare a model's files with the manifest of its folder, if it has one.

    Raises:
        ValueError: a file differs, or the model was still being saved when its run was killed.
    """
    if (folder / COMPLETE).is_dir():
        raise ValueError(
            f"{folder}: its run was killed while it saved this model: start the run again with "
            "resume: auto"
        )
    if not (folder / MANIFEST).exists():
        return
    try:
        verify(folder, ignored=STATES)
    except DamagedError as error:
        raise ValueError(
            f"{error}: copy or save it again; if it was changed on purpose, remove {MANIFEST}"
        ) from error


def describe(manifest: Manifest) -> str:
    """Return one line: the kind, the step and the size."""
    step = "" if manifest.step is None else f" of step {manifest.step:,}"
    ended = ", the end of its run" if manifest.finished else ""
    return f"{manifest.kind}{step}{ended}, {len(manifest.files)} files, {in_bytes(manifest.size)}"


def _sealed(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's own values, whatever their layout in the file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _described(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.stat().st_size, digest


def _versions() -> dict[str, str]:
    found = {"derta": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
