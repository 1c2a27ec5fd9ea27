"""The one place that chooses an objective by a run's settings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from derta.objectives.derta import DertaObjective
from derta.objectives.unlikelihood import UnlikelihoodObjective


def objective_of(settings: Any) -> DertaObjective:
    """Return the objective that settings describe.

    Args:
        settings: has the objective's fields under their own names; unlikelihood_weight 0 leaves
            that term out.

    Raises:
        ValueError: as the objective.
    """
    kind = UnlikelihoodObjective if settings.unlikelihood_weight else DertaObjective
    return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})
