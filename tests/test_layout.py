"""The house stands as designed: who may import whom, and nothing shadows anybody."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import instruction_sets
from derta.cli import module_of
from derta.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]

# Later layers may import earlier ones; see "Who imports whom" in kernels/README.md.
LAYERS = [
    {"derta_kernels"},
    {
        "derta._lazy",
        "derta._version",
        "derta.launch",
        "derta.outputs",
        "derta.manifest",
        "derta.settings",
        "derta.terminal",
        "derta.loss",
        "derta.labels",
    },
    {"derta.data.records", "derta.objectives.defaults"},
    {"derta.data.tokens"},
    {"derta.objectives"},
    {"derta.data"},
    {"derta.modeling"},
    {"derta.evaluation", "derta.memory"},
    {"derta.training"},
    {"derta.demo"},
    {"derta.cli"},
]


def modules() -> dict[str, Path]:
    found = {}
    for root, package in ((ROOT / "kernels", "derta_kernels"), (ROOT, "derta")):
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import of {node.module}"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


DOORS = ("derta", "derta.data", "derta.evaluation", "derta.settings")


def through_doors(names: Iterable[str]) -> set[str]:
    """Return imported names, those of a lazy package by the module that defines them."""
    homes = {
        f"{door}.{alias.name}": f"{node.module}.{alias.name}"
        for door in DOORS
        for node in ast.parse((ROOT / door.replace(".", "/") / "__init__.pyi").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return {homes.get(name, name) for name in names}


def imports(path: Path) -> set[str]:
    return imported(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def layer(module: str) -> int | None:
    """Return the index of the longest name in `LAYERS` that holds the module."""
    held = {
        name: index
        for index, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    }
    return held[max(held, key=len)] if held else None


def test_nothing_imports_upward() -> None:
    for module, path in modules().items():
        own = layer(module)
        if own is None:  # derta itself and derta.__main__ only point the way
            continue
        for name in imports(path):
            theirs = layer(name)
            assert theirs is None or theirs <= own, f"{module} imports {name}"


def room(module: str) -> str:
    """Return the package that a module lies in."""
    return module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]


def test_rooms_have_no_circles() -> None:
    """The two packages themselves hold modules of several layers."""
    found, outer = modules(), {"derta", "derta_kernels"}
    arrows: dict[str, set[str]] = {}
    for module, path in found.items():
        for name in through_doors(imports(path)):
            while name and name not in found:
                name = name.rpartition(".")[0]
            if name and len({room(name), room(module)} - outer) == 2:
                arrows.setdefault(room(module), set()).add(room(name))
    graphlib.TopologicalSorter(arrows).prepare()


def test_every_module_has_its_layer() -> None:
    unplaced = {name for name in modules() if layer(name) is None}
    assert unplaced == {"derta", "derta.__main__"}


@pytest.mark.parametrize("module", ["derta_kernels", "derta.loss", "derta.labels", "derta"])
def test_the_drop_in_loss_needs_torch_alone(module: str) -> None:
    heavy = ("transformers", "datasets", "peft", "accelerate", "tokenizers", "matplotlib")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""},
    )
    assert done.stdout.strip() == "[]"


# What commands import of others is there at once, and of ours nothing: a circle shows only so.
ALONE = """
import importlib, os, sys
import datasets, peft, transformers.trainer
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(module)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{module} cannot be imported first")
"""


@pytest.mark.slow
def test_every_command_is_imported_by_itself() -> None:
    commands = [module_of(command).__name__ for command in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *commands],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_training_run_needs_nothing_that_draws() -> None:
    found, waiting = modules(), ["derta.training.trainer"]
    loaded: set[str] = set()
    while waiting:
        name = waiting.pop()
        loaded.add(name)
        at_once = imported(ast.parse(found[name].read_text("utf-8")).body) if name in found else ()
        waiting.extend({*through_doors(at_once), name.rpartition(".")[0] or "derta"} - loaded)
    assert "derta.evaluation.measures.curve" in loaded
    assert not [name for name in loaded if name.startswith("matplotlib")]


def test_kernels_shadows_no_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "site-packages" in spec.origin
    for name in ("triton", "torch", "cuda"):
        assert not (ROOT / "kernels" / "derta_kernels" / name).exists()


@pytest.mark.parametrize("module", DOORS)
def test_public_names_resolve_and_shadow_no_module(module: str) -> None:
    package = importlib.import_module(module)
    assert package.__all__ == dir(package)
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert f"{module}.{name}" not in modules()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_paths_named_in_documents_exist() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")]
    documents += [*ROOT.glob("examples/*.yaml"), ROOT / "benchmarks" / "gpu.sh"]
    for document in documents:
        for path in re.findall(
            r"(?<![\w/.])((?:kernels|derta|benchmarks|tests|examples|docs)/[\w/.-]+\.\w+)",
            document.read_text(encoding="utf-8"),
        ):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_the_tests_of_each_instruction_set_exist() -> None:
    for path in instruction_sets.TESTS:
        assert (ROOT / "tests" / path.partition("::")[0]).exists(), path


def test_versions_agree() -> None:
    from derta import __version__

    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_pinned_versions_run_on_every_python_that_the_project_runs_on() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, equal, version = line.partition("==")
        if not equal:
            continue
        try:
            found = metadata(name)
        except PackageNotFoundError:  # of other machines
            continue
        if found["Version"].partition("+")[0] != version:  # not installed by `make setup`
            continue
        allowed = SpecifierSet(found["Requires-Python"] or "")
        refused = [python for python in ("3.11.0", "3.12.0", "3.13.0") if python not in allowed]
        assert not refused, f"{line} needs {allowed}: no Python {refused[0]}"
