"""What a release needs beside the code: its citation, completion of the command line, systems that are refused."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stores import refuses

import flatlab
from flatlab.cli import main
from flatlab.loading import data as loading

ROOT = Path(__file__).resolve().parents[1]


def cited(name):
    return re.search(rf'^(?:  - )?{name}: "?(.*?)"?$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]


def test_the_citation_is_of_this_version_as_the_changelog_has_it():
    version, date = re.search(r"^## \[(\d.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert cited("version") == version == flatlab.__version__ and cited("date-released") == date
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "flatlab/__init__.py"
    assert [cited("name")] == [each["name"] for each in project["project"]["authors"]]


def test_the_versions_of_python_that_are_claimed_are_tested():
    claimed = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    tested = re.search(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "test.yml").read_text())[1]
    assert [each.strip(' "') for each in tested.split(",")] == claimed


@pytest.mark.parametrize(("words", "expected"), [("flatlab re", "report"), ("flatlab report --sto", "--store")])
def test_the_shell_completes_commands_and_options(words, expected):
    given = {"_FLATLAB_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    line = [sys.executable, "-c", "from flatlab.cli import main; main()"]
    done = subprocess.run(line, env={**os.environ, **given}, capture_output=True, text=True, timeout=100)
    assert expected in done.stdout.split() and "Usage:" not in done.stdout


def test_the_pages_of_the_documentation_are_all_in_its_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    named = index.partition("```{toctree}")[2].partition("```")[0].split()
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} == {*named[2:]} - {"api"}


def test_windows_is_refused_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as end:
        main(["methods"])
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().endswith("must run on Linux or macOS, but this is Windows: run it in WSL.")


class OnMPS(torch.nn.Parameter):
    device = torch.device("mps")


def test_a_device_without_float64_is_refused():
    model = torch.nn.Linear(2, 2).eval()
    model.weight = OnMPS(model.weight.data)
    refuses(lambda: flatlab.Landscape(model, [(torch.ones(3, 2), torch.zeros(3, 2))], F.mse_loss), "mps", "model.cpu()")
    refuses(lambda: loading.device(flatlab.Place(device="mps")), "float64", "mps", "cpu or cuda")
