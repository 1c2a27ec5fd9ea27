"""A browser shows every plot, with every model in its colour."""

from __future__ import annotations

import numpy as np
import pytest

from derta.evaluation import (
    Outcome,
    VariantResult,
    compare,
    summarize,
    write_comparison,
    write_report,
)
from derta.evaluation.reporting.plots import colors
from screenshots import (
    DARK,
    LIGHT,
    figure_places,
    needs_chromium,
    pixels_like,
    screenshots,
    with_figures_painted_over,
)

pytestmark = needs_chromium

# No model is called base: the edges of letters have the same grey.
NAMES = ("untuned", "vanilla", "derta")
TUNED = NAMES[1:]
# The models in each figure, by page.
SHOWN = {
    "report": [NAMES, NAMES, NAMES, TUNED, TUNED],
    "comparison": [NAMES, NAMES],
}
PAPER = {LIGHT: (255, 255, 255), DARK: (17, 21, 26)}
INK = {LIGHT: "#24292f", DARK: "#e6edf3"}


def summary() -> dict:
    def result(hits: int) -> VariantResult:
        refused = tuple(n % 40 for n in range(40 - hits))
        return VariantResult(
            outcomes=(
                Outcome("asr.direct", hits // 2, 40, positions=refused),
                Outcome("asr.prefill.0", hits, 40, positions=refused),
                Outcome("asr.prefill.8", hits, 40, positions=tuple(8 + n for n in refused)),
            ),
            harmful_curves=(np.linspace(0.9, hits / 40, 12),),
            benign_curves=(np.linspace(hits / 40, 0, 12),),
        )

    def history(nth: int) -> list[dict[str, float]]:
        losses = ("loss", "mle_loss", "rto_loss")
        return [{"step": step} | dict.fromkeys(losses, nth + 1 / step) for step in (1, 2, 9)]

    def points(nth: int) -> list[dict[str, float]]:
        return [{"tokens": n, "asr": nth / 3, "over_refusal": nth * n / 30} for n in (1, 2, 9)]

    return summarize(
        {name: [result(hits)] for name, hits in zip(NAMES, (36, 24, 4), strict=True)},
        seconds=1,
        loss={name: [history(nth)] for nth, name in enumerate(TUNED, 1)},
        checkpoints={name: [points(nth)] for nth, name in enumerate(TUNED, 1)},
    )


Shown = dict[tuple[str, int], np.ndarray]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """Return screenshots by page and scheme; light pages also painted over and narrow."""
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "report": write_report(summary(), folder),
        "comparison": write_comparison(compare(summary()["variants"]), folder),
    }
    plain = {name: (page, 1100) for name, page in made.items()}
    more = {f"{name} painted": (with_figures_painted_over(made[name]), 1100) for name in made}
    more |= {f"{name} narrow": (page, 480) for name, page in made.items()}
    return {
        (name, scheme): picture
        for scheme, pages in ((LIGHT, plain | more), (DARK, plain))
        for name, picture in zip(
            pages, screenshots(list(pages.values()), folder, scheme=scheme), strict=True
        )
    }


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("page", SHOWN)
def test_a_browser_shows_every_plot(shown: Shown, page: str, scheme: int) -> None:
    places = figure_places(shown[f"{page} painted", LIGHT])
    assert len(places) == len(SHOWN[page])
    color = colors(NAMES)
    for place, names in zip(places, SHOWN[page], strict=True):
        figure = shown[page, scheme][place]
        assert figure.shape[0] > 100 and figure.shape[1] > 400
        assert pixels_like(figure, INK[scheme], 40) > 200
        for name in NAMES:
            # A name has fewer pixels than a line or a bar.
            pixels = pixels_like(figure, color[name])
            assert (pixels > 400) == (name in names), f"{name}: {pixels} pixels in {place}"


def test_nothing_covers_the_margins(shown: Shown) -> None:
    for (page, scheme), picture in shown.items():
        for margin in (picture[:, :8], picture[:, -8:]):
            assert (margin == PAPER[scheme]).all(), page
