"""The memory that engines of several GPUs take on one of them, as a step runs.

An engine holds shards between passes, gathers weights when their modules are called, and reduces
gradients to shards. It is simulated by the allocations that it makes, in their order; the model
itself stays whole, and is not counted. Source: FSDP2 of torch 2.13 as Accelerate 1.15 applies it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from derta.memory.tracking import MemoryTracker

# Parts of a plan that only several GPUs have.
LAYERS = "gathered"
ENDS = "embeddings"
BUCKETS = "buckets"


def shard_values(shape: torch.Size, ranks: int) -> int:
    """Return the values of a rank's part of a tensor, of which each has as many whole rows."""
    rows = -(-shape[0] // ranks) if shape else 1
    return rows * shape[1:].numel()


class Whole:
    """A process that holds all of the model: alone, or with others under DDP.

    DDP keeps a second copy of the gradients, in the buckets that it sends.
    """

    learns = False
    most_gathered = math.inf

    def __init__(self, model: nn.Module, ranks: int, autocast: bool) -> None:
        self.model = model
        self.ranks = ranks
        self.autocast = autocast

    @contextlib.contextmanager
    def running(self, tracker: MemoryTracker) -> Iterator[None]:
        """Hold weights and the gradients of an earlier pack while a pass runs."""
        tracker.count((*self.model.parameters(), *self.model.buffers()), "weights")
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                tracker.count([parameter.grad], "gradients")
        trained = [p for p in self.model.parameters() if p.requires_grad and self.ranks > 1]
        held = [tracker.allocate(p.numel(), p.dtype, BUCKETS) for p in trained]
        yield
        del held

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        loss.backward()


@dataclass(eq=False)
class _Group:
    """Modules whose weights are gathered together.

    Attributes:
        moment: see `MemoryTracker`.
        keeps: if True, the weights stay whole between the passes.
        in_backward: if False, the backward pass does not need the weights.
        flat: the buffer of a gathering that nothing has waited for.
        whole: the gathered weights.
        backward: True from the start of the group's backward pass on.
        ended: True from the end of it on.
        calls: modules that a forward pass has yet to call.
    """

    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    moment: str
    keeps: bool = False
    in_backward: bool = True
    flat: Tensor | None = None
    whole: Tensor | None = None
    backward: bool = False
    ended: bool = False
    calls: set[nn.Module] = field(default_factory=set)


class _Ends(torch.autograd.Function):
    """The identity, whose backward pass ends that of a group."""

    @staticmethod
    def forward(ctx: Any, end: Any, x: Tensor) -> Tensor:
        ctx.end = end
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        ctx.end()
        return None, d_out


def _ending(inputs: Any, end: Callable[[], None]) -> Any:
    """Return a call's inputs such that `end` runs where their gradients are known."""
    if not torch.is_grad_enabled():
        return inputs

    def one(x: Any) -> Any:
        return _Ends.apply(end, x) if isinstance(x, Tensor) and x.requires_grad else x

    return tree_map(one, inputs)


class Fsdp:
    """FSDP2, wrapped as Accelerate does it.

    Args:
        model: the model to train, possibly under PEFT; its weights become those that are gathered.
        ranks: number of GPUs.
        autocast: if True, weights are gathered in bfloat16, and gradients summed in float32.
        offload: if True, shards lie on the host.
    """

    learns = False
    most_gathered = math.inf

    def __init__(self, model: Any, ranks: int, autocast: bool, offload: bool) -> None:
        self.model = model
        self.ranks = ranks
        self.autocast = autocast
        self.offload = offload
        self.shards = [
            (shard_values(p.shape, ranks), shard_dtype(p, autocast), p.requires_grad)
            for p in model.parameters()
        ]
        if autocast:
            _narrow(model)
        self.groups, self.root = _groups(model)

    @contextlib.contextmanager
    def running(self, tracker: MemoryTracker) -> Iterator[None]:
        """Hold shards while a pass runs, and gather as its modules are called."""
        self.tracker = tracker
        self.order: list[_Group] = []
        self.delayed: Tensor | None = None
        self.reducing: Tensor | None = None
        with contextlib.ExitStack() as hooks:
            with tracker.elsewhere():
                tracker.count(self.model.parameters(), "weights")
            tracker.count(self.model.buffers(), "weights")
            held = []
            if not self.offload:
                for values, dtype, is_trained in self.shards:
                    held.append(tracker.allocate(values, dtype, "weights"))
                    if is_trained:
                        held.append(tracker.allocate(values, dtype, "gradients"))
            for parameter in self.model.parameters():
                parameter.grad = None
                if parameter.requires_grad:
                    hooks.enter_context(
                        parameter.register_post_accumulate_grad_hook(
                            lambda p: tracker.count([p.grad], BUCKETS)
                        )
                    )
            for group in self.groups:
                for module in group.modules:
                    hooks.enter_context(self._before(group, module))
                    hooks.enter_context(self._after(group, module))
            self._gather(self.root)
            self._wait(self.root, forward=True)
            try:
                yield
            finally:
                for group in (*self.groups, self.root):
                    group.flat = group.whole = None
                    group.backward = group.ended = False
                self.delayed = self.reducing = None

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        self.delayed = None
        if self.root.parameters:
            self.order.append(self.root)
            self._begin_backward(self.root)
        loss.backward()
        for group in (self.root, *self.groups):
            if not group.ended:
                self._end_backward(group)
            group.flat = None
        self.reducing = None

    def _before(self, group: _Group, module: nn.Module) -> Any:
        def gather(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if group.backward:  # a checkpointed layer that runs once more
                return None
            self.tracker.moment = group.moment
            if not group.calls:
                group.calls = set(group.modules)
                args, kwargs = _ending((args, kwargs), lambda: self._end_backward(group))
            self._gather(group)
            self._wait(group, forward=True)
            return args, kwargs

        return module.register_forward_pre_hook(gather, with_kwargs=True)

    def _after(self, group: _Group, module: nn.Module) -> Any:
        def release(_: nn.Module, args: Any, output: Any) -> None:
            group.calls.discard(module)
            if group.backward or group.calls:
                return
            if not group.keeps:
                group.whole = None
            self.order.append(group)
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self._begin_backward(group))

        return module.register_forward_hook(release)

    def _gather(self, group: _Group) -> None:
        """Allocate the buffer of an all-gather."""
        if group.whole is None and group.flat is None and group.parameters:
            size = sum(p.dtype.itemsize * self._padded(p) for p in group.parameters)
            part = self._part(group)
            shard = None
            if self.autocast or self.offload:  # cast, or brought from the host
                shard = self.tracker.allocate(size // self.ranks, torch.uint8, part)
            group.flat = self.tracker.allocate(size, torch.uint8, part)
            del shard

    def _wait(self, group: _Group, *, forward: bool) -> None:
        """Copy what was gathered into the weights; in a forward pass the buffer is freed later."""
        if group.flat is None:
            return
        if forward:
            self.delayed = None
        size = group.flat.numel()
        group.whole = self.tracker.allocate(size, torch.uint8, self._part(group))
        if forward:
            self.delayed = group.flat
        group.flat = None

    def _begin_backward(self, group: _Group) -> None:
        if group.backward:
            return
        group.backward = True
        self.tracker.moment = group.moment
        if group.in_backward:
            self._gather(group)
            self._wait(group, forward=False)
        place = self.order.index(group)
        if place and self.order[place - 1].in_backward:
            self._gather(self.order[place - 1])

    def _end_backward(self, group: _Group) -> None:
        """Release the weights, and reduce their gradients to shards."""
        group.ended = True
        trained = [p for p in group.parameters if p.grad is not None]
        group.whole = self.reducing = None
        if trained:
            values = sum(map(self._padded, trained))
            dtype = torch.float32 if self.autocast else trained[0].dtype
            self.reducing = self.tracker.allocate(values, dtype, BUCKETS)
            for parameter in trained:
                parameter.grad = None
            self.tracker.allocate(values // self.ranks, dtype, BUCKETS)

    def _padded(self, parameter: Tensor) -> int:
        return self.ranks * shard_values(parameter.shape, self.ranks)

    def _part(self, group: _Group) -> str:
        return ENDS if group.moment == "ends" else LAYERS


def shard_dtype(parameter: Tensor, autocast: bool) -> torch.dtype:
    """Return the dtype of a shard: Accelerate makes trained ones float32 if bfloat16 computes."""
    return torch.float32 if autocast and parameter.requires_grad else parameter.dtype


def _groups(model: Any) -> tuple[list[_Group], _Group]:
    """Return the groups as Accelerate wraps them, and the root's of all that is left."""
    taken: set[nn.Parameter] = set()

    def group(modules: Iterable[nn.Module], moment: str, **options: Any) -> _Group:
        modules = list(modules)
        found = dict.fromkeys(p for one in modules for p in one.parameters() if p not in taken)
        taken.update(found)
        return _Group(modules, list(found), moment, **options)

    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    groups = [
        group([layer], {0: "first", len(layers) - 1: "last"}.get(place, "between"))
        for place, layer in enumerate(layers)
    ]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norm = None if isinstance(model, PeftModel) else _last_norm(model)
    tied = embedding.weight is head.weight
    if not tied:
        groups.append(group([embedding], "ends", in_backward=False))
    tail = [one for one in (norm, *([embedding] if tied else []), head) if one is not None]
    frozen = not any(p.requires_grad for p in head.parameters())
    alone = tail == [head] and frozen  # see `gather_no_more_than_needed`
    groups.append(group(tail, "ends", keeps=not alone, in_backward=not alone))
    return groups, group([model], "ends", keeps=True)


def _last_norm(model: Any) -> nn.Module | None:
    norms = [one for one in model.base_model.children() if "Norm" in type(one).__name__]
    return norms[-1] if norms else None


def _narrow(model: nn.Module) -> None:
    """Make weights bfloat16."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


@dataclass
class _Bucket:
    """Gradients to be reduced together: copied to a buffer, or too large for it."""

    values: int = 0
    large: list[nn.Parameter] = field(default_factory=list)


class Zero2:
    """DeepSpeed's ZeRO-2: whole weights; gradients and states in shards, float32 masters too.

    Args:
        model: the model to train; its weights become those that compute.
        ranks: number of GPUs.
        autocast: if True, the model computes in bfloat16.
    """

    learns = False
    most_gathered = math.inf
    bucket_values = 500_000_000
    buffers = 2  # one is filled while the other is reduced
    lasting = False  # buffers of a backward pass alone
    autocast = False  # the weights are narrow themselves

    def __init__(self, model: Any, ranks: int, autocast: bool) -> None:
        self.model = model
        self.ranks = ranks
        if autocast:
            _narrow(model)

    @contextlib.contextmanager
    def running(self, tracker: MemoryTracker) -> Iterator[None]:
        """Hold weights and shards while a pass runs, and reduce gradients as they come."""
        self.tracker = tracker
        self.bucket = _Bucket()
        self.buffer: list[Tensor] = []
        with contextlib.ExitStack() as hooks:
            held = self._hold()
            if self.lasting:
                self._make_buffers()
            for parameter in self.model.parameters():
                parameter.grad = None
                if parameter.requires_grad:
                    hooks.enter_context(
                        parameter.register_post_accumulate_grad_hook(self._add_to_bucket)
                    )
            yield
            del held

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass, and prepare a step of the optimizer."""
        if not self.lasting:
            self._make_buffers()
        loss.backward()
        self._reduce()
        if not self.lasting:
            self.buffer.clear()
        self.tracker.moment = "step"
        self.tracker.allocate(self._trained_values(), torch.float32, BUCKETS)

    def _hold(self) -> list[Tensor]:
        self.tracker.count((*self.model.parameters(), *self.model.buffers()), "weights")
        return self._masters_and_gradients()

    def _masters_and_gradients(self) -> list[Tensor]:
        """Allocate the float32 weights that are stepped, a copy even of float32 ones."""
        values = self._trained_values()
        return [
            self.tracker.allocate(values, torch.float32, "weights"),
            self.tracker.allocate(values, self._trained()[0].dtype, "gradients"),
        ]

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _trained_values(self) -> int:
        return sum(-(-parameter.numel() // self.ranks) for parameter in self._trained())

    def _make_buffers(self) -> None:
        dtype = self._trained()[0].dtype
        self.buffer = [
            self.tracker.allocate(self.bucket_values, dtype, BUCKETS) for _ in range(self.buffers)
        ]

    def _add_to_bucket(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self.tracker.count([parameter.grad], BUCKETS)
        values = parameter.numel()
        if self.bucket.values and self.bucket.values + values > self.bucket_values:
            self._reduce()
        self.bucket.values += values
        if self.bucket.values > self.bucket_values:
            self.bucket.large.append(parameter)
        else:
            parameter.grad = None

    def _reduce(self) -> None:
        """Copy the bucket into one tensor, which is reduced to shards."""
        if self.bucket.values:
            dtype = self._trained()[0].dtype
            self.tracker.allocate(self.bucket.values, dtype, BUCKETS)
        for parameter in self.bucket.large:
            parameter.grad = None
        self.bucket = _Bucket()


class Zero3(Zero2):
    """DeepSpeed's ZeRO-3: weights in shards too, each gathered for the calls of its own module.

    The order of the calls is learnt in a first pass. Later ones gather what comes next ahead, and
    do not release what is called again soon.

    Args:
        model, ranks, autocast: as for `Zero2`.
        width: size of the hidden states, by which transformers chooses the sizes of buckets.
        offload: if True, shards lie on the host.
    """

    learns = True
    buffers = 1
    lasting = True
    live_values = 1_000_000_000  # as long as fewer are whole, more are gathered ahead
    reuse_values = 1_000_000_000  # a weight that is called again after fewer stays whole

    def __init__(self, model: Any, ranks: int, autocast: bool, width: int, offload: bool) -> None:
        super().__init__(model, ranks, autocast)
        self.bucket_values = width * width
        self.ahead_values = int(0.9 * width * width)
        self.small_values = 10 * width  # such weights are never released
        self.offload = offload
        self.most_gathered = self.live_values * next(model.parameters()).dtype.itemsize
        self.order: list[nn.Module] = []  # one for each call, learnt once
        names = set(model._no_split_modules or ())
        layers = [module for module in model.modules() if type(module).__name__ in names]
        self.moments = {
            module: {0: "first", len(layers) - 1: "last"}.get(place, "between")
            for place, layer in enumerate(layers)
            for module in layer.modules()
        }
        self.layers = {parameter for layer in layers for parameter in layer.parameters()}

    @contextlib.contextmanager
    def running(self, tracker: MemoryTracker) -> Iterator[None]:
        self.whole: dict[nn.Parameter, Tensor] = {}
        self.coming: dict[nn.Parameter, tuple[list[nn.Parameter], Tensor]] = {}
        self.calls: list[nn.Module] = []
        self.queue = [
            (place, parameter)
            for place, module in enumerate(self.order)
            for parameter in self._own(module)
        ]
        self.last_use: dict[nn.Parameter, int] = {}
        with contextlib.ExitStack() as hooks, super().running(tracker):
            for module in self.model.modules():
                if self._own(module):
                    hooks.enter_context(module.register_forward_pre_hook(self._before))
                    hooks.enter_context(module.register_forward_hook(self._after))
            yield
            self.order = self.order or self.calls
            self.whole.clear()
            self.coming.clear()

    def _hold(self) -> list[Tensor]:
        with self.tracker.elsewhere():
            self.tracker.count(self.model.parameters(), "weights")
        self.tracker.count(self.model.buffers(), "weights")
        held = []
        for parameter in self.model.parameters():
            if self._is_small(parameter):
                held.append(self.tracker.allocate(parameter.numel(), parameter.dtype, "weights"))
            if not self.offload:
                values = -(-parameter.numel() // self.ranks)
                held.append(self.tracker.allocate(values, parameter.dtype, "weights"))
        return held if self.offload else held + self._masters_and_gradients()

    def _is_small(self, parameter: Tensor) -> bool:
        return parameter.numel() <= self.small_values

    def _own(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the weights of a module itself that are gathered."""
        own = module._parameters.values()
        return [one for one in own if one is not None and not self._is_small(one)]

    def _before(self, module: nn.Module, args: Any) -> Any:
        self._call(module)
        return _ending(args, lambda: self._release(module))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._release(module)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self._call(module))

    def _call(self, module: nn.Module) -> None:
        """Gather a module's weights, and ahead of their calls those that come next."""
        self.tracker.moment = self.moments.get(module, "ends")
        place = len(self.calls)
        self.calls.append(module)
        own = self._own(module)
        if missing := [p for p in own if p not in self.whole and p not in self.coming]:
            self._gather(missing)
        for parameter in own:
            if parameter in self.coming:
                together, flat = self.coming.pop(parameter)
                if len(together) == 1:
                    self.whole[parameter] = flat
                for one in together:
                    if one not in self.whole:
                        part = self._part(one)
                        self.whole[one] = self.tracker.allocate(one.numel(), one.dtype, part)
                del flat
        while self.queue and self.queue[0][0] <= place:
            self.last_use[self.queue[0][1]] = self.queue.pop(0)[0]
        live = sum(p.numel() for p in self.whole.keys() | self.coming.keys())
        limit = min(self.live_values - live, self.ahead_values)
        ahead: dict[nn.Parameter, None] = {}
        while self.queue and sum(p.numel() for p in ahead) < limit:
            use, parameter = self.queue.pop(0)
            self.last_use[parameter] = use
            if parameter not in self.whole and parameter not in self.coming:
                ahead[parameter] = None
        if ahead:
            self._gather(list(ahead))

    def _gather(self, parameters: list[nn.Parameter]) -> None:
        values = sum(self.ranks * -(-p.numel() // self.ranks) for p in parameters)
        flat = self.tracker.allocate(values, parameters[0].dtype, self._part(parameters[0]))
        self.coming |= dict.fromkeys(parameters, (parameters, flat))

    def _release(self, module: nn.Module) -> None:
        place = len(self.calls)
        keeps = {p for p in self._own(module) if self.last_use.get(p, -1) >= place}
        passed = 0
        for later in self.order[place:]:
            if passed >= self.reuse_values:
                break
            keeps.update(self._own(later))
            passed += sum(p.numel() for p in later._parameters.values() if p is not None)
        for parameter in self._own(module):
            if parameter not in keeps:
                self.whole.pop(parameter, None)

    def _part(self, parameter: nn.Parameter) -> str:
        return LAYERS if parameter in self.layers else ENDS


Engine = Whole | Fsdp | Zero2


def engine_of(step: Any, model: Any) -> Engine:
    """Return the engine of a step, for a model without storage."""
    if step.shard == "fsdp":
        return Fsdp(model, step.gpus, step.autocast, step.offload_parameters)
    if step.shard == "zero3":
        width = step.config.get_text_config(decoder=True).hidden_size
        return Zero3(model, step.gpus, step.autocast, width, step.offload_parameters)
    if step.shard == "zero2":
        return Zero2(model, step.gpus, step.autocast)
    return Whole(model, step.gpus, step.autocast)


def stepped(step: Any) -> Callable[[Tensor], Tensor]:
    """Return the function from a trained parameter to the part that one GPU's optimizer steps."""

    def shard(parameter: Tensor) -> Tensor:
        values = shard_values(parameter.shape, step.gpus)
        return torch.empty(values, dtype=shard_dtype(parameter, step.autocast), device="meta")

    def master(parameter: Tensor) -> Tensor:
        return torch.empty(-(-parameter.numel() // step.gpus), device="meta")

    parts = {"fsdp": shard, "zero2": master, "zero3": master}
    return parts.get(step.shard, lambda parameter: parameter)
