"""Every engine trains on two ranks to the losses and weights of one process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import engines
from ranks import run_ranks

FIGURES = (
    "loss",
    "grad_norm",
    "mle_loss",
    "rto_loss",
    "retention_loss",
    "refusal_p_1",
    "live_rows",
    "preference_loss",
    "reward_chosen",
)
SCRIPT = "import engines\nengines.main()\n"


class Alone:
    """Runs of one process, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs: dict[Path, list[dict[str, float]]] = {}

    def run(self, case: engines.Case) -> tuple[Path, list[dict[str, float]]]:
        """Return the folder and the figures of a case on one process."""
        alone = ("none", *case[1:])
        output = self.folder / "-".join(alone)
        if output not in self.logs:
            self.logs[output] = engines.run(self.folder, alone, output)
        return output, self.logs[output]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("engines")
    engines.write_models(folder)
    return Alone(folder)


@pytest.mark.parametrize("cases", ["SHARDED", "OF_PAIRS", "OF_FLAGS", "WITH_DEEPSPEED"])
def test_ranks_train_to_the_weights_of_one_process(one_process: Alone, cases: str) -> None:
    if cases == "WITH_DEEPSPEED" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    # Of a pair whose loss is near e^-x, an error of x is one of as large a share of the loss; x is
    # a difference of sums over two responses, which are a hundred times as large. A divergence and
    # its gradient are of differences, too.
    of_loss = 1e-5 if cases in ("OF_PAIRS", "OF_FLAGS") else 1e-6
    of_weights = 1e-5 if cases == "OF_FLAGS" else 1e-6
    folder = one_process.folder
    run_ranks(SCRIPT, folder, cases)
    ranks = [torch.load(folder / f"{cases}-{rank}.pt", weights_only=True) for rank in range(2)]
    for index, case in enumerate(getattr(engines, cases)):
        alone, expected = one_process.run(case)
        for logs in (rank[index] for rank in ranks):
            assert len(logs) == len(expected) == engines.RUN["max_steps"]
            for step, (ours, theirs) in enumerate(zip(logs, expected, strict=True)):
                assert ours.keys() == theirs.keys() | {"imbalance"}
                for name in theirs.keys() & FIGURES:
                    close = pytest.approx(theirs[name], rel=of_loss if name == "loss" else 1e-5)
                    assert ours[name] == close, (case, step, name)
        ours, theirs = engines.weights(folder / "-".join(case)), engines.weights(alone)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            error = (ours[name] - tensor).norm() / tensor.norm()
            assert error < of_weights, (case, name, float(error))
