"""Import rules of the package, of third parties and of the tests; CONTRIBUTING.md lists them."""

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = "fvae_kernels"

# Each part of the package and the parts that it may import from, besides itself.
ALLOWED: dict[str, set[str]] = {
    "reference": set(),
    "presets": set(),
    "config": {"presets", "reference"},
    "ops": {"reference", "config"},
    "_triton": {"reference", "ops"},
    "tuning": {"ops", "_triton"},
    "compile": {"presets", "config", "ops", "nn", "peft"},
    "testing": {"reference", "ops"},
    "training": {"reference", "config", "ops"},
    "aux_loss": {"training"},
    "nn": {"reference", "config", "ops", "training"},
    "diagnostics": {"reference", "ops", "training", "nn"},
    "callbacks": {"training", "nn", "diagnostics"},
    "serving": {"reference", "config", "training", "nn"},
    "peft": {"presets", "config", "training", "nn", "serving"},
    "_official": {"config", "nn"},
    "interop": {"_official", "config", "nn", "serving", "peft"},
    "env": {"__init__", "ops"},
    "__init__": {
        *("reference", "config", "ops", "tuning", "training"),
        *("nn", "diagnostics", "callbacks", "serving", "peft", "interop"),
    },
}

# Third parties, and the parts that may import them at all, or at import (not only inside of functions).
ANYWHERE = {"triton": {"_triton"}}
AT_IMPORT = {name: {"peft", "callbacks"} for name in ("peft", "transformers", "safetensors", "accelerate")}


def modules() -> dict[str, Path]:
    """Module name without "fvae_kernels." -> file; the package itself is "__init__"."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imported(module: str, path: Path, at_import: bool = False) -> Iterator[str]:
    """Full names of what a module imports; `at_import` leaves out imports inside of functions."""
    package = [PACKAGE, *module.split(".")] if module != "__init__" else [PACKAGE, module]
    if path.name != "__init__.py" or module == "__init__":
        package = package[:-1]
    tree = ast.parse(path.read_text())
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)} if at_import else set()
    for node in ast.walk(tree):
        if node in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, anywhere in the file."""
    known = modules()

    def own(name: str) -> str | None:
        """The module ``a.b`` for ``PACKAGE.a.b``, or ``a`` if b is a name in it."""
        _, _, rest = name.partition(f"{PACKAGE}.")
        if name != PACKAGE and not rest:
            return None
        if rest in known:
            return rest
        return next((c for c in (rest.rpartition(".")[0], "__init__") if c in known), None)

    return {
        module: {found for name in imported(module, path) if (found := own(name)) is not None} - {module}
        for module, path in known.items()
    }


def part(module: str) -> str:
    return module.partition(".")[0]


def against_the_rules() -> set[tuple[str, str]]:
    edges = {(module, part(other)) for module, others in graph().items() for other in others}
    return {(module, other) for module, other in edges if other != part(module) and other not in ALLOWED[part(module)]}


def test_every_part_has_a_rule() -> None:
    assert {part(module) for module in modules()} == set(ALLOWED)


def test_parts_import_what_they_may() -> None:
    assert against_the_rules() == set(), "see `What may import what` in CONTRIBUTING.md"


def test_the_rules_have_no_cycle() -> None:
    done: list[str] = []
    while len(done) < len(ALLOWED):
        ready = [name for name, needs in ALLOWED.items() if name not in done and needs - {"__init__"} <= set(done)]
        assert ready, f"a cycle among {sorted(set(ALLOWED) - set(done))}"
        done += ready


def test_modules_have_no_cycles() -> None:
    """Imports inside of functions count as well."""
    edges = {module: set(others) for module, others in graph().items()}
    edges.pop("__init__")  # it imports all of them; `env` asks it for the version
    reach = {module: set(others) for module, others in edges.items()}
    for middle, first in itertools.product(edges, edges):
        if middle in reach[first]:
            reach[first] |= reach[middle]
    cycles = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in edges if a in reach[a]}
    assert cycles == set()


@pytest.mark.parametrize("third_party", [*ANYWHERE, *AT_IMPORT])
def test_third_parties_stay_where_they_belong(third_party: str) -> None:
    """`import fvae_kernels` needs neither Triton nor, outside of the plug-in, PEFT."""
    allowed = ANYWHERE.get(third_party) or AT_IMPORT[third_party]
    found = {
        module
        for module, path in modules().items()
        for name in imported(module, path, at_import=third_party in AT_IMPORT)
        if name.partition(".")[0] == third_party
    }
    assert {module for module in found if not {module, part(module)} & allowed} == set()


def test_tests_import_helpers_and_no_tests() -> None:
    found = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        names = {f"{n.module}.{a.name}" for n in nodes for a in n.names if n.module.startswith("tests")}
        bad = {name for name in names if any(word.startswith("test_") for word in name.split("."))}
        if bad:
            found[path.relative_to(ROOT).as_posix()] = bad
    assert found == {}, "share it through tests/helpers"


def test_contributing_says_the_same() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## What may import what\n")[2]
    lines = re.findall(r"^([\w, ]+?)   +(.+)$", section.partition("```\n")[2].partition("```")[0], re.MULTILINE)
    said = {
        name: set(re.findall(r"\w+", allowed)) & set(ALLOWED) for names, allowed in lines for name in names.split(", ")
    }
    said["ops"] -= {"_triton"}  # by name, so it is no import
    assert said == {name: rules - {"_official"} for name, rules in ALLOWED.items() if name in said}
    assert set(ALLOWED) - set(said) == {"__init__", "_official", "env"}
