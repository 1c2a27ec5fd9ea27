"""The worlds of the demo by name."""

from __future__ import annotations

from derta.demo.cooking import Cooking
from derta.demo.gadgets import Gadgets
from derta.demo.world import World

WORLDS: dict[str, type[World]] = {"gadgets": Gadgets, "cooking": Cooking}
