"""Pages: snippets run unless marked as a sketch, links lead somewhere, and the README's six lines are the method."""

import re
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import fvae_kernels as fk
from tests import ROOT
from tests.helpers.recipe import SMALL_NETWORKS

CONTINUES = "continues"


def snippets(page: Path) -> list[tuple[str, str]]:
    """Mark and code of each snippet; the code of a continuation includes what it continues."""
    found: list[tuple[str, str]] = []
    for mark, code in re.findall(r"(?:<!-- ([\w: ]+) -->\n)?```python\n(.*?)```", page.read_text(), re.DOTALL):
        found.append((mark, found[-1][1] + code if mark == CONTINUES else code))
    return found


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [(f"{page.stem}-{i}", *found) for page in PAGES for i, found in enumerate(snippets(page))]
RUN = {name: code for name, mark, code in SNIPPETS if mark in ("", CONTINUES)}
(METHOD,) = (code for _, mark, code in SNIPPETS if mark == "test: method")


@pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", RUN)
def test_snippet_runs_as_it_stands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = re.findall(r"^(?:import|from) (\w+)", RUN[name], re.MULTILINE)
    reporters = set(re.findall(r'report_to="(\w+)"', RUN[name])) - {"none"}
    for package in (*imported, *reporters):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    exec(compile(RUN[name], name, "exec"), {"__name__": name})


def test_there_is_a_snippet_for_each_way_to_use_it() -> None:
    for name in ("get_peft_model", "from_linear", "replace_linears", "fk.encode", "fk.divergence", "fk.reconstruct"):
        assert any(name in code for code in RUN.values()), name


def test_every_mark_is_known() -> None:
    assert {mark for _, mark, _ in SNIPPETS} == {"", CONTINUES, "sketch", "test: method"}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert missing == []


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


def test_the_six_lines_are_the_layer() -> None:
    torch.manual_seed(0)
    config = fk.FVAEConfig(**SMALL_NETWORKS, rank=3, gamma_estimator="monte_carlo")
    layer = fk.FusedFVAELinear.from_linear(torch.nn.Linear(6, 4).double(), config)
    adapter, x = layer.adapter, torch.randn(9, 6).double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))

    def encoder(i: int) -> Normal:
        e = adapter._encoder(i)
        h = torch.relu(x @ e.hidden[0][0].T + e.hidden[0][1])
        return Normal(h @ e.w_mean.T + e.b_mean, ((h @ e.w_logvar.T + e.b_logvar) / 2).exp())

    def decode(g: torch.Tensor) -> torch.Tensor:
        d = adapter._decoder()
        return torch.relu(g @ d.hidden[0][0].T + d.hidden[0][1]) @ d.w_out.T + d.b_out

    names = {
        "torch": torch, "Normal": Normal, "kl_divergence": kl_divergence, "x": x, "W": layer.weight, "b": layer.bias,
        "B": adapter.B, "alpha": config.alpha, "r": config.rank, "t": adapter.decoder_scale.abs(), "decoder": decode,
        "encoder1": lambda _: encoder(1), "encoder2": lambda _: encoder(2), "lam": 0.1, "beta": 1.0, "delta": 1.0,
        "p1": Normal(torch.tensor(0.0), torch.tensor(1.0)), "p2": Normal(torch.tensor(1.5), torch.tensor(1.0)),
        "task_loss": lambda y: y.square().sum(),
    }  # fmt: skip
    torch.manual_seed(1)
    exec(METHOD, names)
    torch.manual_seed(1)
    y, terms = layer.forward_with_terms(x)
    torch.testing.assert_close(names["y"], y)
    for name in ("nll", "kl", "gamma"):
        torch.testing.assert_close(names[name], getattr(terms, name))
    torch.testing.assert_close(names["loss"], y.square().sum() + 0.1 * terms.loss)
