"""Time a sparse backward pass of the head loss against a dense one, on a tuned model's RTO rows.

    python -m benchmarks.sparse MODEL DATA --machine xeon-amx-2-cores

How many tiles are live depends on how sure a model is, so no invented rows will do. MODEL is a
folder that `derta eval` reads, and DATA a file of triples that `derta train` reads. The model reads
their harmful responses once. The loss of the hidden states at their RTO rows is timed, forward and
backward, in turns: a dense step, then a sparse one.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.measuring import describe_machine, watch_other_processes
from benchmarks.harness.question import number
from benchmarks.harness.results import results_folder, results_parser, write_results
from derta.data import Collator, Encoder, Triple, read_records, resolve_refusal_token
from derta.data.tokens.chat import batched
from derta.labels import IGNORE_INDEX
from derta.loss import derta_loss_with_rows
from derta.modeling.introspection import context_length, evaluating, head_of, transformers_model
from derta.modeling.loading import load_tuned, weights_dtype
from derta.modeling.patch import apply_derta
from derta.objectives.derta import DertaObjective
from derta_kernels.head_loss import Head, HeadLoss, choose
from derta_kernels.head_loss.choice import row_pass
from derta_kernels.head_loss.chunked import product_dtype
from derta_kernels.head_loss.row_pass import TILE

DTYPES = (torch.float32, torch.bfloat16)
EXAMPLES = 16  # of a pack


@dataclass(frozen=True)
class Record:
    """Steps of a head over all rows, dense and sparse.

    Attributes:
        trainable: if True, the gradient of weight is formed.
        dtype: torch's name for the dtype of hidden and weight.
        rows, vocabulary, width: N, V and d.
        tolerance: `sparse_backward`.
        refusal_p: mean probability of the refusal token.
        live_share: share of the gradient's tiles that are live.
        skipped_share: share of the sum of |dloss / dlogit| in the other tiles.
        errors: size of the difference from the dense gradient, relative to that gradient's, of
            hidden and, if it is trainable, of weight.
        dense_ms: median time of the dense steps.
        ratios: time of each sparse step over that of the dense one before it, ascending.
        others_share: share of all cores that other processes took meanwhile.
    """

    trainable: bool
    dtype: str
    rows: int
    vocabulary: int
    width: int
    tolerance: float
    refusal_p: float
    live_share: float
    skipped_share: float
    errors: Mapping[str, float]
    dense_ms: float
    ratios: Sequence[float]
    others_share: float


class HiddenStates(DertaObjective):
    """Packs of DeRTa, whose hidden states are handed out in place of a loss."""

    def loss(
        self, hidden: Tensor, head: Head, columns: Mapping[str, Tensor], **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return hidden.new_zeros(()), {"hidden": hidden}


class Rows(NamedTuple):
    """Hidden states (N, d) of RTO rows, the head that reads them, and the refusal token's id."""

    hidden: Tensor
    head: Head
    refusal: int

    def to(self, dtype: torch.dtype, trainable: bool) -> Rows:
        """Return copies in a dtype, in which hidden requires a gradient, and weight may."""
        weight, bias = self.head.weight.detach(), self.head.bias
        head = replace(
            self.head,
            weight=weight.to(dtype, copy=True).requires_grad_(trainable),
            bias=None if bias is None else bias.detach().to(dtype),
        )
        return Rows(self.hidden.to(dtype, copy=True).requires_grad_(), head, self.refusal)

    def step(self, tolerance: float) -> HeadLoss:
        """Run the mean RTO loss forward and backward; gradients stay until the next step."""
        count, device = len(self.hidden), self.hidden.device
        self.hidden.grad = self.head.weight.grad = None
        found = derta_loss_with_rows(
            self.hidden,
            self.head,
            torch.full((count,), IGNORE_INDEX, device=device),
            torch.ones(count, dtype=torch.bool, device=device),
            refusal_token_id=self.refusal,
            sparse_backward=tolerance,
        )
        found.loss.backward()
        return found

    def step_ms(self, tolerance: float) -> float:
        """Return the milliseconds of a step."""
        begin = time.perf_counter()
        self.step(tolerance).loss.item()  # which a GPU copies after all else
        return 1000 * (time.perf_counter() - begin)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients that the last step has left, widened to float32."""
        leaves = {"d_hidden": self.hidden, "d_weight": self.head.weight}
        return {name: leaf.grad.float() for name, leaf in leaves.items() if leaf.grad is not None}


def rto_rows(folder: Path, data: Path, device: torch.device, refusal: str, most: int) -> Rows:
    """Let a model read the harmful responses of triples; return its RTO rows in the file's order.

    Args:
        folder: the model, or adapters; in bfloat16 if a GPU computes in it.
        data: the file of triples.
        device: the device of model and rows.
        refusal: see `derta.resolve_refusal_token`.
        most: the most rows to return.
    """
    model: Any
    model, tokenizer = load_tuned(folder, weights_dtype("auto", device), None)
    triples = [one for one in read_records(data, role="safety") if isinstance(one, Triple)]
    token = resolve_refusal_token(tokenizer, refusal, triples).id
    objective = HiddenStates(branches=0)
    longest = context_length(model)
    encoder = Encoder(
        tokenizer, max_length=longest, max_tokens=longest, branches=0, cuts=objective.cuts
    )
    encoded = (one for one in encoder.encode_many(triples) if one is not None)
    collate = Collator(objective)
    apply_derta(model.to(device), token, objective=objective)
    kept: list[Tensor] = []
    with evaluating(model):
        for examples in batched(encoded, EXAMPLES):
            pack = collate(examples).to(device)
            hidden = model(**pack.model_inputs()).rows["hidden"]
            kept.append(hidden[pack.columns["rto_mask"]])
            if sum(map(len, kept)) >= most:
                break
    return Rows(torch.cat(kept)[:most], head_of(transformers_model(model)), token)


@torch.no_grad()
def live_share(rows: Rows, tolerance: float) -> float:
    """Return the share of the gradient's tiles that a sparse backward pass multiplies."""
    device = rows.hidden.device
    passed = row_pass(choose("auto", device, rows.hidden.dtype).name)
    hidden, head, refusal = rows.to(product_dtype(rows.hidden.dtype, device.type), False)
    shares = []
    for part in hidden.split(TILE):
        tokens = torch.full((len(part), 2), refusal, device=device)
        weight = torch.tensor([0.0, 1.0], device=device).repeat(len(part), 1)
        logits = F.linear(part, head.weight, head.bias)
        *_, blocks = passed.with_blocks(logits, tokens, weight, head.softcap, head.logit_scale)
        peaks = blocks[:, 0].amax(0)
        shares.append((peaks > tolerance * abs(head.logit_scale)).double().mean().item())
    return statistics.mean(shares)


def compare(rows: Rows, tolerance: float, turns: int) -> Record:
    """Compare the gradients of a dense and a sparse step, and time further ones in turns."""
    rows.step(0.0)
    exact = rows.gradients()
    by_row = rows.step(tolerance)
    errors = {
        name: ((found - exact[name]).norm() / exact[name].norm()).item()
        for name, found in rows.gradients().items()
    }
    others, begin = watch_other_processes(), time.perf_counter()
    times = [[rows.step_ms(one) for one in (0.0, tolerance)] for _ in range(turns)]
    others_share = others() / ((time.perf_counter() - begin) * (os.cpu_count() or 1))
    return Record(
        trainable=rows.head.weight.requires_grad,
        dtype=str(rows.hidden.dtype).removeprefix("torch."),
        rows=len(rows.hidden),
        vocabulary=len(rows.head.weight),
        width=rows.hidden.shape[1],
        tolerance=tolerance,
        refusal_p=torch.exp(-by_row.refusal_nll).mean().item(),
        live_share=live_share(rows, tolerance),
        skipped_share=(by_row.skipped_mass.sum() / by_row.gradient_mass.sum()).item(),
        errors=errors,
        dense_ms=statistics.median(of_dense for of_dense, _ in times),
        ratios=sorted(of_sparse / of_dense for of_dense, of_sparse in times),
        others_share=others_share,
    )


def table(machine: dict[str, Any], records: Sequence[Record]) -> str:
    """Return a Markdown table with a row for each head and dtype."""
    first = records[0]
    lines = [
        "# A sparse backward pass\n",
        f"{first.rows:,} RTO rows, V = {first.vocabulary:,}, d = {first.width:,}, tolerance "
        f"{first.tolerance:g}; [sparse.py](../../sparse.py) says what the columns are.\n",
        f"{machine['date']}, commit {machine['commit']}, "
        f"{machine.get('gpu') or machine['processor']}, threads {machine['threads']}, torch "
        f"{machine['versions']['torch']}.\n",
        "| head, dtype | mean p | live tiles | skipped | error of d_hidden | of d_weight "
        "| dense ms | sparse / dense (lowest, highest) | machine |",
        "| --- |" + " ---: |" * 8,
    ]
    for r in records:
        shares = (r.live_share, r.skipped_share, r.errors["d_hidden"], r.errors.get("d_weight"))
        cells = [
            f"{'trainable' if r.trainable else 'frozen'}, {r.dtype}",
            f"{r.refusal_p:.3f}",
            *("-" if share is None else f"{share:.2%}" for share in shares),
            number(r.dense_ms),
            f"{statistics.median(r.ratios):.2f} ({r.ratios[0]:.2f}, {r.ratios[-1]:.2f})",
            f"{r.others_share:.0%} taken",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write sparse.json and sparse.md."""
    parser = results_parser("sparse", __doc__)
    parser.add_argument("model", type=Path, help="folder of the tuned model")
    parser.add_argument("data", type=Path, help="file of triples")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--refusal", default="auto", help="a word, or auto as in derta train")
    parser.add_argument("--rows", type=int, default=11 * TILE, help="the most RTO rows")
    parser.add_argument("--tolerance", type=float, default=0.001, help="sparse_backward")
    parser.add_argument(
        "--turns", type=int, default=15, help="turns of a dense step and a sparse one"
    )
    options = parser.parse_args()
    folder, device = results_folder(options), torch.device(options.device)
    torch.set_num_threads(options.threads)
    machine = describe_machine(device, options.threads)
    rows = rto_rows(options.model, options.data, device, options.refusal, options.rows)
    records = []
    for dtype in DTYPES:
        for trainable in (False, True):
            records.append(compare(rows.to(dtype, trainable), options.tolerance, options.turns))
            print(records[-1], file=sys.stderr, flush=True)
    write_results(folder, "sparse", machine, map(asdict, records), table(machine, records))


if __name__ == "__main__":
    main()
