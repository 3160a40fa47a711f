"""What CONTRIBUTING.md, the workflow and pre-commit say is what there is."""

import re

from tests import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def tree() -> set[str]:
    """Paths of the tree in CONTRIBUTING.md: an entry is a word with a dot or a slash, two spaces further in."""
    block = PAGE.partition("\n## The tree\n")[2].partition("```\n")[2].partition("```")[0]
    found, parents = set(), [""]
    for line in block.splitlines():
        depth, text = (len(line) - len(line.lstrip())) // 2, line.strip()
        names = [word for word in re.split(r" {2,}", text)[0].split() if re.search(r"[./]", word)]
        parents[depth + 1 :] = [parents[depth] + names[0]]
        found |= {parents[depth] + name for name in names}
    return found


def test_the_tree_is_there() -> None:
    assert {path for path in tree() if not (ROOT / path).exists()} == set()


def test_nothing_is_missing_from_the_tree() -> None:
    package = ROOT / "fvae_kernels"
    public = {p for p in package.iterdir() if p.is_dir() or (p.suffix == ".py" and not p.name.startswith("_"))}
    public |= {p for p in (package / "ops").glob("*.py") if not p.name.startswith("_")}
    public |= {p for p in (ROOT / "tests").iterdir() if p.is_dir()}
    names = {p.relative_to(ROOT).as_posix() + "/" * p.is_dir() for p in public if p.name != "__pycache__"}
    assert names - tree() == set()


def test_every_make_target_that_it_names_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", PAGE)) <= targets


def test_ci_runs_what_a_contributor_runs() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"^\s+(?:- )?run: (.*)$", workflow, re.MULTILINE) == [".ci/run", "make sanitize"]
    made = re.findall(r"^make (\w+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert made == ["check", "test"]
    assert ", ".join(f"`make {name}`" for name in made) in PAGE


def test_ruff_has_one_version() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    (version,) = re.findall(r"ruff-pre-commit\n\s+rev: v([\d.]+)$", config, re.MULTILINE)
    assert f"\nruff=={version}\n" in (ROOT / "constraints.txt").read_text()
