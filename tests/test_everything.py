"""`reproduce all`: what several figures need is done once, one table at the end, and a failure keeps no other back."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from commandline import call, documented

from analyses import fig4
from flatlab import reproduce
from flatlab.cli.run_jobs import by_stem
from flatlab.errors import UserError
from flatlab.figure_files import in_order

NAMES = ["table2", "fig4", "fig9"]
WORDS = ("--setting", "smoke", "--held-out", "rot0", "--seeds", "1", "--json")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(reproduce, "analyses", lambda: NAMES)


def places(root):
    return ("--store", root / "runs", "--out", root / "figures")


def answered(capsys):
    return pd.DataFrame(json.loads(capsys.readouterr().out))


@pytest.mark.slow
def test_all_are_made_listed_in_one_table_and_resumed(few, tmp_path, capsys):
    assert call("list", "--setting", "smoke", "--held-out", "rot0", "--seeds", "1", "--json", "--store", tmp_path) == 0
    before = answered(capsys).set_index("name")["missing"]
    assert before["fig4"] == "2 to train" and before["fig9"] == "2 to train, 3 to measure"
    assert before["table2"].endswith("to train") and list(before.index) == ["fig4", "fig9", "table2"]
    assert call("reproduce", "all", *WORDS, *places(tmp_path)) == 0
    told = pd.DataFrame(documented("reproduce all", capsys.readouterr().out)).set_index("name")
    assert list(told.index) == ["fig4", "fig9", "table2"] and set(told.made) == {"yes"}
    assert (told.trained > 0).all() and told.measured["fig9"] > 0 == told.measured["fig4"]
    assert told["against the paper"]["fig4"] == ""  # the paper printed no numbers of these data
    for name in NAMES:
        assert str(tmp_path / "figures" / f"{name}.pdf") in told.written[name]
    assert all(Path(path).exists() for paths in told.written for path in paths)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("done")}
    assert call("reproduce", "all", *WORDS, *places(tmp_path)) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("done")} == done
    again = answered(capsys).set_index("name")
    assert set(again.made) == {"yes"}
    for name in NAMES:
        suffixes = {"written": ("csv", "json"), "unchanged": ("pdf", "png", "md")}
        for column, found in suffixes.items():
            paths = [str(tmp_path / "figures" / f"{name}.{suffix}") for suffix in found]
            assert [path for path in again[column][name] if not path.endswith(".npz")] == paths
    assert call("list", *WORDS, "--store", tmp_path / "runs") == 0
    assert set(answered(capsys).missing) == {"nothing"}
    assert call("reproduce", "all", *WORDS[:-1], *places(tmp_path)) == 0
    written, unchanged = capsys.readouterr().err.splitlines()[-2:]
    assert written.startswith(f"Written: {tmp_path / 'figures' / 'fig4.{csv,json}'}, ") and "table2.{" in written
    assert unchanged.startswith(f"Unchanged: {tmp_path / 'figures' / 'fig4.{md,pdf,png}'}, ") and "table2." in unchanged


def test_the_files_of_one_name_are_listed_together():
    given = [Path("a/fig3.pdf"), Path("a/fig3.csv"), Path("b/fig3.png"), Path("a/fig3.json")]
    assert by_stem(given) == [Path("a/fig3.{csv,json,pdf}"), Path("b/fig3.png")]


def test_those_made_alone_are_named_so_and_not_in_all(few, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(fig4, "FIGURE", replace(fig4.FIGURE, alone=True))
    assert call("list", "--setting", "smoke", "--json", "--store", tmp_path) == 0
    assert dict(answered(capsys).set_index("name")["in all"]) == {"fig4": "no", "fig9": "yes", "table2": "yes"}
    assert list(reproduce.in_all()) == ["fig9", "table2"]


@pytest.mark.slow
def test_what_cannot_be_made_keeps_nothing_else_back(few, tmp_path, capsys, monkeypatch):
    def broken(store, setting):
        raise UserError("Figure 4 is broken.")

    monkeypatch.setattr(fig4, "FIGURE", replace(fig4.FIGURE, table=broken))
    monkeypatch.setattr(reproduce, "analyses", lambda: ["fig4", "table2"])
    assert call("reproduce", "all", *WORDS, *places(tmp_path)) == 2
    said = capsys.readouterr()
    assert [row["made"] for row in json.loads(said.out)] == ["no", "yes"]
    assert "fig4: Figure 4 is broken." in said.err


def test_a_dry_run_counts_what_is_shared_once(few, tmp_path, capsys):
    assert call("reproduce", "all", "--dry-run", *WORDS, *places(tmp_path)) == 0
    names = [job["name"] for job in json.loads(capsys.readouterr().out)["jobs"]]
    assert sum(name.startswith("train erm on rot0") for name in names) == 1
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    "words",
    [
        "fig12 --held-out rot0",
        "fig4 --held-out rot0,rot45",
        "fig3 --quantize-at 120",
        "table9 --bits 7",
        "fig3 --seeds 3 --steps 300 --sam-rho 0.05",
    ],
)
def test_an_option_that_equals_the_default_is_accepted(tmp_path, words):
    assert call("reproduce", *words.split(), "--dry-run", "--json", "--store", tmp_path) == 0


@pytest.mark.parametrize(
    "words",
    ["table9 --bits 4", "fig3 --controls", "table12 --test-share 0.3", "fig6 --sam-rho 0.1", "fig8 --swad-every 5"],
)
def test_an_option_without_effect_at_any_value_is_refused(tmp_path, capsys, words):
    name, option, *_ = words.split()
    assert call("reproduce", *words.split(), "--dry-run", "--json", "--store", tmp_path) == 2
    assert f"{option} does nothing for {name}; leave it out." in capsys.readouterr().err


def test_figures_come_in_the_order_of_their_numbers():
    assert sorted(["fig10", "table1", "fig2", "surface"], key=in_order) == ["fig2", "fig10", "surface", "table1"]
