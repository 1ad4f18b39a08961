"""README, docs and changelog say what is so: commands, links, names, versions, families."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer.main

import dflash_mlx
from dflash_mlx.cli.app import app
from tests.tools.families import table

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_pages_give_them(page):
    commands = typer.main.get_command(app).commands
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if not words or Path(words[0]).name != "dflash-mlx":
                    continue
                command = commands[words[1]]
                # Options alone: a model that is named need not be here.
                known = {option for p in command.params for option in p.opts + p.secondary_opts}
                assert {word for word in words[2:] if word.startswith("-")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_imports_what_there_is(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dflash_mlx"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_pages_and_headings(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        # The suite runs on the wheel, without the package's own folder.
        if path.startswith("../dflash_mlx/"):
            continue
        to = page.parent / path if path else page
        assert to.exists(), link
        assert not anchor or anchor in anchors(to), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_version_is_one():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest.group(1) == dflash_mlx.__version__
    for page in PAGES:
        assert set(re.findall(r"dflash-mlx (\d+\.\d+\.\d+)", page.read_text())) <= {
            dflash_mlx.__version__
        }


def test_the_table_of_families_is_what_the_command_prints():
    assert table() in (ROOT / "docs" / "models.md").read_text()
