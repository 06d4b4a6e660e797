"""What the README quotes from a page stands in that page, word for word and number for number."""

import re
import shutil
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from flatlab import figure_files

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- from (figures/reference/[\w./-]+) -->\n(.*?)(?:\n\s*\n|\Z)", re.DOTALL)
MARKER = re.compile(r"<!-- from\b")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?= ?(?:%|nats|points)(?!\w))")


def blocks(readme):
    """Return the quoted blocks: the file that each names, and its lines."""
    return [(name, [line.strip() for line in text.splitlines()]) for name, text in BLOCK.findall(readme)]


def faults(readme, root):
    """Return what is quoted and is not in the named file: whole lines, and numbers with a unit.

    A line must occur as it is, but for the marker of a quotation or an item.
    """
    found = []
    if len(MARKER.findall(readme)) != len(blocks(readme)):
        found.append("a marker without a file or a block")
    for name, lines in blocks(readme):
        page = (root / name).read_text() if (root / name).is_file() else ""
        found += [f"{name}: {line}" for line in lines if re.sub(r"^[>*-] ", "", line) not in page]
        found += [f"{name}: {number}" for line in lines for number in NUMBER.findall(line) if number not in page]
    return found


@pytest.mark.parametrize("name", ["README.md", "docs/trust.md"])
def test_the_readme_quotes_its_pages(name):
    readme = (ROOT / name).read_text()
    assert faults(readme, ROOT) == []
    assert blocks(readme) or not (ROOT / "figures" / "reference").is_dir()


@pytest.mark.parametrize(
    ("quoted", "count"),
    [
        ("> SAM is flatter than ERM (-0.104 nats).", 0),
        ("| SAM | -0.104 |\n- SAM is flatter than ERM (-0.104 nats).", 0),
        ("> SAM is sharper than ERM (-0.104 nats).", 1),
        ("> SAM is flatter than ERM (-0.105 nats).", 2),
    ],
)
def test_another_word_or_number_is_a_fault(tmp_path, quoted, count):
    page = tmp_path / "figures" / "reference" / "fig3.md"
    page.parent.mkdir(parents=True)
    page.write_text("| SAM | -0.104 |\n\nSAM is flatter than ERM (-0.104 nats).\n")
    assert len(faults(f"# A\n\n<!-- from figures/reference/fig3.md -->\n{quoted}\n\nMore.\n", tmp_path)) == count


def test_a_marker_without_a_page_is_a_fault(tmp_path):
    assert faults("<!-- from figures/reference/no.md -->\nA line.\n", tmp_path)
    assert faults("<!-- from elsewhere -->\nA line.\n", tmp_path)


PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "figures/reference").rglob("*.md")))]


@pytest.mark.parametrize("name", PAGES)
def test_the_stars_of_tests_are_not_read_as_emphasis(name):
    """A pair of stars around an interval would vanish in italics when the page is rendered."""
    html = MarkdownIt().render((ROOT / name).read_text())
    assert not [part for part in re.findall(r"<em>(.*?)</em>", html, re.DOTALL) if "[" in part]


def test_the_index_of_the_reference_figures_is_made_of_their_pages_and_has_what_came_out(tmp_path):
    folder = ROOT / "figures" / "reference"
    for page in folder.glob("*.md"):
        shutil.copy(page, tmp_path)
    index = figure_files._index(tmp_path).read_text()
    assert index == (folder / "README.md").read_text()
    without = [section.partition("]")[0] for section in index.split("\n## [")[1:] if "\n- " not in section]
    assert without == []
