"""What a release needs beside the code: a citation of this version, completion of the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flatlab

ROOT = Path(__file__).resolve().parents[1]


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == flatlab.__version__


@pytest.mark.parametrize(("words", "expected"), [("flatlab re", "report"), ("flatlab report --sto", "--store")])
def test_the_shell_completes_commands_and_options(words, expected):
    given = {"_FLATLAB_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    line = [sys.executable, "-c", "from flatlab.cli import main; main()"]
    done = subprocess.run(line, env={**os.environ, **given}, capture_output=True, text=True, timeout=100)
    assert expected in done.stdout.split()


def test_the_pages_of_the_documentation_are_all_in_its_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    named = index.partition("```{toctree}")[2].partition("```")[0].split()
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} == {*named[2:]} - {"api"}
