"""The files of a figure or table: csv, arrays and json, from which alone pictures and page are made.

The arrays are an npz, for figures with maps or histograms. The json states the hashes of both and of its own text, so
that no picture or page is made from a damaged or altered file, or from another figure's; and those of the pictures and
the page, so that they are drawn anew only if something changed.
"""

import hashlib
import io
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from flatlab import environment, files, plots
from flatlab.analysis import Analysis
from flatlab.errors import UserError
from flatlab.report import tables

PUBLISHED = "As published: other data or another protocol than ours, so that neither values nor order are compared"
ACCURACIES = "Accuracies by training-domain validation, means over held-out domains and seeds"
SHEET = "; percent, ± standard error over seeds"
STARRED = "; differences with 95 % intervals, each alone; * p < 0.05 after Holm over the methods"
DATA = (".csv", ".npz")
DRAWN = (".pdf", ".png", ".md")
DRAWING = ("matplotlib", "pandas", "seaborn")  # packages whose versions change a picture
WORDS = ("dataset", "method", "held_out", "panel", "measure", "layer", "part")  # columns that are text, even of digits
REFERENCE = "reference"  # the folder of the files that the repository keeps
MOST_BYTES = 150_000  # of a picture that the repository keeps
TESTS = re.compile(r"\d+ famil(y|ies) of ")  # in the sentence that follows those of a page's primary tests
INDEX = (
    "What each figure and table shows, in the words of its page. `flatlab reproduce NAME --reference` writes both. "
    "Titles name the paper's figure with its data; the runs here are of the embedded digits."
)


def write_data(stem: Path, frame: pd.DataFrame, arrays: files.Arrays, record: Mapping[str, Any]) -> list[Path]:
    """Write the data and the text of a figure: `<stem>.csv`, `<stem>.npz` if there are arrays, and `<stem>.json`.

    Args:
        stem: path without suffix.
        frame: the table.
        arrays: drawn in addition to the table.
        record: text of the page, and origin of the numbers.

    Returns:
        The files.
    """
    contents = {".csv": frame.to_csv(index=False).encode()}
    if arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        contents[".npz"] = buffer.getvalue()
    else:
        stem.with_suffix(".npz").unlink(missing_ok=True)
    last = _last_drawn(stem)
    for suffix, content in contents.items():
        files.write_bytes(stem.with_suffix(suffix), content)
    hashes = {suffix: hashlib.sha256(content).hexdigest() for suffix, content in contents.items()}
    files.write_record(stem.with_suffix(".json"), {**record, "name": stem.name, "sha256": hashes, "drawn": last})
    return [stem.with_suffix(suffix) for suffix in (*contents, ".json")]


def read_data(stem: Path) -> tuple[pd.DataFrame, files.Arrays, dict[str, Any]]:
    """Read what `write_data` wrote.

    Args:
        stem: path without suffix.

    Raises:
        UserError: if a file is missing, damaged, altered or of another figure; names it.
    """
    remedy = f"Make the figure with `flatlab reproduce {stem.name}`."
    record = _record(stem.with_suffix(".json"), remedy)
    contents = {}
    for suffix, expected in record["sha256"].items():
        path = stem.with_suffix(suffix)
        contents[suffix] = _bytes(path, remedy)
        if hashlib.sha256(contents[suffix]).hexdigest() != expected:
            raise UserError(f"{path} is damaged or of another figure: {stem.name}.json states another hash. {remedy}")
    frame = pd.read_csv(
        io.BytesIO(contents[".csv"]),
        dtype=dict.fromkeys(WORDS, str),
        keep_default_na=False,
        na_values=[""],
        low_memory=False,
    )
    return frame, _arrays(contents.get(".npz")), record


def _record(path: Path, remedy: str) -> dict[str, Any]:
    _bytes(path, remedy)
    try:
        record = files.read_record(path)
        name, whole = record["name"], set(record["sha256"]) <= {*DATA} and ".csv" in record["sha256"]
    except (UserError, TypeError, KeyError):
        raise UserError(f"{path} is damaged, altered or of another version of flatlab. {remedy}") from None
    if name != path.stem or not whole:
        raise UserError(f"{path} is of another figure, {name}. {remedy}")
    return record


def _bytes(path: Path, remedy: str) -> bytes:
    if not path.is_file():
        raise UserError(f"{path} is missing. {remedy}")
    return path.read_bytes()


def _arrays(content: bytes | None) -> files.Arrays:
    if content is None:
        return {}
    with np.load(io.BytesIO(content), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def draw(figure: Analysis, stem: Path) -> tuple[list[Path], pd.DataFrame, dict[str, Any]]:
    """Draw the picture and write the page from a figure's data; the json states their hashes afterwards.

    Args:
        figure: the figure or table.
        stem: path without suffix of its data.

    Returns:
        The files that were written, the findings, and the record of the json.
    """
    frame, arrays, record = read_data(stem)
    findings = figure.findings(frame)
    contents = plots.rendered(figure.draw(frame, record["caption"], arrays))
    contents[".md"] = _page(figure, frame, findings, record).encode()
    for suffix, content in contents.items():
        files.write_bytes(stem.with_suffix(suffix), content)
    drawn = {suffix: hashlib.sha256(content).hexdigest() for suffix, content in contents.items()}
    drawn["of"] = _origin(figure, record) if _as_loaded(figure) else ""
    written = [stem.with_suffix(suffix) for suffix in contents]
    if record.get("drawn") != drawn:
        record["drawn"] = drawn
        written.append(stem.with_suffix(".json"))
        files.write_record(written[-1], record)
    return written, findings, record


def unchanged(figure: Analysis, stem: Path) -> list[Path]:
    """Return pictures and page if `draw` made them of these data with this code and they are as it left them.

    Args:
        figure: the figure or table.
        stem: path without suffix of its data.

    Returns:
        The three files; none if one of them is missing or altered, or if data, text or code are others.
    """
    record = files.read_record(stem.with_suffix(".json"))
    drawn, made = record["drawn"], [stem.with_suffix(suffix) for suffix in DRAWN]
    if not (origin := _origin(figure, record)) or drawn.get("of") != origin:
        return []
    same = all(path.is_file() and files.file_hash(path) == drawn[path.suffix] for path in made)
    return made if same else []


def _origin(figure: Analysis, record: Mapping[str, Any]) -> str:
    """Return a hash of what pictures and page are made of: data and text in the json, and code; "" if unknown."""
    text, code = files.strict_json({name: value for name, value in record.items() if name != "drawn"}), source(figure)
    return hashlib.sha256((text + code).encode()).hexdigest() if code else ""


def source(figure: Analysis) -> str:
    """Return a hash of the code that draws a figure as it was loaded; "" for a cell of a notebook, which has no file.

    Called when the figure is loaded: its source may be edited while it is trained, and the code of before draws it.
    """
    folder = _folder(figure)
    return _loaded(folder) if folder else ""


def _as_loaded(figure: Analysis) -> bool:
    """Whether the code on disk is still that which draws."""
    folder = _folder(figure)
    return folder is not None and environment.code(folder, DRAWING) == _loaded(folder)


def _folder(figure: Analysis) -> Path | None:
    file = getattr(sys.modules[figure.module], "__file__", None)
    return Path(file).parent if file else None


@cache
def _loaded(folder: Path) -> str:
    return environment.code(folder, DRAWING)


def _last_drawn(stem: Path) -> dict[str, str]:
    """Return what the json states of pictures and page; nothing if it is missing, altered or of another figure."""
    try:
        return dict(_record(stem.with_suffix(".json"), "").get("drawn", {}))
    except UserError:
        return {}


def accuracies(record: Mapping[str, Any]) -> pd.DataFrame:
    """Return the accuracies in a json, in the order of their columns."""
    rows = [{key: float("nan") if v is None else v for key, v in row.items()} for row in record["accuracies"]]
    return pd.DataFrame(rows, columns=record["columns"])


def _page(figure: Analysis, frame: pd.DataFrame, findings: pd.DataFrame, record: Mapping[str, Any]) -> str:
    """Return the findings as a page in markdown."""
    title, notes = plots.title_and_notes(record["caption"])
    opening = figure.opening(findings)
    parts = [f"# {title}", figure.title, notes, *opening]
    parts += [f"## {figure.summary_title}", tables.markdown(figure.summary(findings))]
    unit = SHEET if figure.sheet else STARRED
    parts += [
        f"## {figure.sheet_title or ACCURACIES + unit}",
        tables.markdown(accuracies(record)),
        *(remark for remark in record["remarks"] if remark not in opening),
        *_published(figure, frame),
    ]
    parts.append(f"Again: `{record['redo']}`{_made_on(record['machines'])}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _made_on(machines: Iterable[Mapping[str, str]]) -> str:
    """Return a sentence on the processors that trained and measured; empty if nothing was."""
    made = dict.fromkeys(f"{each['processor']} with torch {each['torch']}" for each in machines)
    where = f". Made on {', '.join(made)}; another kind of processor rounds differently, so that its trainings differ."
    return where if made else ""


def _published(figure: Analysis, frame: pd.DataFrame) -> list[str]:
    """Return a block of the paper's numbers, if none is comparable with ours: other data, or another protocol."""
    if not figure.as_published or frame["comparable"].any():
        return []
    return [f"## {PUBLISHED}", tables.markdown(figure.as_published())]


def keep(figure: Analysis, stem: Path, folder: Path) -> list[Path]:
    """Write the files of a drawn figure that the repository keeps: its page, a small png, and the csv rows over seeds.

    For a figure without rows over seeds the csv is the table of its page.

    Args:
        figure: the figure or table.
        stem: path without suffix of its files.
        folder: receives the three files.
    """
    frame, _, _ = read_data(stem)
    rows = frame[frame["over"] == "seeds"] if "over" in frame else frame.head(0)
    rows = figure.summary(figure.findings(frame)) if rows.empty else rows.dropna(axis="columns", how="all")
    folder.mkdir(parents=True, exist_ok=True)
    page, picture, table = (folder / f"{stem.name}{suffix}" for suffix in (".md", ".png", ".csv"))
    files.write_bytes(page, stem.with_suffix(".md").read_bytes())
    files.write_bytes(table, rows.to_csv(index=False).encode())
    files.write_bytes(picture, _reduced(stem.with_suffix(".png")))
    return [page, picture, table, _index(folder)]


def _index(folder: Path) -> Path:
    """Write README.md: for each page of the folder its title and its sentences up to those of its first tests."""
    names = sorted((path.stem for path in folder.glob("*.md") if path.stem != "README"), key=in_order)
    lines = ["# Reference figures and tables", INDEX]
    for name in names:
        _, title, *rest = (folder / f"{name}.md").read_text().split("\n\n")
        ends = [i for i, part in enumerate(rest) if TESTS.search(part)]
        parts = rest[1 : ends[0]] if ends else []  # the first: notes
        found = [part for part in parts if not part.startswith(("#", "|"))]
        lines += [f"## [{name}]({name}.md)", title, *(f"- {part}" for part in found)]
    index = folder / "README.md"
    files.write_bytes(index, ("\n\n".join(lines) + "\n").encode())
    return index


def in_order(name: str) -> list[Any]:
    """Return the key that sorts fig2 before fig10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _reduced(path: Path) -> bytes:
    """Return a png of the same pixels in the largest palette that fits into `MOST_BYTES`, at most 256 colours.

    Maximum coverage bounds the error of each pixel; median cut leaves coloured streaks in photographs.

    Args:
        path: a png.

    Raises:
        UserError: if 16 colours are too many.
    """
    with Image.open(path, formats=["PNG"]) as picture:
        whole = picture.convert("RGB")
    for colours in (256, 128, 64, 32, 16):
        buffer = io.BytesIO()
        whole.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
        if buffer.tell() < MOST_BYTES:
            return buffer.getvalue()
    raise UserError(f"{path} must have fewer pixels: at 16 colours it has {buffer.tell():,} bytes.")
