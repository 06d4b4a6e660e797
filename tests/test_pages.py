"""What pages and commands say of runs whose logs are written by hand: valleys, families of tests, published numbers."""

import json

import pandas as pd
import pytest
from commandline import call

from analyses import controls, fig4, table4, table12
from flatlab import reproduce
from flatlab.measure.runner import FUNCTIONS
from flatlab.report import tables
from flatlab.specs.measurements import KINDS
from flatlab.specs.methods import METHODS, RELEASED, replicates
from flatlab.specs.settings import SMOKE
from flatlab.store.runs import RunStore

ONE = SMOKE.replace(held_out=("rot0",))
NONE = {"start": None, "end": None, "threshold": None, "dead": False, "merged": [0, 1], "span": [0, 10]}


def row(spec, index):
    """A log's row; of SWAD's first seed no valley began."""
    found = {"step": spec.steps, "validation": 0.97, "test": {"rot15": {"accuracy": 0.9 + 0.001 * index}}}
    found["target"] = {part: {"accuracy": 0.8 + 0.01 * (index % 7)} for part in ("in", "out")}
    if spec.average.kind == "swad":
        begun = {**NONE, "start": 2, "end": 10, "threshold": 0.5, "span": [2, 10]}
        found["valley"] = NONE if spec.seed == 0 else begun
    if spec.derived:
        found["layers"] = {"a": {"error": 1.0, "error_nearest": 2.0, "rows": 3, "rows_worse": 1}}
    return found


def written(root, runs):
    store = RunStore(root)
    for index, spec in enumerate(runs):
        run = store.run(spec)
        run.create()
        run.write_log([row(spec, index)])
        run.finish()
    return store


@pytest.mark.parametrize("figure", [table4.FIGURE, table12.FIGURE], ids=lambda figure: figure.name)
def test_a_page_states_its_tests_and_keeps_what_was_published_apart(tmp_path, figure):
    store = written(tmp_path / "runs", figure.plan(ONE)[0])
    reproduce.write(figure, ONE, store, out=tmp_path / "out", redo="flatlab")
    page = (tmp_path / "out" / f"{figure.name}.md").read_text()
    ours, block, printed = page.partition("## As published: other data or another protocol than ours")
    assert block and "97." in printed and "agree" not in ours and "published" not in ours.split("## ", 1)[1]
    assert "corrected by Holm's method within each family" in page and "would by chance" in page
    assert "source domains, test split" in ours and "selected on" not in ours
    assert ("SWAD: no valley began in 1 of 2 runs (swad, rot0, seed 0)" in page) == (figure is table12.FIGURE)


def test_where_the_split_is_the_papers_the_column_says_that_it_selected(tmp_path):
    setting = ONE.replace(test_share=0.0)
    frame = table4.FIGURE.table(written(tmp_path, table4.FIGURE.plan(setting)[0]), setting)
    assert "digits, source domains, out split (selected on), mean" in table4.FIGURE.sheet(frame)
    assert not [column for column in table4.FIGURE.sheet(frame) if "test split" in column]


def test_commands_say_that_no_valley_began(tmp_path, capsys):
    runs = replicates(METHODS["SWAD"], ONE)
    written(tmp_path, runs)
    assert call("runs", "show", runs[0].digest, "--store", tmp_path) == 0
    assert "no valley began in 1 of 1 run (" in json.loads(capsys.readouterr().out)["remarks"][0]
    assert call("runs", "show", runs[1].digest, "--store", tmp_path) == 0
    assert json.loads(capsys.readouterr().out)["remarks"] == []
    words = ("--method", "swad", "--setting", "smoke", "--held-out", "rot0", "--seeds", 2, "--store", tmp_path)
    assert call("train", *words) == 0
    answer = capsys.readouterr()
    assert "no valley began in 1 of 2 runs (swad, rot0, seed 0)" in " ".join(answer.err.split())
    assert "test" in answer.out


@pytest.mark.parametrize(
    "figure", [each.FIGURE for each in (table4, table12, fig4, controls)], ids=lambda each: each.name
)
def test_captions_promise_an_interval_where_there_is_one(figure):
    assert "95 % intervals over seeds" in figure.caption(ONE)
    assert "95 %" not in figure.caption(ONE.replace(seeds=1)) and "one seed has no interval" in figure.caption(
        ONE.replace(seeds=1)
    )


def test_the_released_codes_commit_is_named_and_what_is_not_modelled():
    for said in ("e9d55eb", "is not known", "momentum", "--select all", "--average swad --swad-rule released"):
        assert said in RELEASED


def test_a_star_in_the_block_of_accuracies_is_holms():
    """One of three methods has p = 0.03 alone: with two others in its family it has no star."""
    seeds, noise = range(3), {"A": (0.9, 1.0, 1.1), "B": (-0.5, 0.1, 0.5), "C": (0.65, 1.0, 1.35)}
    rows = [{"method": "ERM", "seed": seed, "target": 0.8} for seed in seeds]
    rows += [
        {"method": name, "seed": s, "target": 0.8 + 0.01 * values[s]} for name, values in noise.items() for s in seeds
    ]
    every = pd.DataFrame(rows).assign(selection="training-domain", held_out="rot0", validation=0.9, test=0.9)
    found = tables.gains(every, "ERM")
    assert set(found["family_size"]) == {3} and found["p"].iloc[2] < 0.05 < found["p_holm"].iloc[2]
    shown = tables.reached(every, found).set_index("method")["held-out domain less ERM"]
    assert "* [" in shown["A"] and "*" not in shown["C"] and shown["ERM"] == ""


def test_each_metric_has_a_function_that_measures_it():
    assert set(FUNCTIONS) == set(KINDS)
