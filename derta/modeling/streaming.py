"""Save a model tensor by tensor, equal to what `save_pretrained` writes of it as a whole.

transformers itself says what becomes of the weights: it saves a copy of the model without storage,
and what it would write is taken down. So its names, conversions (experts that lie in one tensor
and are saved one by one), tied weights, dtypes and files hold. Then each weight is fetched,
converted, written and released.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_torch_storage_size, split_state_dict_into_shards_factory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel, modeling_utils
from transformers.core_model_loading import revert_weight_conversion

from derta.modeling.folders import listed
from derta.modeling.loading import without_bars
from derta.modeling.sharding import whole_shape, without_zero3
from derta.modeling.tensor_file import TensorFile

Fetch = Callable[[str], Tensor]


@dataclass(frozen=True)
class Piece:
    """Weights that are converted together, and what they become.

    Attributes:
        sources: their names in the model.
        targets: the file of each tensor that is made of them.
        renamed: the one tensor that a weight becomes as it is; None: they are converted.
    """

    sources: tuple[str, ...]
    targets: dict[str, str]
    renamed: str | None


@dataclass(frozen=True)
class Plan:
    """The files of a model and the order in which they are filled.

    Attributes:
        blueprint: the model without storage.
        files: the tensors of each file, without storage.
        metadata: the texts of each file's header.
        pieces: weights that are fetched at a time, in the order of the files.
    """

    blueprint: PreTrainedModel
    files: dict[str, dict[str, Tensor]]
    metadata: dict[str, Mapping[str, str]]
    pieces: list[Piece]


def blueprint_of(
    model: PreTrainedModel, dtypes: Mapping[str, torch.dtype] | None = None
) -> PreTrainedModel:
    """Return a copy of a model without storage, made before its engine shards it.

    Args:
        model: the model.
        dtypes: dtypes to save its weights in; None: their own.

    Raises:
        ValueError: its weights are not those that its configuration describes.
    """
    weights = {
        name: torch.empty(
            whole_shape(one), dtype=one.dtype if dtypes is None else dtypes[name], device="meta"
        )
        for name, one in model.state_dict(keep_vars=True).items()
    }
    made: Any
    with without_zero3(), torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
    shapes, described = (
        {name: one.shape for name, one in state.items()} for state in (weights, made.state_dict())
    )
    if differing := sorted(name for name, _ in shapes.items() ^ described.items()):
        raise ValueError(
            f"{type(model).__name__} with the model's config has other weights than the model "
            f"({listed(differing)}): what is saved could not be loaded"
        )
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    made.config = model.config
    made.generation_config = model.generation_config
    if hasattr(model, "_weight_conversions"):
        made._weight_conversions = model._weight_conversions
    # Each rank plans, which transformers leaves to the first one.
    made.should_save_on_this_rank = lambda is_main_process: is_main_process
    # Early transformers 5 asks for buffers by this name too.
    made.get_parameter = lambda name: attrgetter(name)(made)
    return made


def plan_save(blueprint: PreTrainedModel, folder: Path, max_shard_size: int | None = None) -> Plan:
    """Write all but the weights to a folder, and return how these are to be written.

    Args:
        blueprint: the model without storage.
        folder: the folder for config.json, the index and the like.
        max_shard_size: bytes of a file; None: transformers' default.

    Raises:
        ValueError: transformers converts a weight otherwise when it has not all of them.
    """
    state = blueprint.state_dict()
    limit: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    files: dict[str, dict[str, Tensor]] = {}
    texts: dict[str, Mapping[str, str]] = {}

    def take_down(tensors: dict[str, Tensor], path: str, metadata: Mapping[str, str]) -> None:
        files[Path(path).name], texts[Path(path).name] = tensors, metadata

    with _saving_by(take_down), without_bars(), _Origins(state) as origins:
        blueprint.save_pretrained(folder, state_dict=dict(state), **limit)
    pieces: dict[str, Piece] = {}
    for file, tensors in files.items():
        for target, tensor in tensors.items():
            sources, targets = origins.of(tensor), {target: file}
            renamed = target if tensor is state[next(iter(sources))] else None
            for former in {id(one): one for name in sources if (one := pieces.get(name))}.values():
                sources, targets = sources | set(former.sources), former.targets | targets
            piece = Piece(tuple(sorted(sources)), targets, renamed)
            pieces.update(dict.fromkeys(sources, piece))
    plan = Plan(blueprint, files, texts, list({id(one): one for one in pieces.values()}.values()))
    for piece in plan.pieces:
        made = _converted(plan, piece, state)
        for target, file in piece.targets.items():
            if target not in made or made[target].shape != files[file][target].shape:
                raise ValueError(
                    f"{', '.join(piece.sources)} cannot be saved as {target} tensor by tensor: "
                    "transformers converts them together with other weights"
                )
    return plan


@contextmanager
def _saving_by(save: Callable[..., None]) -> Iterator[None]:
    """Let `save` take the place of safetensors' function in transformers.

    Views of one tensor, as experts of a layer are, go into one file: without storage too.
    """
    ours = {"safe_save_file": save, "split_torch_state_dict_into_shards": _split}
    former = {name: getattr(modeling_utils, name) for name in ours}
    vars(modeling_utils).update(ours)
    try:
        yield
    finally:
        vars(modeling_utils).update(former)


def _split(state: dict[str, Tensor], **limits: Any) -> Any:
    return split_state_dict_into_shards_factory(
        state,
        get_storage_size=get_torch_storage_size,
        get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
        **limits,
    )


class _Origins(TorchDispatchMode):
    """Remembers of which weights each tensor is made that comes to be inside."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._of: Any = WeakTensorKeyDictionary()
        for name, tensor in state.items():
            self._of[tensor] = {name}

    def of(self, tensor: Tensor) -> set[str]:
        return self._of[tensor]  # type: ignore[no-any-return]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        names = set().union(*(self._of.get(one, ()) for one in given))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and one not in self._of:
                self._of[one] = names
        return made


def _converted(plan: Plan, piece: Piece, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what becomes of a piece's weights, by the names in the files."""
    if piece.renamed is not None:
        return {piece.renamed: values[piece.sources[0]]}
    made: dict[str, Tensor] = revert_weight_conversion(
        plan.blueprint, {name: values[name] for name in piece.sources}
    )
    return made


def write_weights(
    plan: Plan, folder: Path, fetch: Fetch, *, writer: int | None = 0, writers: int = 1
) -> None:
    """Fetch, convert and write all weights, one piece at a time.

    Several processes may share the work: all fetch every weight, which may need all of them, and
    each writes its own files, meanwhile the others fetch and write the next pieces.

    Memory: two pieces on the host, the one that is written and the next one.

    Args:
        plan: the files and their tensors.
        folder: the folder of the plan's other files.
        fetch: returns a weight by its name, whole, on any device.
        writer: index of this process among the writers; None: it only fetches.
        writers: the number of processes that write.

    Raises:
        OSError: a file cannot be written, which is told once all weights are fetched, so that no
            other process waits for this one.
    """
    owners = {file: index % writers for index, file in enumerate(plan.files)}
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        files: dict[str, TensorFile] = {}
        failed: OSError | None = None
        pending: Future[None] | None = None

        def write(piece: Piece, values: dict[str, Tensor]) -> None:
            for target, tensor in _converted(plan, piece, values).items():
                if (file := files.get(piece.targets[target])) is not None:
                    file.write(target, tensor)

        try:
            for file, owner in owners.items():
                if owner == writer:
                    made = TensorFile(folder / file, plan.files[file], plan.metadata[file])
                    files[file] = stack.enter_context(made)
        except OSError as error:
            failed = error
        for piece in _in_turns(plan, owners, writers):
            values = {name: fetch(name) for name in piece.sources}
            if failed is None and any(file in files for file in piece.targets.values()):
                values = {name: value.cpu() for name, value in values.items()}
                try:
                    if pending is not None:
                        pending.result()
                except OSError as error:
                    failed = error
                else:
                    pending = pool.submit(write, piece, values)
        if failed is not None:
            raise failed
        if pending is not None:
            pending.result()


def _in_turns(plan: Plan, owners: Mapping[str, int], writers: int) -> Iterator[Piece]:
    """Yield pieces such that the writers take turns."""
    queues: list[list[Piece]] = [[] for _ in range(writers)]
    for piece in plan.pieces:
        queues[owners[next(iter(piece.targets.values()))]].append(piece)
    for turn in range(max(map(len, queues), default=0)):
        yield from (queue[turn] for queue in queues if turn < len(queue))
