"""The folder of a run: its checkpoints and its model, whole or not there.

A checkpoint and a model are filled under hidden names, described by a manifest, and renamed. The
model goes into the folder that also holds the checkpoints, file by file; a kill in between is made
good by the next start (`publish`).
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from derta.manifest import COMPLETE, MANIFEST, DamagedError, Manifest, read_manifest, verify
from derta.modeling.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, WEIGHTS, listed
from derta.outputs import remove_abandoned, remove_folder, sync

logger = logging.get_logger(__name__)

# Names under which `save_pretrained` writes weights, and the files that lead loaders to them.
MODEL_FILES = (
    WEIGHTS,
    "model-*-of-*.safetensors",
    INDEX,
    ADAPTER_WEIGHTS,
    ADAPTER_CONFIG,
    "pytorch_model*.bin",
    "adapter_model.bin",
)


def step_of(checkpoint: Path) -> int | None:
    """Return the step in a checkpoint's name, None for other names."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first, without a look into them."""
    marks = (MANIFEST, TRAINER_STATE_NAME)
    found = [
        one for one in folder.glob("checkpoint-*") if any((one / name).exists() for name in marks)
    ]
    steps = {path: step for path in found if (step := step_of(path)) is not None}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def newest(folder: Path) -> Path:
    """Return the newest checkpoint, without a look into it.

    Raises:
        ValueError: there is none.
    """
    found = checkpoints(folder)
    if not found:
        raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {folder} yet")
    return found[0]


def checked(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint that a run can resume from.

    Raises:
        DamagedError: it is damaged or not whole; names the file.
        ValueError: it is something else.
    """
    manifest = verify(checkpoint)
    if manifest.kind != "checkpoint":
        raise ValueError(
            f"{checkpoint}: holds {manifest.kind} without the state of an optimizer "
            "(save_only_model), no run can resume from it"
        )
    return manifest


def newest_whole(folder: Path) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that is whole. Damaged ones before it are set aside.

    Each is named in a warning. If none has a manifest, another trainer wrote them: none is touched.

    Raises:
        ValueError: the newest whole one is no checkpoint to resume from.
    """
    found = checkpoints(folder)
    if not any((path / MANIFEST).exists() for path in found):
        return None
    for path in found:
        try:
            return path, checked(path)
        except DamagedError as error:
            logger.warning("%s; set aside as %s", error, set_aside(path, "damaged").name)
    return None


def set_aside(checkpoint: Path, why: str) -> Path:
    """Rename a checkpoint, so that neither a loader nor the limit of checkpoints takes it for one.

    Returns:
        its new path.
    """
    aside = checkpoint.with_name(f"{why}-{checkpoint.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{why}-{checkpoint.name}-{number}")
    return checkpoint.rename(aside)


def set_aside_after(folder: Path, step: int) -> None:
    """Set aside a run's checkpoints later than the one that it now continues from."""
    for path in checkpoints(folder):
        if (later := step_of(path)) is not None and later > step:
            aside = set_aside(path, "abandoned")
            logger.warning("%s is after step %d; set aside as %s", path, step, aside.name)


def finished(folder: Path) -> Manifest | None:
    """Return the manifest of the model with which a run ended, None without a whole one."""
    try:
        found = read_manifest(folder)
        return verify(folder) if found.finished else None
    except DamagedError as error:
        if (folder / MANIFEST).exists():
            logger.warning("%s", error)
        return None


def tidy(folder: Path) -> None:
    """Complete or remove what a kill left in a run's folder."""
    if (folder / COMPLETE).is_dir():
        publish(folder)
    remove_abandoned(folder.glob(".*.unfinished"), unlockable=True)


def left_by_another(folder: Path) -> list[str]:
    """Return the names in a folder that show a run or a model."""
    models = [path.name for path in _models(folder)]
    return [*(path.name for path in reversed(checkpoints(folder))), *sorted(models)]


def occupied(folder: Path, left: Sequence[str], *, resuming: bool = False) -> str:
    """Return a sentence about a folder that holds another run, with the ways out."""
    ways = "overwrite: true replaces it, or choose another folder"
    if not resuming:
        ways = f"resume: auto continues it, {ways}"
    return f"output_dir: {folder} holds another run ({listed(left)}): {ways}"


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a former run."""
    for path in checkpoints(folder):
        remove_folder(path)


def rotate(folder: Path, limit: int | None, best_step: int | None) -> None:
    """Remove the oldest checkpoints beyond a limit, but never the newest or the best one."""
    found = checkpoints(folder)
    kept = {path for path in found if step_of(path) == best_step} | set(found[:1])
    for path in found[1:]:
        if len(kept) < (limit or len(found)):
            kept.add(path)
    for path in reversed(found):
        if path not in kept:
            remove_folder(path)


def publish(folder: Path) -> None:
    """Replace a folder's former model by the complete one within it. May be broken off and redone.

    Weights go first and come last, so that none are ever seen beside another model's files. The
    manifest comes after them: without it, all has been done already.
    """
    staged = folder / COMPLETE
    if (staged / MANIFEST).exists():
        names = read_manifest(staged).files
        for former in [*_models(folder), *_described(folder)]:
            # One that is no longer staged is the new one.
            name = former.relative_to(folder).as_posix()
            if name not in names or (staged / name).exists():
                former.unlink(missing_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: (_is_model(name), name.endswith(".json"))):
            if (staged / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).replace(folder / name)
        sync(folder)
        (staged / MANIFEST).replace(folder / MANIFEST)
        sync(folder)
    shutil.rmtree(staged)


def _described(folder: Path) -> list[Path]:
    """Return the files that a folder's manifest names, none if it has no good one."""
    try:
        return [folder / name for name in read_manifest(folder).files]
    except DamagedError:
        return []


def _models(folder: Path) -> list[Path]:
    return list(itertools.chain.from_iterable(map(folder.glob, MODEL_FILES)))


def _is_model(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in MODEL_FILES)
