"""A model that trains on packs: the objective inside its own forward pass, proved before use.

`apply_derta` gives one model instance a forward that understands `visible_until`. The loss is
computed inside it, so that FSDP and ZeRO gather the head by their own hooks, and the body runs
as it is, its attention apart (`derta.attention`). Nothing that a model does with its mask or its
logits is taken on trust: a pack of two examples and a branch must come out as it does in separate
passes, or the model is refused.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from derta.attention import packed_mask, register_attention, scope_of
from derta.loss import derta_loss_with_rows
from derta.offloading import offloading
from derta_kernels.attention import Bounds

IGNORE_INDEX = -100
TF32_EPS = 2**-10
MASKED_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass
class DertaOutput(ModelOutput):
    """What a patched model returns for a pack with targets.

    Attributes:
        loss: (), nats, the router loss included where the model adds one.
        next_nll: (1, N), nats, -log p(next token), detached; 0 on rows that have none.
        refusal_nll: (1, N), nats, -log p(refusal token) on every row with a target, detached.
        aux_loss: (), the router loss before its weights, or None.
        logits: None: they are never formed.
    """

    loss: Tensor | None = None
    next_nll: Tensor | None = None
    refusal_nll: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None


class Twin(NamedTuple):
    """A config, the attention implementation that it named, and the one that it names now."""

    config: PreTrainedConfig
    own: str
    twin: str


@dataclass(frozen=True)
class Patch:
    """What `apply_derta` was asked for and what it changed, kept on the model."""

    refusal_token_id: int
    impl: str
    offload: bool
    twins: tuple[Twin, ...]


class Head(NamedTuple):
    """The vocabulary projection: logits are softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


def apply_derta(
    model: nn.Module,
    refusal_token_id: int,
    *,
    impl: str = "auto",
    attention: str = "auto",
    offload: bool = False,
) -> nn.Module:
    """Teaches a decoder-only model to train on packs, in place.

    Afterwards, with tensors of shape (1, N),

        model(input_ids=, position_ids=, visible_until=, shift_labels=, rto_mask=).loss

    is the objective of the pack, a `DertaOutput`. Further keywords are those of `derta_loss`
    (loss_weight, rto_weight, num_items, reduction), example_bounds as in `interval_attention`,
    which saves a transfer from the device, and router_weight, a factor of the router loss for
    steps of several packs. Without shift_labels and rto_mask the model returns its own
    output, logits included; without visible_until it is as it was, bit for bit.

    The model proves itself first: hidden states and losses of a random pack of two examples and a
    branch against separate passes of the unpatched model, in evaluation mode and without touching
    the random state. Rows may differ by the square root of the precision of the model's dtype
    (of float32 at best, in which norms and rotary embeddings compute), relative to their size, in
    the median of each sequence: a mask or head that is misunderstood moves every row by much more,
    while a mixture of experts may route single tokens elsewhere by rounding.

    Called again, it replaces what it was asked before.

    Args:
        model: a transformers model with a language model's head, or a PEFT model of one.
        refusal_token_id: in [0, vocabulary).
        impl: of the head loss, see `derta_kernels.head_loss.head_loss`.
        attention: of packs, see `derta_kernels.attention.interval_attention`.
        offload: whether what the body keeps for the backward pass of a pack waits on the host, see
            `derta.offloading`; with gradient checkpointing that is the layers' inputs. Changes
            nothing on a CPU.

    Returns:
        `model`.

    Raises:
        TypeError: model is not a transformers model.
        ValueError: the model is one that packs would train wrongly, named with the reason: an
            encoder-decoder, no head, an adapter on the head or a quantized head, attention that
            cannot be replaced or carries a state, weights that are not there, or a pack that comes
            out differently. The model is then unchanged.
    """
    patched = _transformers_model(model)
    remove_derta(patched)
    _refuse_unfit(patched)
    probe = _Probe(patched)
    expected = probe.separate_passes(patched)
    with contextlib.ExitStack() as undo:
        undo.callback(remove_derta, patched)
        _install(patched, refusal_token_id, impl, attention, offload)
        probe.check(patched, expected)
        undo.pop_all()
    return model


def remove_derta(model: nn.Module) -> nn.Module:
    """Makes a model what it was before `apply_derta`; does nothing to one that already is.

    Args:
        model: a transformers model, or a PEFT model of one.

    Returns:
        `model`.

    Raises:
        TypeError: model is not a transformers model.
    """
    patched = _transformers_model(model)
    state = vars(patched)
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
    """What `apply_derta` was asked for, or None of a model that is not patched."""
    return vars(_transformers_model(model)).get("_derta_patch")


def context_length(model: nn.Module) -> int:
    """The longest sequence that the model can read, in tokens."""
    config = _transformers_model(model).config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def checkpoint_layers(model: Any) -> None:
    """Makes the layers of a transformers or PEFT model keep only their inputs for the backward."""
    # The name of early transformers 5; where there is a later one, it warns.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    unwrap = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            "model must be a transformers PreTrainedModel or a PEFT model of one, got "
            f"{type(inner).__name__}"
        )
    return inner


def _refuse_unfit(model: PreTrainedModel) -> None:
    """What can be said without running the model."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder, packs need a decoder-only model")
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ValueError(f"{name} must have a body and a language model's head, load its CausalLM")
    if any(parameter.is_meta or parameter.numel() == 0 for parameter in model.parameters()):
        raise ValueError(
            f"{name} must have its weights to prove itself, some are on the meta device or "
            "partitioned: load the whole model first and shard it afterwards"
        )
    if not model._can_set_attn_implementation():
        raise ValueError(f"{name} computes its attention itself, packs need to replace it")
    if model._is_stateful or not layer_types <= MASKED_LAYER_TYPES:
        kinds = ", ".join(sorted(layer_types - MASKED_LAYER_TYPES)) or "recurrent state"
        raise ValueError(f"{name} has layers that no mask governs ({kinds}), a branch needs one")
    _head(model)
    if _has_router_loss(model):
        parts = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
        missing = [part for part in parts if not hasattr(model, part)]
        missing += [] if "load_balancing_loss_func" in scope_of(model) else ["a router loss"]
        if missing:
            raise ValueError(
                f"{name} has output_router_logits on but lacks {', '.join(missing)}: turn it off"
            )


def _head(model: PreTrainedModel) -> Head:
    """The head as it is now: PEFT may have been put on the model after `apply_derta`."""
    name = type(model).__name__
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"{name} has an adapter on its head, which a loss on hidden states would ignore: take "
            "the head out of target_modules, or train a copy of it with modules_to_save"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{name} must have a head with a floating-point weight (V, d), got "
            f"{type(head).__name__} with {getattr(weight, 'dtype', None)}: a quantized head cannot "
            "be used, leave it out of the quantization"
        )
    config = model.config.get_text_config(decoder=True)
    logit_scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    logit_scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return Head(weight, getattr(head, "bias", None), softcap, logit_scale)


def _install(
    model: PreTrainedModel, refusal_token_id: int, impl: str, attention: str, offload: bool
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
    state["_derta_patch"] = Patch(refusal_token_id, impl, offload, tuple(twins))
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
        rto_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        own = vars(self).get("_derta_previous_forward")
        if own is None:
            own = functools.partial(type(self).forward, self)
        if visible_until is not None:
            return _forward_packed(self, own, args, visible_until, rto_mask=rto_mask, **kwargs)
        if rto_mask is not None:
            raise ValueError("rto_mask needs visible_until, got None: batches must be packed")
        return own(*args, **kwargs)

    return forward


def _forward_packed(
    model: PreTrainedModel,
    own: Callable[..., Any],
    args: tuple[Any, ...],
    visible_until: Tensor,
    *,
    position_ids: Tensor | None = None,
    shift_labels: Tensor | None = None,
    rto_mask: Tensor | None = None,
    loss_weight: Tensor | None = None,
    rto_weight: float | Tensor = 1.0,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    example_bounds: Bounds | None = None,
    router_weight: float | Tensor = 1.0,
    **kwargs: Any,
) -> Any:
    """The body over a pack, then the loss on its hidden states; see `apply_derta`."""
    patch = _active_patch(model)
    inputs = {name: value for name, value in kwargs.items() if value is not None}
    for name in ("attention_mask", "labels", "past_key_values"):
        if name in inputs:
            raise ValueError(f"{name} must be None with visible_until, which takes its place")
    if position_ids is None:
        raise ValueError("position_ids are required with visible_until, got None")
    mask = packed_mask(visible_until, position_ids, example_bounds)
    inputs |= dict(attention_mask=mask, position_ids=position_ids, use_cache=False)

    if shift_labels is None and rto_mask is None:
        if _has_router_loss(model):
            inputs["output_router_logits"] = False  # its loss would read the mask as padding
        return own(*args, **inputs)
    if shift_labels is None:
        shift_labels = torch.full(visible_until.shape, IGNORE_INDEX, device=visible_until.device)

    device = visible_until.device
    with offloading(model, device) if patch.offload else contextlib.nullcontext():
        body = _run_body(model, *args, **inputs)
    head = _head(model)
    rows = derta_loss_with_rows(
        body.last_hidden_state,
        head.weight,
        shift_labels,
        rto_mask,
        refusal_token_id=patch.refusal_token_id,
        rto_weight=rto_weight,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=IGNORE_INDEX,
        num_items=num_items,
        reduction=reduction,
        loss_weight=loss_weight,
        impl=patch.impl,
    )
    loss, aux_loss = rows.loss, None
    if _has_router_loss(model):
        aux_loss = _router_loss(model, body)
        weight: Any = model.router_aux_loss_coef
        loss = loss + router_weight * weight * aux_loss.to(loss.device)
    return DertaOutput(
        loss=loss, next_nll=rows.next_nll, refusal_nll=rows.refusal_nll, aux_loss=aux_loss
    )


def _active_patch(model: PreTrainedModel) -> Patch:
    patch = patch_of(model)
    if patch is None:
        raise ValueError("visible_until needs apply_derta, which has been removed from this model")
    for config, _, twin in patch.twins:
        if config._attn_implementation_internal != twin:
            raise ValueError(
                "the attention implementation was set to "
                f"{config._attn_implementation_internal!r} after apply_derta: apply it again"
            )
    return patch


def _run_body(model: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
    if _has_router_loss(model):
        inputs["output_router_logits"] = True
    return model.base_model(*args, **inputs)


def _has_router_loss(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "output_router_logits", False))


def _router_loss(model: PreTrainedModel, body: Any) -> Tensor:
    """The model's own load-balancing loss, over all tokens: a pack has no padding."""
    load_balancing_loss = scope_of(model)["load_balancing_loss_func"]
    return load_balancing_loss(body.router_logits, model.num_experts, model.num_experts_per_tok)


class Passes(NamedTuple):
    """What is compared: hidden (n, d) and logits (n, V), row by row of the pack.

    logits_dtype is what the head formed them in: inside an autocast that Accelerate wrapped
    around the forward, it is coarser than what comes out.
    """

    hidden: Tensor
    logits: Tensor
    logits_dtype: torch.dtype


class _Probe:
    """Two random examples, the first with a branch, as one pack and as separate sequences.

        p p p p h h h h h h | s s s s | o o o o o

    The branch leaves the first example after three tokens of h, so that its first token is
    predicted by the third of them.
    """

    lengths = (10, 4, 5)

    def __init__(self, model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = len(_head(model).weight)
        embedding: Any = model.get_input_embeddings()
        device = embedding.weight.device
        ids, targets = torch.randint(vocabulary, (2, 19), generator=generator).to(device)
        trunk, branch, other = ids.split(self.lengths)
        self.sequences = (trunk, torch.cat((trunk[:7], branch)), other)
        positions = (*range(10), *range(7, 11), *range(5))
        until = [14] * 7 + [10] * 3 + [14] * 4 + [19] * 5
        self.pack = dict(
            input_ids=ids[None],
            position_ids=torch.tensor([positions], device=device),
            visible_until=torch.tensor([until], dtype=torch.int32, device=device),
            shift_labels=targets[None],
            rto_mask=torch.ones(1, 19, dtype=torch.bool, device=device),
        )

    def separate_passes(self, model: PreTrainedModel) -> Passes:
        """Each sequence alone through the unpatched model; of the branch's, its own rows.

        Raises:
            ValueError: the model's router loss is not the one that its modeling file names.
        """
        head: Any = model.get_output_embeddings()
        hidden, logits, dtypes = [], [], [head.weight.dtype]
        hook = head.register_forward_hook(lambda head, args, made: dtypes.append(made.dtype))
        with evaluating(model), hook:
            for sequence, rows in zip(self.sequences, self.lengths, strict=True):
                body = _run_body(model, input_ids=sequence[None], use_cache=False)
                whole = model(input_ids=sequence[None], use_cache=False)
                hidden.append(body.last_hidden_state[0, -rows:])
                logits.append(whole.logits[0, -rows:])
            if _has_router_loss(model):
                own, ours = whole.aux_loss, _router_loss(model, body)
                self._judge(model, "router loss", (own - ours).abs() / own.abs(), ours.dtype)
        return Passes(torch.cat(hidden), torch.cat(logits), dtypes[-1])

    def check(self, model: PreTrainedModel, expected: Passes) -> None:
        """Runs the pack through the patched model.

        Raises:
            ValueError: it comes out otherwise, or not at all.
        """
        mask = packed_mask(self.pack["visible_until"], self.pack["position_ids"])
        with evaluating(model):
            try:
                body = _run_body(
                    model,
                    input_ids=self.pack["input_ids"],
                    position_ids=self.pack["position_ids"],
                    attention_mask=mask,
                    use_cache=False,
                )
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError) as reason:
                raise ValueError(f"{type(model).__name__} cannot run a pack: {reason}") from reason
            output = model(**self.pack)
        hidden = body.last_hidden_state[0]
        error = (hidden - expected.hidden).norm(dim=1) / _size(expected.hidden.norm(dim=1))
        self._judge(model, "hidden states", error, hidden.dtype)

        patch = _active_patch(model)
        logits = expected.logits.to(output.next_nll.dtype)
        nll = logits.logsumexp(1, keepdim=True) - logits
        for what, tokens, losses in (
            ("next-token losses", self.pack["shift_labels"], output.next_nll),
            ("refusal losses", torch.full((1, 19), patch.refusal_token_id), output.refusal_nll),
        ):
            own = nll.gather(1, tokens.to(nll.device).T)[:, 0]
            error = (losses[0] - own).abs() / _size(logits.abs().amax(1))
            self._judge(model, what, error, expected.logits_dtype)

    def _judge(self, model: PreTrainedModel, what: str, error: Tensor, dtype: torch.dtype) -> None:
        """error (n,) of the pack's rows relative to their size, or () of the whole."""
        sequences = error.split(self.lengths) if error.dim() else (error,)
        worst = max(float(rows.median()) for rows in sequences)
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        if error.is_cuda and torch.get_float32_matmul_precision() != "highest":
            eps = max(eps, TF32_EPS)
        tolerance = eps**0.5
        if not worst <= tolerance:
            raise ValueError(
                f"{type(model).__name__} cannot be trained on packs: {what} of one pass differ "
                f"from those of separate passes by {worst:.1e} of their size, in {dtype} "
                f"{tolerance:.1e} is allowed"
            )


def _size(size: Tensor) -> Tensor:
    """A divisor: rows that are zero are compared as they are."""
    return size.where(size > 0, 1)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
