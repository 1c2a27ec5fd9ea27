"""Cases of the head loss: their inputs, and the right answer in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from derta_kernels.testing import relative_error

IGNORED = -100


class Head(NamedTuple):
    """The shape of a vocabulary projection: d, V, and the cap of its logits."""

    width: int
    vocabulary: int
    softcap: float | None = None


HEADS = {
    "tiny": Head(64, 1000),
    "small": Head(256, 16000),
    "512x32000": Head(512, 32000),
    "1024x64000": Head(1024, 64000),
    # Narrow heads: hidden's gradient has few tiles for the multiprocessors of a GPU.
    "qwen2.5-0.5b": Head(896, 151936),
    "llama-3.2-1b": Head(2048, 128256),
    "llama-3-8b": Head(4096, 128256),
    # An odd vocabulary, whose last token ours multiplies by itself on a GPU.
    "llama-3-8b + 1 token": Head(4096, 128257),
    "gemma-2-2b": Head(2304, 256000, 30.0),
    "qwen2.5-7b": Head(3584, 152064),
    "mistral-7b": Head(4096, 32768),
}

# Target probabilities as in a trained model: some rows are sure, a few are far off. Their mean loss
# is 1.8 nats.
PROBABILITIES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999, 0.99999)


@dataclass(frozen=True)
class Case:
    """One problem for every implementation.

    Attributes:
        head: a key of `HEADS`.
        rows: N.
        dtype: torch's name for the dtype of hidden and weight.
        trainable: if True, weight requires a gradient.
        inputs: "random" or "peaked", see `make_inputs`.
        live: share of the rows with a target.
        live_alone: if True, rows without a target are removed beforehand.
    """

    head: str
    rows: int
    dtype: str = "bfloat16"
    trainable: bool = True
    inputs: str = "peaked"
    live: float = 1.0
    live_alone: bool = False

    @property
    def shape(self) -> Head:
        return HEADS[self.head]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def name(self) -> str:
        """Name of the case in records and tables."""
        parts = [
            f"{self.head}, N {self.rows}, {self.dtype}",
            f"{'trainable' if self.trainable else 'frozen'} head",
            f"{self.inputs} rows",
        ]
        if self.live != 1:
            parts.append(f"{self.live:.0%} live" + (", alone" if self.live_alone else ""))
        return ", ".join(parts)


class Inputs(NamedTuple):
    """Leaves hidden (N, d) and weight (V, d) in the case's dtype, and target (N,) int64."""

    hidden: Tensor
    weight: Tensor
    target: Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Make the case's tensors, equal in every process on one kind of device.

    "random": hidden is standard normal and weight normal with variance 1 / d, so logits are
    standard normal and every token has a probability of about 1 / V. "peaked": each row of hidden
    is moved along its target's row of weight until the target has about the probability that
    `PROBABILITIES` gives it in turn. With unit rows of weight, a step of s raises the target's
    logit by s, and the variance of the others from 1 to v = 1 + s^2 / d; their logsumexp is about
    log V + v / 2.
    """
    width, vocabulary, softcap = case.shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight = normal(vocabulary, width).div_(math.sqrt(width)).to(case.torch_dtype)
    hidden = normal(case.rows, width)
    target = torch.randint(vocabulary, (case.rows,), generator=generator, device=device)
    if case.inputs == "peaked":
        towards = weight[target].float()
        odds = torch.tensor(PROBABILITIES, device=device).logit()
        odds = odds[torch.arange(case.rows, device=device) % len(PROBABILITIES)]
        variance = 1 + (odds + math.log(vocabulary) + 0.5).square() / width
        logit = odds + math.log(vocabulary) + variance / 2
        if softcap is not None:
            logit = softcap * torch.atanh(logit / softcap)
        missing = logit - (hidden * towards).sum(1)
        hidden += (missing / towards.square().sum(1))[:, None] * towards
    if case.live != 1:
        order = torch.randperm(case.rows, generator=generator, device=device)
        target[order[round(case.live * case.rows) :]] = IGNORED
        if case.live_alone:
            hidden, target = hidden[target != IGNORED], target[target != IGNORED]
    return Inputs(
        hidden.to(case.torch_dtype).requires_grad_(), weight.requires_grad_(case.trainable), target
    )


class Answer(NamedTuple):
    """The mean loss and its gradients, computed in float64; gradients are stored in float32."""

    loss: float
    d_hidden: Tensor
    d_weight: Tensor


def right_answer(inputs: Inputs, softcap: float | None, chunk_rows: int = 512) -> Answer:
    """Return the `Answer` for the rounded inputs."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach().double()
    live = (inputs.target != IGNORED).nonzero()[:, 0]
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    d_weight = torch.zeros_like(weight)
    loss = 0.0
    for rows in live.split(chunk_rows):
        h, token = hidden[rows].double(), inputs.target[rows, None]
        z = h @ weight.T
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        log_p = z.log_softmax(1)
        loss -= log_p.gather(1, token).sum().item() / len(live)
        g = log_p.exp_()
        g.scatter_add_(1, token, torch.full_like(g[:, :1], -1.0))
        g /= len(live)
        if softcap is not None:
            g *= 1 - (z / softcap).square_()
        d_hidden[rows] = (g @ weight).float()
        d_weight.addmm_(g.T, h)
    return Answer(loss, d_hidden, d_weight.float())


def errors(loss: Tensor, inputs: Inputs, answer: Answer) -> dict[str, float]:
    """Return the errors of a loss and of the gradients it left on the inputs.

    The loss's error is relative. The gradients' error is `relative_error`, which gives the rows of
    a matrix equal weight, so rows with sure targets count although their gradient is small.
    """
    found = {"loss_error": abs(loss.item() - answer.loss) / abs(answer.loss)}
    for name in ("hidden", "weight"):
        gradient = getattr(inputs, name).grad
        if gradient is not None:
            right = getattr(answer, f"d_{name}").to(gradient.device)
            found[f"d_{name}_error"] = relative_error(gradient, right)
    return found
