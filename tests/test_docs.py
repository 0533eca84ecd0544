"""The documentation: its code parses, its names exist, its pages are built and need no network."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.main import get_command

import chanprune_ext as cpx
from chanprune_ext.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WRITTEN = [page for page in PAGES if page.stem not in ("benchmarks", "coverage")]


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), re.S | re.M)
    return [
        "\n".join(line.removeprefix(indent) for line in text.splitlines()) for indent, text in found
    ]


@pytest.mark.parametrize("page", [*WRITTEN, ROOT / "README.md"], ids=lambda page: page.stem)
def test_code_parses_and_public_names_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cpx":
                assert hasattr(cpx, node.attr), node.attr


@pytest.mark.parametrize("page", [*WRITTEN, ROOT / "README.md"], ids=lambda page: page.stem)
def test_commands_and_their_options_exist(page: Path) -> None:
    commands = get_command(app).commands
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    for line in re.findall(r"^(?:torchrun .*-m chanprune_ext|chanprune) (.*)$", text, re.M):
        words = line.partition("#")[0].split()
        command = commands[words[0]]
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        assert {w for w in words if w.startswith("--")} <= known | {"--help"}, line


def test_objects_of_the_reference_exist() -> None:
    for path in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M):
        try:
            importlib.import_module(path)
        except ImportError:
            module, _, name = path.rpartition(".")
            importlib.import_module(module)
            assert hasattr(sys.modules[module], name), path


def test_the_criterion_of_ones_own_does_what_it_says() -> None:
    page = ROOT / "docs" / "criteria.md"
    (block,) = [b for b in blocks(page, "python") if "def largest_weight" in b]
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        torch.zeros(1, 3, 4, 4),
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.1, -3, 2, 0.2]).view(4, 1, 1, 1).expand(4, 3, 1, 1))
    names = {"cpx": cpx, "torch": torch, "model": model, "x": x}
    exec(block, names)  # noqa: S102 - of our own documentation
    assert names["plan"].kept["0.weight"][0].tolist() == [1, 2]


@pytest.mark.slow
def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.glob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not loaded, (page, loaded)
    assert "Budget" in (tmp_path / "api.html").read_text()
