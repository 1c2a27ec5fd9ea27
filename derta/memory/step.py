"""Estimate the peak memory of a training step by running it on tensors without storage.

The model is the one that the config describes, with its adapters, its checkpointing, its tiled MLPs
and the ops' own shape functions. No layer is modelled by a formula, so every family is counted as
it is. On several GPUs it runs on one of them, with the allocations of its engine. Memory outside of
tensors is added: the ops' working memory and the optimizer's states.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from derta.data.tokens.refusal import FOUND_REFUSALS
from derta.loss import derta_loss
from derta.memory.engines import LAYERS, Engine, engine_of, stepped
from derta.memory.optimizer import state_bytes
from derta.memory.tracking import MemoryTracker
from derta.modeling.adapters import Method, adapt
from derta.modeling.introspection import transformers_model
from derta.modeling.liger import liger_layers
from derta.modeling.mlp_tiling import layers_of, tile_mlp
from derta.modeling.offloading import Lane, Offloading
from derta.modeling.patch import checkpoint_layers
from derta.modeling.quantization import layers_for_4_bits, widths
from derta.modeling.sharding import call, without_zero3
from derta_kernels.attention.custom_op import attention_op
from derta_kernels.attention.launch_configs import parts_bytes
from derta_kernels.head_loss import Chip, HeadCall, kl_loss, kl_working_bytes, working_bytes
from derta_kernels.head_loss.custom_op import FORMS
from derta_kernels.head_loss.kl import FORMS as KL_FORMS

ATTENTION = "derta_without_storage"
PARTS = {
    "derta::interval_attention": "attention",
    "derta::interval_attention_backward": "attention",
    "derta::head_loss": "head",
    "derta::kl_loss": "head",
    "derta::scale_gradients": "head",
}
Peaks = dict[str, Counter[str]]
FAR = 16384
H100_PROCESSORS = 132
NF4_BYTES = 0.5  # a code of four bits
SCALE_BYTES = 1 / 64 + 4 / (64 * 256)  # of its block's scale, and of that scale's own


@dataclass(kw_only=True)
class StepSettings:
    """The settings that decide the memory of a step.

    Attributes:
        config: config of the model.
        method: tuning method.
        dtype: dtype of the weights.
        autocast: if True, the model computes in bfloat16 whatever their dtype (`bf16: true`).
        optim: transformers' name of the optimizer.
        checkpointing: if True, layers keep only their inputs for the backward pass.
        offload: if True, these inputs are offloaded to the host.
        mlp_tile: see `tile_mlp`.
        liger: if True, Liger's layers replace the model's (`use_liger_kernel: true`).
        scratch_mb, sparse_backward: see `derta_kernels.head_loss.head_loss`.
        refusals: number of refusal tokens, more than one for a set.
        red_flag: if True, a reference stands beside the model, or adapters train a token's rows.
        gpus: number of GPUs, each of which runs its own packs.
        shard: engine over them, see `ShardSettings`; "none" is "ddp" if there are several.
        offload_parameters: if True, shards lie on the host.
        device_type: "cuda" or "cpu".
        capacity: memory of a device in bytes.
        processors: multiprocessors of a GPU, which decide the chunks of the head loss.
    """

    config: PreTrainedConfig
    method: Method = field(default_factory=Method)
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = False
    optim: str = "adamw_torch_fused"
    checkpointing: bool = False
    offload: bool = False
    mlp_tile: int | None = None
    liger: bool = False
    scratch_mb: float | None = None
    sparse_backward: float = 0.0
    refusals: int = 1
    red_flag: bool = False
    gpus: int = 1
    shard: str = "none"
    offload_parameters: bool = False
    device_type: str = "cuda"
    capacity: int = 0
    processors: int = H100_PROCESSORS

    @property
    def chip(self) -> Chip:
        return Chip(self.device_type, self.processors, self.capacity)


def make_step(
    model_config: PreTrainedConfig,
    config: Any,
    *,
    dtype: torch.dtype,
    checkpointing: bool,
    device_type: str,
    memory: int,
    gpus: int,
) -> StepSettings:
    """Build a step from the settings that a training run and `derta plan` share.

    Args:
        model_config: config of the model.
        config: a `Method` with these settings.
        dtype, checkpointing, device_type: see `StepSettings`.
        memory: memory of a device in bytes.
        gpus: see `StepSettings`.
    """
    return StepSettings(
        config=model_config,
        method=Method(**{key.name: getattr(config, key.name) for key in fields(Method)}),
        dtype=dtype,
        autocast=config.bf16,
        optim=config.optim,
        checkpointing=checkpointing,
        offload=config.offload_checkpoints,
        mlp_tile=config.mlp_tile,
        liger=config.use_liger_kernel,
        scratch_mb=config.scratch_mb,
        sparse_backward=config.sparse_backward,
        refusals=planned_refusals(config.refusal_tokens, config.preference),
        red_flag=config.red_flag is not None,
        gpus=gpus,
        shard=config.shard,
        offload_parameters=config.offload_parameters and device_type != "cpu",
        device_type=device_type,
        capacity=memory,
    )


def planned_refusals(given: str | Sequence[str | int] | None, preference: str | None) -> int:
    """Return the number of refusal tokens to plan for, the most that are found for "auto".

    Args:
        given: `refusal_tokens` of a run.
        preference: its preference loss, whose rows have one token and no set.
    """
    if given is None or preference is not None:
        return 1
    return FOUND_REFUSALS if given == "auto" else len(given)


class StepMemory:
    """A step's model without storage, ready to run.

    If all layers are alike, only models of two and three layers run, and further layers add the
    difference. Long packs do not run either: beyond `far` tokens, memory is extrapolated from `far`
    and half as many.
    """

    def __init__(self, step: StepSettings) -> None:
        self.step = step
        self.far = max(FAR, 8 * (step.mlp_tile or 0))
        plain = step if _may_single_out(step.method) else replace(step, method=Method())
        whole = _without_storage(plain)
        layers = layers_of(whole)
        self.layers = len(layers)
        alike = len({_shapes(layer) for layer in layers}) == 1 and self.layers > 3
        counts = [2, 3] if alike else [None]
        self._models = [_without_storage(step, count) for count in counts]
        self._reference = 0
        if step.red_flag and step.method.method == "full":
            self._reference = sum(one.numel() * one.element_size() for one in whole.parameters())
        self._optimizer = 0
        if not step.offload_parameters:
            part = stepped(step)
            sizes = [state_bytes(m, step.optim, step.device_type, part) for m in self._models]
            self._optimizer = sizes[-1] + (self.layers - 3) * (sizes[-1] - sizes[0])
        self._whole = functools.cache(self._run_models)
        self._mode = FakeTensorMode()
        with self._mode:
            for model in self._models:
                _on_cpu(model)
            self._engines = [engine_of(step, model) for model in self._models]
            for engine in self._engines:
                if engine.learns:
                    _run(step, engine, 1, 1.0, self.loss)

    def peak(self, tokens: int, live: float = 1.0) -> Counter[str]:
        """Return the peak memory of a step whose packs have that many tokens, in bytes by part.

        Args:
            live: share of tokens that have a target.

        Returns:
            "weights", "gradients", "optimizer", "checkpoints" (layer inputs kept for the backward
            pass), "attention" and "head" (memory of the two ops), "layers" (all other memory), with
            a frozen copy "reference"; on several GPUs also the parts of `derta.memory.engines`.
        """
        if tokens <= self.far:
            peaks = self._whole(tokens, live)
        else:
            half, full = self._whole(self.far // 2, live), self._whole(self.far, live)
            peaks = _beyond(half, full, (tokens - self.far) / (self.far - self.far // 2))
        peak = max(peaks.values(), key=lambda one: one.total()).copy()
        peak["optimizer"] = self._optimizer
        if self._reference:
            peak["reference"] = self._reference
        return peak

    def loss(self, model: Any, tokens: int, offloading: AbstractContextManager[None]) -> Tensor:
        """Run the body over a pack, and the head loss on its hidden states.

        Args:
            model: without storage, in a `FakeTensorMode`.
            offloading: context of the body.
        """
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with offloading:
            body = model.base_model(input_ids=ids, position_ids=ids, use_cache=False)
        head = model.get_output_embeddings()

        def loss_of(hidden: Tensor) -> Tensor:
            rto = torch.ones_like(ids, dtype=torch.bool)
            loss = derta_loss(hidden, head.weight, ids, rto, refusal_token_id=0, num_items=1)
            if not self.step.red_flag:
                return loss
            reference = hidden[0].detach().clone(), head.weight.detach()
            return loss + kl_loss(hidden[0], head.weight, *reference).loss

        return call(head, body.last_hidden_state, loss_of)

    def _run_models(self, tokens: int, live: float) -> Peaks:
        with self._mode:
            runs = [_run(self.step, engine, tokens, live, self.loss) for engine in self._engines]
        if len(runs) == 1:
            return runs[0]
        peaks = _beyond(runs[0], runs[1], self.layers - 3)
        for peak in peaks.values():
            if peak[LAYERS] > self._engines[-1].most_gathered:
                peak[LAYERS] = int(self._engines[-1].most_gathered)
        return peaks


def _beyond(less: Peaks, more: Peaks, steps: float) -> Peaks:
    """Extrapolate the peaks by that many steps, each the difference of `more` and `less`.

    Each running part is extrapolated separately, because the largest peak may change.
    """
    return {
        running: Counter(
            {
                part: peak[part] + int(steps * (peak[part] - less[running][part]))
                for part in peak | less[running]
            }
        )
        for running, peak in more.items()
        if running in less  # two layers have none between them
    }


def _without_storage(step: StepSettings, layers: int | None = None) -> nn.Module:
    """Build the model to train, or its first layers, on the meta device."""
    with without_zero3(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(step.config), dtype=step.dtype, attn_implementation=ATTENTION
        )
        model.tie_weights()  # early transformers 5 does not tie weights on this device
        if layers is not None:
            for module in model.modules():
                if isinstance(module, nn.ModuleList) and set(module) & set(layers_of(model)):
                    del module[layers:]
        if step.method.method == "qlora":
            _quantize(model)
        return prepared(model, step)


def prepared(model: PreTrainedModel, step: StepSettings) -> PreTrainedModel | PeftModel:
    """Prepare the model as the step trains it: with its adapters, checkpoints and tiles."""
    adapted = adapt(model, step.method, [0] if step.red_flag else [])
    if step.checkpointing:
        checkpoint_layers(model)
    if step.mlp_tile is not None:
        tile_mlp(model, step.mlp_tile)
    return adapted.train()


def _may_single_out(method: Method) -> bool:
    """Return True if the method may treat layers differently, by patterns or numbers of layers."""
    targets = method.lora_target_modules
    if method.method == "full":
        return False
    names = [] if targets == "all-linear" else targets
    if isinstance(names, str):
        return True
    return any(char.isdigit() for char in "".join([*names, *method.lora_modules_to_save]))


def _shapes(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((name, x.shape, x.dtype) for name, x in layer.named_parameters())


def _run(
    step: StepSettings,
    engine: Engine,
    tokens: int,
    live: float,
    loss_of: Callable[[Any, int, AbstractContextManager[None]], Tensor],
) -> Peaks:
    """Run a pack after an earlier one has left gradients; return the peaks of `MemoryTracker`."""
    model: Any = transformers_model(engine.model)

    def working(name: str, *args: Any) -> int:
        if name in ("derta::head_loss", "derta::kl_loss"):
            hidden, weight = args[:2]
            vocabulary, width = weight.shape
            _, trainable, _ = args[KL_FORMS if name == "derta::kl_loss" else FORMS]
            head_call = HeadCall(
                rows=int(len(hidden) * live),
                vocabulary=vocabulary,
                width=width,
                dtype=hidden.dtype,
                weight_dtype=weight.dtype,
                chip=step.chip,
                trainable=trainable,
                scratch_mb=step.scratch_mb,
            )
            if name == "derta::kl_loss":
                return kl_working_bytes(head_call)
            return working_bytes(head_call, step.sparse_backward > 0, step.refusals)
        if name == "derta::interval_attention_backward":
            q, k = args[1:3]
            tokens, heads = q.shape[:2].numel(), q.shape[2]
            parts = parts_bytes(q.dtype, tokens, heads, k.shape[2], q.shape[3])
            return 4 * tokens * heads + parts  # delta is a float32 for each token and head
        return 0

    tracker = MemoryTracker(lambda name: PARTS.get(name, "layers"), working)
    with contextlib.ExitStack() as hooks:

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            tracker.count(args[:1], "checkpoints")

        if step.checkpointing:
            for layer in layers_of(model):
                hooks.enter_context(layer.register_forward_pre_hook(keep))
        if step.liger:
            hooks.enter_context(liger_layers(model))
        offloading = Offloading(model, _Lane(tracker)) if step.offload else contextlib.nullcontext()
        with tracker, engine.running(tracker):
            with torch.autocast("cpu", torch.bfloat16, enabled=engine.autocast):
                loss = loss_of(model, tokens, offloading)
            engine.backward(loss)
            del loss
    return tracker.peaks


class _NoStream(contextlib.nullcontext[None]):
    def wait_stream(self, other: _NoStream) -> None: ...

    def wait_event(self, event: None) -> None: ...

    def record_event(self) -> None: ...


class _Lane(Lane):
    """Copies that are counted only by the memory they hold on the device."""

    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__(torch.device("cpu"), _NoStream(), _NoStream)
        self.tracker = tracker

    def empty_on_host(self, tensor: Tensor) -> Tensor:
        with self.tracker.elsewhere():
            return super().empty_on_host(tensor)

    def empty_on_device(self, host: Tensor) -> Tensor:
        tensor = super().empty_on_device(host)
        self.tracker.count([tensor], "checkpoints")
        return tensor


def _on_cpu(module: nn.Module) -> None:
    """Move parameters and buffers from the meta device to the CPU, where autocast applies."""
    moved: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in moved:
                    made = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[tensor] = (
                        nn.Parameter(made, tensor.requires_grad) if is_parameter else made
                    )
                tensors[name] = moved[tensor]  # type: ignore[assignment]


class _Nf4(torch.autograd.Function):
    """A linear layer that dequantizes its weight for each product, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int) -> Tensor:
        ctx.shape = out_features, x.shape[-1]
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return d_out @ d_out.new_empty(ctx.shape), None


class _Nf4Linear(nn.Linear):
    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = widths(linear)
        codes, scales = (
            torch.empty(int(linear.weight.numel() * size), dtype=torch.uint8)
            for size in (NF4_BYTES, SCALE_BYTES)
        )
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = _Nf4.apply(x, self.out_features)
        return out if self.bias is None else out + self.bias


def _quantize(model: PreTrainedModel) -> None:
    """Replace the layers to be held in 4 bits."""
    for name, layer in layers_for_4_bits(model).items():
        model.set_submodule(name, _Nf4Linear(layer))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Do as `derta.modeling.attention` does for a pack on a GPU, without the pack."""
    query, key, value = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    places = torch.empty(query.shape[:2], dtype=torch.int32)
    out, _logsumexp = attention_op(
        query, key, value, places, places, scaling or 1.0, softcap, sliding_window
    )
    return out, None


AttentionInterface.register(ATTENTION, _attention)
