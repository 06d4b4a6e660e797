"""Every figure and table through `reproduce`, at SMOKE; and what Figure 3's table says of hand-made measurements."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import commandline
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image
from test_architecture import without_torch

from analyses import _rows, fig3, study, table4
from flatlab import environment, figure_files, files, plots, reproduce
from flatlab.analysis import Analysis
from flatlab.errors import UserError
from flatlab.resources import published
from flatlab.specs.settings import PAPER, SMOKE

pytestmark = pytest.mark.timeout(900)  # fixtures make figures
FEW = ("fig2", "fig3", "fig8", "table4")
REDRAW = "from flatlab.cli import main; main(sys.argv[1:])"
COLUMNS = ["panel", "normalisation", "method", "held_out", "seed", "radius"]
COLUMNS += ["value", "stderr", "low", "high", "over", "published", "rise", "base_loss", "chance"]


def _made(root, names):
    """Make figures; return their folder, the words of the command and the exit codes."""
    words = ("--setting", "smoke", "--store", root / "runs", "--out", root / "figures")
    fewer = ("--held-out", "rot0")  # but for Figure 3, whose runs hold theirs, and Figure 12, which shows rot0 anyway
    codes = {}
    for name in names:
        own = () if name in ("fig3", "fig12") else fewer
        own += ("--seeds", "1") if reproduce.analysis(name).alone else ()
        codes[name] = commandline.call("reproduce", name, *words, *own)
    return root, words, codes


@pytest.mark.slow
def test_a_study_is_finished_from_the_rows_of_a_store_that_is_gone(tmp_path):
    there = ("QT-DoG", "freeze", "SAM")
    words = ("--setting", "smoke", "--seeds", "1", "--held-out", "rot0")

    def made(name, *names, rows=()):
        left = ",".join(method for method in study.ORDER if method not in names)
        own = ("--store", tmp_path / name, "--out", tmp_path / name, "--leave-out", left)
        assert commandline.call("reproduce", "study", *words, *own, *rows) == 0
        frame = pd.read_csv(tmp_path / name / "study.csv")
        return frame, frame[frame["over"] == "run"].set_index(["method", "measure", "held_out"])["value"].sort_index()

    rows = tmp_path / "runs.csv"
    whole, each = made("whole", "ERM", *there)
    _rows.wide(whole[whole["method"].isin(("ERM", "QT-DoG"))]).to_csv(rows, index=False)
    assert commandline.call("train", *words, "--method", "erm", "--store", tmp_path / "again") == 0
    _, joined = made("again", "freeze", "SAM", rows=("--rows", rows))
    pd.testing.assert_series_equal(joined, each, rtol=1e-9)
    facts = json.loads((tmp_path / "again" / "study.json").read_text())
    assert facts["rows"] == {"sha256": files.file_hash(rows), "runs_on_page": 4} and len(facts["runs"]) == 2
    own = ("--store", tmp_path / "again", "--out", tmp_path / "other", "--leave-out", "ERM,QT-DoG")
    for changed in (("--trial-seed", 5), ("--lr", 0.1)):
        assert commandline.call("reproduce", "study", *words, *own, *changed, "--rows", rows, "--dry-run") == 2
    page = (tmp_path / "again" / "study.md").read_text()
    assert "From rows of an earlier store: ERM, QT-DoG." in page
    assert "Left out: SWA, SWAD, SMA, strong SAM, QT-DoG 4 bits, release-parity, noise." in page


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A store and the pictures of a few analyses."""
    return _made(tmp_path_factory.mktemp("few"), FEW)


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True], ids=["of all", "alone"])
def test_every_figure_is_made_and_drawn_again_from_its_files_alone(tmp_path_factory, tmp_path, alone):
    names = [name for name in reproduce.analyses() if reproduce.analysis(name).alone is alone]
    root, _, codes = _made(tmp_path_factory.mktemp("all"), names)
    assert codes and set(codes.values()) == {0}
    for name in codes:
        for suffix in ("pdf", "png", "csv", "json", "md"):
            assert (root / "figures" / f"{name}.{suffix}").stat().st_size > 400
        assert (root / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    data = [path for path in (root / "figures").iterdir() if path.suffix in (".csv", ".npz", ".json")]
    for path in data:
        shutil.copy(path, tmp_path / path.name)
    for name in names if alone else ["all"]:
        without_torch(REDRAW, "reproduce", name, "--draw-only", "--reference", "--out", tmp_path)
    for name in codes:
        for suffix in ("png", "pdf", "md"):
            made, again = (folder / f"{name}.{suffix}" for folder in (root / "figures", tmp_path))
            assert made.read_bytes() == again.read_bytes(), again.name
    assert {path: path.read_bytes() for path in data} == {path: (tmp_path / path.name).read_bytes() for path in data}
    drawn_from_arrays = {path.stem for path in data if path.suffix == ".npz"}
    assert drawn_from_arrays == (set() if alone else {f"fig{number}" for number in (2, 6, 7, 8, 9, 10, 11, 12)})
    _check_reference(tmp_path / "reference", names)


def _check_reference(folder, names):
    """Three small files for each figure, and no row of a single run."""
    kept = list(folder.iterdir())
    files = {f"{name}.{suffix}" for name in names for suffix in ("md", "png", "csv")}
    assert {path.name for path in kept} == files | {"README.md"}
    index = (folder / "README.md").read_text()
    assert all(f"## [{name}]({name}.md)" in index for name in names)
    assert ("Mean of F up to" in index) is ("fig3" in names)
    assert sum(path.stat().st_size for path in kept) < 5e6
    for name in names:
        rows = pd.read_csv(folder / f"{name}.csv")
        assert (folder / f"{name}.png").stat().st_size < 150_000
        with Image.open(folder / f"{name}.png") as picture, Image.open(folder.parent / f"{name}.png") as whole:
            assert picture.size == whole.size and picture.mode == "P"
        assert len(rows) and set(rows.get("over", ["seeds"])) == {"seeds"} and "run" not in rows


@pytest.fixture
def one(smoke, tmp_path):
    """A figure's files, to be damaged."""
    for path in (smoke[0] / "figures").glob("fig2.*"):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path


def refused(capsys, folder, *more):
    capsys.readouterr()
    assert commandline.call("reproduce", "fig2", "--draw-only", "--out", folder, *more) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["csv", "npz", "json"])
def test_a_missing_file_is_named(one, capsys, suffix):
    (one / f"fig2.{suffix}").unlink()
    assert f"fig2.{suffix} is missing. Make the figure with `flatlab reproduce fig2`" in refused(capsys, one)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_a_damaged_file_is_named_and_nothing_is_drawn(one, capsys, suffix):
    path, picture = one / f"fig2.{suffix}", (one / "fig2.png").read_bytes()
    path.write_bytes(path.read_bytes()[:-40])
    assert f"fig2.{suffix} is damaged or of another figure" in refused(capsys, one)
    assert (one / "fig2.png").read_bytes() == picture


@pytest.mark.parametrize("field", ["caption", "remarks", "accuracies", "setting"])
def test_a_record_that_was_altered_is_refused_and_named(tmp_path, field):
    record = {"caption": "a", "remarks": ["cannot be told"], "accuracies": [{"ERM": 90.5}], "setting": {"lr": 0.1}}
    written = figure_files.write_data(tmp_path / "fig2", pd.DataFrame({"value": [1.0]}), {}, record)
    assert [path.name for path in written] == ["fig2.csv", "fig2.json"]
    found = figure_files.read_data(tmp_path / "fig2")[2]
    assert {name: found[name] for name in record} == record
    text = json.loads((tmp_path / "fig2.json").read_text())
    (tmp_path / "fig2.json").write_text(json.dumps({**text, field: "supported"}))
    with pytest.raises(UserError, match=r"fig2\.json is damaged, altered or of another version .* reproduce fig2"):
        figure_files.read_data(tmp_path / "fig2")


@pytest.fixture
def dots(tmp_path, monkeypatch):
    """Write the files of a figure, and say which of its pictures and page were left as they are."""
    analyses = tmp_path / "analyses"
    analyses.mkdir()
    (analyses / "dots.py").write_text("")
    monkeypatch.setitem(sys.modules, "analyses.dots", SimpleNamespace(__file__=str(analyses / "dots.py")))

    def draw(frame, caption, _):
        figure, ax = plt.subplots()
        ax.plot(frame["value"], "o")
        return figure

    figure_files._loaded.cache_clear()
    empty = pd.DataFrame({"a": [1]})
    given = {"labelled": list, "table": list, "summary_title": "S", "remarks": list, "caption": str, "draw": draw}
    given |= {"findings": lambda frame: empty, "summary": lambda findings: empty, "baseline": "ERM"}
    figure = Analysis(module="analyses.dots", doc="Dots.", **given)

    def made(value=1.0, *, restarted=False, **more):
        if restarted:
            figure_files._loaded.cache_clear()
        record = {
            "caption": "Dots\nnotes",
            "remarks": [],
            "accuracies": [],
            "columns": ["a"],
            "redo": "x",
            "machines": [],
        }
        stem = tmp_path / "out" / "dots"
        stem.parent.mkdir(exist_ok=True)
        figure_files.write_data(stem, pd.DataFrame({"value": [value]}), {}, {**record, **more})
        kept = figure_files.unchanged(figure, stem)
        kept or figure_files.draw(figure, stem)
        return {path.suffix for path in kept}

    return made


def test_pictures_and_page_are_left_only_if_nothing_changed_that_they_are_made_of(dots, tmp_path, monkeypatch):
    every = {".pdf", ".png", ".md"}
    assert dots() == set() and dots() == every == dots()
    for change in ({"value": 2.0}, {"caption": "Other\nnotes"}, {"remarks": ["Nothing can be told."]}, {"redo": "y"}):
        assert dots(**change) == set() and dots(**change) == every
        assert dots() == set() and dots() == every  # back: drawn of other data since
    (tmp_path / "analyses" / "dots.py").write_text("# another colour")
    assert dots(restarted=True) == set() and dots() == every
    (tmp_path / "analyses" / ".#dots.py").symlink_to("nowhere")  # an editor's lock
    assert dots(restarted=True) == every
    monkeypatch.setattr("flatlab.environment.version", lambda name: f"another {name}")
    assert dots(restarted=True) == set() and dots() == every
    monkeypatch.setitem(sys.modules, "analyses.dots", SimpleNamespace())  # as in a notebook, whose cells may change
    assert dots(restarted=True) == set() == dots()


def test_pictures_of_a_source_that_is_edited_meanwhile_are_drawn_again(dots, tmp_path):
    assert dots() == set()
    (tmp_path / "analyses" / "dots.py").write_text("# another colour, not loaded")
    assert dots(value=2.0) == set() == dots(value=2.0)  # by the code of before, but the file is another one
    assert dots(value=2.0, restarted=True) == set() and dots(value=2.0) == {".pdf", ".png", ".md"}


def test_files_that_another_call_has_written_meanwhile_are_drawn_again(dots, tmp_path, monkeypatch):
    write, path = files.write_bytes, tmp_path / "out" / "dots.png"

    def late(to, content):
        write(to, b"of another call" if to == path else content)

    monkeypatch.setattr("flatlab.files.write_bytes", late)
    assert dots() == set() == dots() and path.read_bytes() == b"of another call"


def test_the_hash_of_the_code_covers_published_numbers():
    own = {path.name for path in environment.own_files()}
    assert {"published.json", "plots.py", "figure_files.py"} <= own and not any(name.endswith(".pyc") for name in own)


def test_a_matplotlibrc_changes_no_picture():
    def drawn():
        with plots.style():
            figure, ax = plt.subplots()
            ax.plot([1, 2])
        return plots.rendered(figure)[".png"]

    plain = drawn()
    with plt.rc_context({"axes.facecolor": "red", "savefig.facecolor": "red", "lines.linewidth": 9.0}):
        assert drawn() == plain


@pytest.mark.parametrize("name", ["dots.pdf", "dots.png", "dots.md"])
def test_a_picture_or_page_that_was_altered_or_lost_is_drawn_again(dots, tmp_path, name):
    path = tmp_path / "out" / name
    dots()
    drawn = path.read_bytes()
    for spoil in (lambda: path.write_bytes(drawn + b"x"), path.unlink):
        spoil()
        assert dots() == set() and path.read_bytes() == drawn


def test_pictures_are_drawn_again_if_the_record_of_them_was_altered_or_lost(dots, tmp_path):
    path = tmp_path / "out" / "dots.json"
    dots()
    text = path.read_text()
    for spoiled in (text.replace("notes", "Notes"), "{}", text.replace('"drawn"', '"gone"')):
        path.write_text(spoiled)
        assert dots() == set() and path.read_text() == text and len(dots()) == 3


@pytest.mark.slow
def test_drawing_again_lists_what_it_wrote(one, capsys):
    before = {path: path.stat().st_mtime_ns for path in one.iterdir()}
    capsys.readouterr()
    assert commandline.call("reproduce", "fig2", "--draw-only", "--json", "--out", one) == 0
    written = {Path(name) for name in json.loads(capsys.readouterr().out)["written"]}
    assert written == {path for path in one.iterdir() if path.stat().st_mtime_ns != before.get(path)}
    assert {path.suffix for path in written} == {".pdf", ".png", ".md"}


@pytest.mark.slow
def test_files_of_another_figure_are_refused(smoke, one, capsys):
    shutil.copy(smoke[0] / "figures" / "fig8.csv", one / "fig2.csv")
    assert "fig2.csv is damaged or of another figure" in refused(capsys, one)
    shutil.copy(smoke[0] / "figures" / "fig8.json", one / "fig2.json")
    assert "fig2.json is of another figure, fig8" in refused(capsys, one)
    (one / "fig2.json").write_text("[]")
    assert "fig2.json is damaged" in refused(capsys, one)


@pytest.mark.slow
def test_what_the_store_is_for_does_nothing_where_a_figure_is_only_drawn(one, capsys):
    assert "--seeds does nothing with --draw-only" in refused(capsys, one, "--seeds", "2")


@pytest.mark.slow
def test_other_data_are_kept_in_a_folder_of_their_own(smoke, tmp_path):
    assert reproduce._own_folder({"dataset": "PACS", "model": "resnet50"}) == "pacs-resnet50"
    assert reproduce._own_folder(SMOKE.model_dump()) == ""


def test_every_analysis_keeps_the_contract():
    for name in reproduce.analyses():
        figure = reproduce.analysis(name)
        assert isinstance(figure, Analysis) and figure.name == name and figure.title.endswith(".")
        runs, measured = figure.plan(SMOKE)
        assert {run for run, _ in measured} <= {*runs} and figure.baseline in dict(figure.labelled(SMOKE))


@pytest.mark.slow
def test_a_second_call_makes_nothing_and_writes_the_same(smoke, capsys):
    root, words, _ = smoke
    before = {path: path.read_bytes() for path in (root / "figures").iterdir() if path.suffix != ".json"}
    done = {path: path.stat().st_mtime_ns for path in (root / "runs").rglob("done")}
    assert commandline.call("reproduce", "fig3", *words, "--json") == 0
    assert commandline.documented("reproduce NAME", capsys.readouterr().out)["written"]
    assert {path: path.read_bytes() for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in (root / "runs").rglob("done")} == done


@pytest.mark.slow
def test_figure_3_is_tidy(smoke):
    root, _, _ = smoke
    frame = pd.read_csv(root / "figures" / "fig3.csv")
    assert list(frame.columns) == [*COLUMNS, *fig3.DOMAINS]
    keys = ["panel", "normalisation", "method", "held_out", "seed", "radius"]
    assert not frame.duplicated(keys).any()
    each, whole = frame[frame.over == "directions"], frame[frame.over == "seeds"]
    assert set(whole.held_out) == set(whole.seed) == {"all"}
    assert len(each) == 5 * 4 * 2 * 2 * 2 * 4 and len(whole) == 5 * 2 * 2 * 4  # methods, targets, seeds, ...
    assert set(each.rise) == {0.0, *SMOKE.rises, SMOKE.beyond} and set(each.chance.round(3)) == {2.303}
    radii = each.groupby(["normalisation", "rise"]).radius.unique()
    assert radii.map(len).eq(1).all() and all(radius == float(f"{radius:.1e}") for (radius,) in radii)
    assert (frame[frame.radius == 0][["value", "stderr"]] == 0).all(axis=None)
    assert frame.published.isna().all()
    assert ((frame.low <= frame.value) & (frame.value <= frame.high)).all()
    one = each[(each.panel == "target") & (each.method == "SAM") & (each.normalisation == "none") & (each.rise == 0.5)]
    means = one.groupby("seed").value.mean()
    same = whole[(whole.panel == "target") & (whole.method == "SAM") & (whole.normalisation == "none")]
    assert same[same.radius == one.radius.iloc[0]].value.item() == pytest.approx(means.mean())


@pytest.mark.slow
def test_table_4_counts_the_rows_that_obc_serves_worse_than_rounding(smoke):
    frame = pd.read_csv(smoke[0] / "figures" / "table4.csv")
    noted = frame["rows_worse"].notna()
    assert (frame["method"][noted] == "OBC").all() and (frame["over"][noted] == "run").all()
    assert (frame["error"] < frame["error_nearest"])[noted].all() and (frame["rows"][noted] == 16 + 32 + 64).all()
    worse = [3.0, *[0.0] * (noted.sum() - 1)]
    told = table4.remarks(frame.assign(rows_worse=pd.Series(worse, index=frame.index[noted])))[-1]
    runs = len(frame[noted].drop_duplicates(["held_out", "seed"]))
    assert f"(3 of {112 * runs})" in told and told.endswith("have a larger one.")


@pytest.mark.slow
def test_the_json_states_the_provenance(smoke):
    root, _, _ = smoke
    record = json.loads((root / "figures" / "fig3.json").read_text())
    assert len(record["runs"]) == 40 and len(record["measurements"]) == 4 and len(record["data_fingerprint"]) == 1
    assert record["setting"]["name"] == "smoke" and record["redo"].startswith("flatlab")
    assert "digits" in record["caption"] and "2 seeds" in record["caption"] and "3 directions" in record["caption"]
    assert record["cost"]["training_seconds"] > 0 and record["machine"]["torch"]
    (made,) = record["machines"]
    page = (root / "figures" / "fig3.md").read_text()
    assert f"`{record['redo']}`. Made on {made['processor']} with torch {made['torch']};" in page
    verdicts = {"lower", "higher", "not distinguishable", "not read"}
    assert {row["verdict"] for row in record["findings"]} <= verdicts
    assert {row["correction"] for row in record["findings"]} == {"Holm"}
    pairs = {(row["method"], row["baseline"]) for row in record["findings"]}
    assert pairs == {("QT-DoG", other) for other in ("ERM", "SAM", "SWA", "SWAD")} | {
        (other, "ERM") for other in ("SAM", "SWA", "SWAD")
    }
    assert any("Holm" in remark for remark in record["remarks"])


def test_published_numbers_stand_beside_ours_where_the_setting_is_the_papers():
    rows = [
        {"panel": panel, "normalisation": kind, "method": "QT-DoG", "held_out": held_out, "radius": 40.0}
        for panel in ("source", "target")
        for kind in ("none", "filter")
        for held_out in ("all", "sketch")
    ]
    filled = fig3._with_published(pd.DataFrame(rows), PAPER)
    ours = filled[(filled.normalisation == "none") & (filled.held_out == "all")]
    curves = published()["figures"]["3"]
    at = curves["radii"].index(40)
    assert ours.published.tolist() == [curves["train"]["QT-DoG"][at], curves["test"]["QT-DoG"][at]]
    assert filled.published.notna().sum() == 2
    assert fig3._with_published(pd.DataFrame(rows), PAPER.replace(model="resnet18")).published.isna().all()
