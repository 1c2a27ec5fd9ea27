"""A model that trains on packs: the objective inside its own forward pass, checked before use.

`apply_derta` gives one model instance a forward that understands `visible_until`. The loss is
computed inside it, so that FSDP and ZeRO gather the head by their own hooks. The body runs as it
is, except for its attention (`derta.modeling.attention`). The patch trusts nothing that a model
does with its mask or its logits: a pack of two examples and a branch must come out as it does in
separate passes, or the model is refused (`derta.modeling.selfcheck`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from derta.modeling.attention import packed_mask, register_attention, scope_of
from derta.modeling.introspection import (
    has_router_loss,
    head_of,
    router_loss,
    run_body,
    transformers_model,
)
from derta.modeling.offloading import offloading
from derta.modeling.quantization import allow_packing, check_4_bits, forbid_packing
from derta.modeling.selfcheck import Proof
from derta.modeling.sharding import class_name, inside, is_whole
from derta.objectives.base import Number, Objective
from derta.objectives.derta import DertaObjective
from derta_kernels.attention import Bounds
from derta_kernels.head_loss import checked_ids

MASKED_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass
class DertaOutput(ModelOutput):
    """Output of a patched model for a pack with targets.

    Attributes:
        loss: (), nats, the router loss included where the model adds one.
        rows: the losses of each term by its name, (1, N) each, nats, unweighted and detached; 0 on
            rows without a target. Those of DeRTa are "mle", -log p(next token), and "rto", -log
            p(refusal token), which is there for every row with a target of any term. Beside them
            are "gradient_mass" and "skipped_mass", see `derta_kernels.head_loss.HeadLoss`.
        aux_loss: (), the router loss without its weights, or None.
        logits: always None; logits are never formed.
    """

    loss: Tensor | None = None
    rows: dict[str, Tensor] | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None


class Twin(NamedTuple):
    """A config, the attention implementation that it named before, and the one it names now."""

    config: PreTrainedConfig
    own: str
    twin: str


@dataclass(frozen=True)
class Patch:
    """The arguments of `apply_derta` and its changes, kept on the model.

    refusal_token_id is an int, or several in ascending order. is_checked is True once the
    self-check has passed, or while it runs.
    """

    refusal_token_id: int | tuple[int, ...]
    objective: Objective
    impl: str
    offload: bool
    scratch_mb: float | None
    sparse_backward: float
    twins: tuple[Twin, ...]
    is_checked: bool = False


def apply_derta(
    model: nn.Module,
    refusal_token_id: int | Sequence[int],
    *,
    objective: Objective | None = None,
    impl: str = "auto",
    attention: str = "auto",
    offload: bool = False,
    scratch_mb: float | None = None,
    sparse_backward: float = 0.0,
    check: bool = True,
) -> nn.Module:
    """Make a decoder-only model train on packs, in place.

    Afterwards, with tensors of shape (1, N),

        model(input_ids=, position_ids=, visible_until=, shift_labels=, rto_mask=).loss

    is the loss of the pack; the model returns a `DertaOutput`. Other objectives take their own
    columns as keywords, see `Objective.columns`. Further keywords: loss_weight, rto_weight,
    num_items and reduction as in `derta_loss`; term_weights, factors of terms by their names (by
    default the objective's own; that of the main term stays); example_bounds as in
    `interval_attention`, live_rows as in `head_loss` and row_lists as in `Objective`, each of which
    saves a transfer from the device; reference, the tensors of `derta.training.states` by name, for
    objectives that need them; router_weight, a factor of the router loss for steps of several
    packs.
    Without a column of the objective the model returns its own output, logits included; without
    visible_until it is as it was, bit for bit.

    A self-check comes first: it compares hidden states and losses of a random pack of two examples
    and a branch with separate passes of the unpatched model, in evaluation mode and without
    touching the random state. The median row of each sequence may differ by the square root of the
    precision of the model's dtype (of float32 at best, in which norms and rotary embeddings
    compute), relative to its size. A misread mask or head moves every row by much more, while a
    mixture of experts may route single tokens elsewhere by rounding.

    On a CPU, layers in 4 bits compute with gradients from now on
    (`derta.modeling.quantization`).

    A second call replaces the first.

    Args:
        model: a transformers model with a language model's head, or a PEFT model of one.
        refusal_token_id: in [0, vocabulary), or several, whose set RTO trains towards, see
            `derta_kernels.head_loss.head_loss`.
        objective: the objective of packs; None: DeRTa's with its defaults.
        impl: implementation of the head loss, see `derta_kernels.head_loss.head_loss`.
        attention: implementation of attention over packs, see
            `derta_kernels.attention.interval_attention`.
        offload: if True, what the body keeps for the backward pass of a pack waits on the host,
            see `derta.modeling.offloading`. With gradient checkpointing those are the layers'
            inputs. Changes nothing on a CPU.
        scratch_mb, sparse_backward: MiB of the head loss's scratch, and tolerance of its backward
            pass, see `derta_kernels.head_loss.head_loss`.
        check: if False, the self-check is left to `check_derta`, for a model whose weights are
            about to be sharded. Until then a pack is refused.

    Returns:
        `model`.

    Raises:
        TypeError: model is not a transformers model, or refusal_token_id is of the wrong type.
        ValueError: packs would train the model wrongly; names the reason: an encoder-decoder, no
            head, an adapter on the head or a quantized head, attention that cannot be replaced or
            carries a state, missing weights, 4-bit weights that a CPU misreads, or a failed
            self-check. The model is then unchanged.
    """
    patched = transformers_model(model)
    ids = checked_ids(refusal_token_id)
    refusal = ids if len(ids) > 1 else ids[0]
    remove_derta(patched)
    _refuse_unfit(patched)
    if check and not is_whole(patched):
        raise ValueError(
            f"{class_name(patched)} must have its weights to prove itself, some are in shards "
            "or on the meta device: give check=False, and call check_derta with the engine"
        )
    with contextlib.ExitStack() as undo:
        undo.callback(remove_derta, patched)
        vars(patched)["_derta_unpacked"] = forbid_packing(patched)
        head = (scratch_mb, sparse_backward)
        _install(patched, refusal, impl, attention, offload, *head)
        if check:
            check_derta(patched)
        if objective is not None:
            _change(patched, objective=objective)
        undo.pop_all()
    return model


def check_derta(
    model: nn.Module, run: Callable[..., Any] | None = None, device: torch.device | None = None
) -> None:
    """Run the self-check of `apply_derta` on a patched model.

    Of a sharded model, every rank calls this at the same time, and every pass is the engine's.

    Args:
        model: see `apply_derta`.
        run: runs the model with the keywords of its forward: the engine that shards it (what
            Accelerate's `prepare` returned). None: the model itself.
        device: device of the inputs; None: that of the weights of the input embedding.

    Raises:
        TypeError: model is not a transformers model.
        ValueError: the model is not patched, or one pass over a pack does not give the results of
            separate passes.
    """
    patched = transformers_model(model)
    if patch_of(patched) is None:
        raise ValueError("check_derta needs apply_derta, which this model has not seen")
    if device is None:
        embedding: Any = patched.get_input_embeddings()
        device = embedding.weight.device
    patch = _change(patched, is_checked=False)
    proof = Proof(patched, patched if run is None else run, device)
    with _own_attention(patch):
        expected = proof.separate_passes()
    _change(patched, objective=DertaObjective(), is_checked=True)
    try:
        proof.check(patch.refusal_token_id, expected)
    except BaseException:
        _change(patched, is_checked=False)
        raise
    finally:
        _change(patched, objective=patch.objective)


@contextlib.contextmanager
def computing(model: nn.Module, objective: Objective) -> Iterator[None]:
    """Let a patched model compute the rows of another objective inside, and restore its own.

    Args:
        model: see `apply_derta`.
        objective: the objective of the packs inside.
    """
    patched = transformers_model(model)
    own = vars(patched)["_derta_patch"].objective
    _change(patched, objective=objective)
    try:
        yield
    finally:
        _change(patched, objective=own)


def _change(model: PreTrainedModel, **changes: Any) -> Patch:
    """Change values of a model's patch, and return it."""
    state = vars(model)
    state["_derta_patch"] = replace(state["_derta_patch"], **changes)
    return state["_derta_patch"]


@contextlib.contextmanager
def _own_attention(patch: Patch) -> Iterator[None]:
    """Let a model compute its attention as it does without a patch."""
    for config, own, _ in patch.twins:
        config._attn_implementation_internal = own
    try:
        yield
    finally:
        for config, _, twin in patch.twins:
            config._attn_implementation_internal = twin


def remove_derta(model: nn.Module) -> nn.Module:
    """Undo `apply_derta`; a model without it stays as it is.

    Args:
        model: a transformers model, or a PEFT model of one.

    Returns:
        `model`.

    Raises:
        TypeError: model is not a transformers model.
    """
    patched = transformers_model(model)
    state = vars(patched)
    allow_packing(state.pop("_derta_unpacked", []))
    patch: Patch | None = state.pop("_derta_patch", None)
    for config, own, twin in patch.twins if patch else ():
        if config._attn_implementation_internal == twin:
            config._attn_implementation_internal = own
    # Accelerate wraps the forward that it finds and never unwraps it: ours then stays, asleep.
    if "forward" in state and _function(state["forward"]) is state.get("_derta_forward"):
        del state["forward"], state["_derta_forward"]
        if "_derta_previous_forward" in state:
            state["forward"] = state.pop("_derta_previous_forward")
    return model


def patch_of(model: nn.Module) -> Patch | None:
    """Return the arguments of `apply_derta`, or None for a model that is not patched."""
    return vars(transformers_model(model)).get("_derta_patch")


def checkpoint_layers(model: Any) -> None:
    """Checkpoint the layers of a transformers or PEFT model: keep only their inputs."""
    # The name of early transformers 5; where there is a later one, it warns.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _refuse_unfit(model: PreTrainedModel) -> None:
    """Check all that can be checked without running the model."""
    name = class_name(model)
    config = model.config.get_text_config(decoder=True)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder, packs need a decoder-only model")
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ValueError(f"{name} must have a body and a language model's head, load its CausalLM")
    if not model._can_set_attn_implementation():
        raise ValueError(f"{name} computes its attention itself, packs need to replace it")
    if model._is_stateful or not layer_types <= MASKED_LAYER_TYPES:
        kinds = ", ".join(sorted(layer_types - MASKED_LAYER_TYPES)) or "recurrent state"
        raise ValueError(f"{name} has layers that no mask governs ({kinds}), a branch needs one")
    head_of(model)
    check_4_bits(model)
    if has_router_loss(model):
        parts = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
        missing = [part for part in parts if not hasattr(model, part)]
        missing += [] if "load_balancing_loss_func" in scope_of(model) else ["a router loss"]
        if missing:
            raise ValueError(
                f"{name} has output_router_logits on but lacks {', '.join(missing)}: turn it off"
            )


def _install(
    model: PreTrainedModel,
    refusal_token_id: int | tuple[int, ...],
    impl: str,
    attention: str,
    offload: bool,
    scratch_mb: float | None,
    sparse_backward: float,
) -> None:
    configs: dict[int, Any] = {
        id(module.config): module.config
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    }
    twins = []
    for config in configs.values():
        own = config._attn_implementation_internal
        twin = register_attention(own, attention)
        config._attn_implementation_internal = twin
        twins.append(Twin(config, own, twin))
    state = vars(model)
    state["_derta_patch"] = Patch(
        refusal_token_id,
        DertaObjective(),
        impl,
        offload,
        scratch_mb,
        sparse_backward,
        tuple(twins),
    )
    ours = state.get("_derta_forward")
    reached = inspect.unwrap(model.forward, stop=lambda wrapper: _function(wrapper) is ours)
    if _function(reached) is not ours:
        if "forward" in state:
            state["_derta_previous_forward"] = state["forward"]
        state["_derta_forward"] = _patched(type(model).forward)
        state["forward"] = MethodType(state["_derta_forward"], model)


def _function(forward: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(forward, "__func__", forward)


def _patched(class_forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(class_forward)  # generation reads its signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        visible_until: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        own = vars(self).get("_derta_previous_forward")
        if own is None:
            own = functools.partial(type(self).forward, self)
        if visible_until is not None:
            return _forward_packed(self, own, args, visible_until, **kwargs)
        for name in _active_columns(self):
            # Beside labels, transformers' own loss takes shift_labels.
            theirs = name == "shift_labels" and kwargs.get("labels") is not None
            if kwargs.get(name) is not None and not theirs:
                raise ValueError(f"{name} needs visible_until, got None: batches must be packed")
        return own(*args, **kwargs)

    return forward


def _forward_packed(
    model: PreTrainedModel,
    own: Callable[..., Any],
    args: tuple[Any, ...],
    visible_until: Tensor,
    *,
    position_ids: Tensor | None = None,
    loss_weight: Tensor | None = None,
    live_rows: Tensor | None = None,
    row_lists: Mapping[str, Tensor] | None = None,
    reference: Mapping[str, Tensor] | None = None,
    term_weights: Mapping[str, Number] | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    example_bounds: Bounds | None = None,
    router_weight: float | Tensor = 1.0,
    **kwargs: Any,
) -> Any:
    """Run the body over a pack, then the loss on its hidden states; see `apply_derta`."""
    patch = _active_patch(model)
    objective = patch.objective
    inputs = {name: value for name, value in kwargs.items() if value is not None}
    columns = {name: inputs.pop(name) for name in objective.columns if name in inputs}
    for name in ("attention_mask", "labels", "past_key_values"):
        if name in inputs:
            raise ValueError(f"{name} must be None with visible_until, which takes its place")
    if position_ids is None:
        raise ValueError("position_ids are required with visible_until, got None")
    mask = packed_mask(visible_until, position_ids, example_bounds)
    inputs |= dict(attention_mask=mask, position_ids=position_ids, use_cache=False)

    if not objective.has_targets(columns):
        if has_router_loss(model):
            inputs["output_router_logits"] = False  # its loss would read the mask as padding
        return own(*args, **inputs)

    for name, fill in objective.columns.items():
        if fill != fill and name not in columns:  # NaN: no value says that the row has none
            raise _missing(name)
    device = visible_until.device
    with offloading(model, device) if patch.offload else contextlib.nullcontext():
        body = run_body(model, *args, **inputs)
    factors = _term_weights(objective, term_weights)

    def loss_of(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return objective.loss(
            hidden,
            head_of(model),
            _Columns({**columns, **(row_lists or {}), **(reference or {})}),
            refusal_token_id=patch.refusal_token_id,
            loss_weight=loss_weight,
            live_rows=live_rows,
            term_weights=factors,
            num_items=num_items,
            reduction=reduction,
            impl=patch.impl,
            scratch_mb=patch.scratch_mb,
            sparse_backward=patch.sparse_backward,
        )

    loss, rows = inside(model.get_output_embeddings(), body.last_hidden_state, loss_of)
    aux_loss = None
    if has_router_loss(model):
        aux_loss = router_loss(model, body)
        weight: Any = model.router_aux_loss_coef
        loss = loss + router_weight * weight * aux_loss.to(loss.device)
    return DertaOutput(loss=loss, rows=rows, aux_loss=aux_loss)


class _Columns(dict[str, Tensor]):
    """The columns of a pack. One that the objective cannot do without is named in an error."""

    def __missing__(self, name: str) -> Tensor:
        raise _missing(name)


def _missing(name: str) -> ValueError:
    return ValueError(
        f"{name} is required by the model's objective, got None: pack batches with the objective "
        "that apply_derta was given"
    )


def _active_columns(model: PreTrainedModel) -> Iterable[str]:
    patch: Patch | None = vars(model).get("_derta_patch")
    return () if patch is None else patch.objective.columns


def _term_weights(objective: Objective, given: Mapping[str, Number] | None) -> Mapping[str, Number]:
    """Return the factor of every term, the objective's own for those that are not given."""
    weights: dict[str, Number] = {term.name: term.weight for term in objective.terms}
    main = objective.terms[0].name
    for name, factor in (given or {}).items():
        if name not in weights:
            raise ValueError(f"term_weights must be of {', '.join(weights)}, got {name!r}")
        if name == main and (isinstance(factor, Tensor) or factor != weights[main]):
            raise ValueError(
                f"term_weights: {main} is the main term, its factor must be {weights[main]:g}, got "
                f"{factor}: weigh the others, or the loss itself"
            )
    return {**weights, **(given or {})}


def _active_patch(model: PreTrainedModel) -> Patch:
    patch = patch_of(model)
    if patch is None:
        raise ValueError("visible_until needs apply_derta, which has been removed from this model")
    if not patch.is_checked:
        raise ValueError("visible_until needs the self-check of a sharded model: call check_derta")
    for config, _, twin in patch.twins:
        if config._attn_implementation_internal != twin:
            raise ValueError(
                "the attention implementation was set to "
                f"{config._attn_implementation_internal!r} after apply_derta: apply it again"
            )
    return patch
