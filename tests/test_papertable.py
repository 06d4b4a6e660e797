"""Tables of the paper, on stores written by hand: what stands beside what, and whether the order agrees."""

import itertools

import numpy as np
import pandas as pd
import pytest
from commandline import call
from matplotlib.collections import PathCollection
from scipy import stats
from stores import ERM, PLACE, spec, trained

from analyses import controls, fig1, fig5, table1, table7, table9, table10, table12, table14, table15
from flatlab import jobs, orders, papertable, tables
from flatlab.export import export
from flatlab.measure import measure
from flatlab.methods import METHODS, compose
from flatlab.papertable import Line, PaperTable
from flatlab.runs import RunStore
from flatlab.settings import PAPER, QUICK, SMOKE
from flatlab.train.ensembles import join

TABLE = PaperTable(
    number="9",
    lines=(
        Line("ERM", "ERM", printed={"bits": 32}),
        Line("7 bit", "QT-DoG", {"bits": 7}, {"bits": 7}),
        Line("5 bit", "QT-DoG", {"bits": 5}, {"bits": 5}),
        Line("nobody's", "SAM"),
    ),
    columns={"PACS": {"in": "PACS_in", "out": "PACS_out"}, "TerraIncognita": {"out": "TerraIncognita_out"}},
)
SETTING = SMOKE.replace(held_out=("rot0", "rot45"), seeds=3)
SHIFT = {"ERM": 0.0, "7 bit": 0.1, "5 bit": -0.1, "nobody's": 0.0}
NOISE = np.random.default_rng(0)


def written(root, setting=SETTING, shift=SHIFT):
    """Return a store of finished runs whose accuracies out of domain differ by `shift`, and hardly by chance."""
    store = RunStore(root)
    for label, wanted in TABLE.labelled(setting):
        run = store.run(wanted)
        if run.done:
            continue
        accuracy = 0.5 + shift[label] + 0.01 * wanted.seed + 0.001 * NOISE.normal()
        row = {
            "step": wanted.steps,
            "validation": 0.9,
            "target": {"in": {"accuracy": accuracy}, "out": {"accuracy": 0.4}},
        }
        run.create()
        run.write_log([row])
        run.finish()
    return store


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    return TABLE.table(written(tmp_path_factory.mktemp("written")), SETTING)


def test_a_table_holds_each_run_and_means_over_seeds(frame):
    assert list(frame.columns) == papertable.COLUMNS
    assert not frame.duplicated(["dataset", "panel", "method", "held_out", "seed"]).any()
    runs = frame[frame["over"] == "run"]
    assert len(runs) == 4 * 2 * 2 * 3  # lines, panels, held-out domains, seeds
    assert (runs[runs["panel"] == "in"]["value"] == 90).all()
    mine = runs[(runs["panel"] == "out") & (runs["method"] == "7 bit")]
    for where, part in (("rot45", mine[mine["held_out"] == "rot45"]), ("all", mine)):
        seeds = part.groupby("seed")["value"].mean()
        whole = frame[(frame["over"] == "seeds") & (frame["held_out"] == where) & (frame["panel"] == "out")]
        told = whole[whole["method"] == "7 bit"].squeeze()
        assert (told["value"], told["stderr"]) == pytest.approx((seeds.mean(), stats.sem(seeds)))


def test_the_printed_numbers_stand_beside_the_means_alone(frame):
    whole = frame[(frame["over"] == "seeds") & (frame["panel"] == "out")].set_index(["method", "held_out"])
    assert whole.loc[("7 bit", "all"), "published"] == 87.8 and whole.loc[("7 bit", "all"), "published_stderr"] == 0.3
    assert whole.loc[("7 bit", "all"), "published_on"] == "PACS"
    assert np.isnan(whole.loc[("7 bit", "rot0"), "published"]) and np.isnan(whole.loc[("nobody's", "all"), "published"])
    assert not frame["comparable"].any()  # digits are not PACS


def test_a_table_of_domains_has_the_printed_number_of_each():
    assert table7.TABLE.printed("SWAD", "PACS", "out", "sketch").value == 82.5
    assert table7.TABLE.printed("SWAD", "PACS", "out", "all").value == 88.1
    assert np.isnan(table7.TABLE.printed("SWAD", "digits", "out", "rot0").value)
    assert table9.TABLE.printed("8 bit", "TerraIncognita", "in", "all").value == 90.9


def test_what_is_comparable():
    assert papertable.is_papers(PAPER) and papertable.is_papers(PAPER.replace(seeds=1, held_out=("sketch",)))
    assert not papertable.is_papers(PAPER.replace(model="mobilenet_v2"))
    assert not papertable.is_papers(PAPER.replace(steps=300)) and not papertable.is_papers(QUICK)


# --- the order ---------------------------------------------------------------------------------------------------


def test_pairs_are_paired_and_say_whether_the_order_agrees(frame):
    found = TABLE.findings(frame)
    assert len(found) == 2 * 6
    out = found[found["panel"] == "out"].set_index(["method", "baseline"])
    assert out["agrees"].to_dict() == {
        ("7 bit", "ERM"): "yes",  # 87.8 against 84.7
        ("5 bit", "ERM"): "no",  # 85.3 against 84.7
        ("5 bit", "7 bit"): "yes",
        ("nobody's", "ERM"): "",
        ("nobody's", "7 bit"): "",
        ("nobody's", "5 bit"): "",
    }
    each = frame[(frame["over"] == "run") & (frame["panel"] == "out")]
    means = each.groupby(["method", "seed"])["value"].mean()
    test = stats.ttest_rel(means["5 bit"], means["ERM"])
    row = out.loc[("5 bit", "ERM")]
    assert (row["low"], row["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert row["published"] == pytest.approx(0.6) and row["published_stderr"] == pytest.approx(np.hypot(0.4, 0.5))
    inside = found[(found["panel"] == "in") & found["published"].notna()]
    assert set(inside["agrees"]) == {"not distinguishable"}  # all are 90 %


def test_the_sentence_counts_and_names_the_pairs(frame):
    told = orders.sentence(frame, TABLE.findings(frame), "digits", "out")
    assert "of 3 pairs of lines 2 (7 bit > ERM; 5 bit < 7 bit) lie distinguishably in the order of the paper" in told
    assert "1 (5 bit < ERM) in the opposite one, and 0 are not" in told
    assert orders.sentence(frame, TABLE.findings(frame).assign(agrees=""), "digits", "out") == ""


def test_kendalls_tau_is_taken_in_each_seed(frame):
    found = orders.kendall(frame, "digits", "out")
    each = stats.kendalltau([0.0, 0.1, -0.1], [84.7, 87.8, 85.3]).statistic
    assert found["value"] == pytest.approx(each) and -1 <= found["low"] <= found["high"] <= 1


def test_a_line_with_fewer_seeds_is_compared_over_those_that_both_have(frame):
    one = frame[~((frame["method"] == "5 bit") & (frame["over"] == "run") & (frame["seed"] != 0))]
    found = TABLE.findings(one).set_index(["panel", "method", "baseline"])
    alone = found.loc[("out", "5 bit", "ERM")]
    assert np.isnan(alone["low"]) and alone["agrees"] == "not distinguishable" and abs(alone["value"] + 10) < 1
    assert found.loc[("out", "7 bit", "ERM"), "agrees"] == "yes"
    assert "5 bit: compared with the others at the seeds that both have" in " ".join(TABLE.remarks(one))
    assert "compared with the others" not in " ".join(TABLE.remarks(frame))


def test_misprints_are_told_of_the_table_that_has_them():
    assert any("Fishr" in note for note in table1.TABLE.notes()) and not table10.TABLE.notes()
    assert table7.TABLE.notes()[0] == "Printed, and not made here: DiWA."
    assert any("Tables 8 and 9" in note for note in table9.TABLE.notes())


# --- what is shown -----------------------------------------------------------------------------------------------


def test_the_sheet_and_the_summary_hold_ours_and_theirs(frame):
    sheet = TABLE.sheet(frame).set_index("method")
    assert sheet.loc["ERM", "published (PACS out, mean)"] == "84.7 ± 0.5"
    assert (
        sheet.loc["ERM", "digits out, rot45"].startswith("51.")
        and sheet.loc["nobody's", "published (PACS out, mean)"] == ""
    )
    summary = TABLE.summary(TABLE.findings(frame)).set_index("method")
    assert summary.loc["7 bit", "published (PACS, out)"] == "+3.1"
    assert summary.loc["5 bit", "order agrees (digits, out)"] == "no"
    assert summary.loc["7 bit", "digits, out of domain"].endswith("]*")


def test_published_values_are_drawn_where_they_are_comparable_and_nowhere_else(frame):
    for comparable, labels in ((False, {"ours, 95 % over seeds"}), (True, {"ours, 95 % over seeds", "published"})):
        figure = TABLE.draw(frame.assign(comparable=comparable), "title\nsmall print")
        drawn = {line.get_label() for ax in figure.axes for line in ax.lines if not line.get_label().startswith("_")}
        assert drawn == labels
        assert [ax.get_title(loc="left") for ax in figure.axes][::2] == ["digits, in domain", "digits, out of domain"]


def test_figure_5_shows_the_gains_of_the_bits(tmp_path):
    shift = {"ERM": 0.0, "8 bit": 0.1, "7 bit": 0.2, "6 bit": 0.1, "5 bit": -0.1}
    rows = [
        {"dataset": "digits", "panel": panel, "method": m, "held_out": "rot0", "seed": s, "value": 50 + 100 * d + s}
        for (m, d), s, panel in itertools.product(shift.items(), (0, 1), ("in", "out"))
    ]
    each = pd.DataFrame(rows).assign(over="run")
    whole = pd.concat([each, tables.over_seeds(each, ["dataset", "panel", "method"])], ignore_index=True)
    shown = whole.assign(published=np.nan, published_stderr=np.nan, published_on="", comparable=False)
    (ax,) = fig5.draw(shown, "title\nsmall print").axes
    assert ax.lines[0].get_xdata().tolist() == [5, 6, 7, 8]
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([-10, 10, 20, 10])
    assert len(fig5.remarks(shown)) == 0 or all("in domain" not in each for each in fig5.remarks(shown))


def test_a_page_in_markdown():
    page = tables.markdown(pd.DataFrame({"method": ["ERM"], "target": [0.12345]}))
    assert page == "| method | target |\n| --- | --- |\n| ERM | 0.123 |"


# --- plans -------------------------------------------------------------------------------------------------------


def test_the_tables_share_their_runs():
    runs = {
        name: {run.digest for _, run in each.labelled(QUICK)}
        for name, each in {"9": table9.TABLE, "10": table10.TABLE, "14": table14.TABLE}.items()
    }
    at_seven = {
        compose(METHODS["QT-DoG"], QUICK, held_out=t, seed=i, trial_seed=i).digest
        for t in QUICK.held_out
        for i in range(3)
    }
    assert at_seven <= runs["9"] & runs["10"] & runs["14"]
    assert {run.switch for label, run in table14.labelled(QUICK)} == {None, 60, 120, 180, 240}
    assert {run.test_share for _, run in table12.labelled(QUICK)} == {0.2}


def test_noise_is_as_wide_as_the_papers_in_learning_rates():
    widths = {run.noise.amplitude / run.lr for _, run in table15.labelled(QUICK) if run.noise}
    assert sorted(widths) == pytest.approx([0.1, 0.2, 1, 2])
    paper = {run.noise.amplitude for _, run in table15.labelled(PAPER) if run.noise}
    assert sorted(paper) == pytest.approx(sorted(table15.WIDTHS))


def test_memory_is_bits_times_members():
    sizes = {label: fig1.nominal(run) for label, run in table1.labelled(SMOKE)}
    assert (sizes["ERM"], sizes["QT-DoG"], sizes["EoA"], sizes["EoQ"]) == (1, 7 / 32, 2, 14 / 32)


def test_jobs_that_differ_in_their_bits_have_names_of_their_own(tmp_path):
    runs, _ = table10.plan(SMOKE)
    todo = jobs.missing(RunStore(tmp_path), runs, [], sizes={name: 450 for name in SMOKE.domains})
    assert len({job.name for job in todo}) == len(todo)


def test_several_data_sets_are_planned_and_one_that_shows_one_refuses_them(tmp_path, capsys):
    for name in PAPER.domains:
        (tmp_path / "PACS" / name).mkdir(parents=True)
    words = (
        "--dry-run",
        "--json",
        "--setting",
        "smoke",
        "--seeds",
        1,
        "--data-dir",
        tmp_path,
        "--store",
        tmp_path / "s",
    )
    assert call("reproduce", "table13", "--datasets", "digits,PACS", *words) == 0
    planned = capsys.readouterr().out
    assert "on sketch" in planned and "on rot45" in planned
    assert call("reproduce", "fig3", "--datasets", "digits,PACS", *words) == 2
    assert "fig3 shows one data set; give --dataset instead of --datasets" in capsys.readouterr().err
    assert call("reproduce", "table13", "--dataset", "PACS", "--datasets", "digits,PACS", *words) == 2
    assert "Give --dataset or --datasets, not both" in capsys.readouterr().err


# --- controls ----------------------------------------------------------------------------------------------------


def controlled(**shifts):
    """Return the frame of the controls, each method shifted in each measure but for a little noise."""
    rows = [
        {
            "measure": measure,
            "method": method,
            "held_out": "rot0",
            "seed": seed,
            "value": seed + shifts.get(method, 0.0),
        }
        for measure, method, seed in itertools.product(controls.MEASURES, controls.ORDER, range(3))
    ]
    frame = pd.DataFrame(rows).assign(over="run")
    return frame.assign(value=frame["value"] + 0.001 * np.random.default_rng(1).normal(size=len(frame)))


@pytest.mark.parametrize(
    ("shifts", "said"),
    [
        ({}, "no effect of QT-DoG shows."),
        ({"freeze": -1.0}, "no effect of QT-DoG shows, while freeze is lower."),
        ({"QT-DoG": -1.0}, "QT-DoG is lower, and no control here is: an effect of quantization is possible."),
        ({"QT-DoG": -1.0, "freeze": -1.0}, "QT-DoG is lower, and so is freeze: no effect of quantization alone."),
        (
            {"QT-DoG": 1.0, "noise": 1.0, "RTN": -1.0},
            "QT-DoG is higher, and so is noise: no effect of quantization alone.",
        ),
    ],
)
def test_controls_say_what_the_data_allow(shifts, said):
    found = controls.findings(controlled(**shifts))
    only = found.assign(verdict=np.where(found["value"].abs() > 0.5, found["verdict"], "not distinguishable"))
    assert only["verdict"].isin(("lower", "higher", "not distinguishable")).all()
    told = controls.words(only)
    assert told[0] == f"{controls.MEASURES['in']}: {said}"
    assert len(told) == len(controls.MEASURES) + 1


def test_one_seed_says_nothing_of_the_controls():
    frame = controlled(**{"QT-DoG": -1.0})
    assert controls.remarks(frame[frame["seed"] == 0]) == [
        "One seed gives no interval: no effect can be told from chance, nor its absence."
    ]


def test_a_derived_run_has_no_unrest(tmp_path):
    frame = controlled()
    bare = frame[~((frame["method"] == "RTN") & frame["measure"].isin(("spread", "change")))]
    found = controls.findings(bare)
    assert set(found[found["method"] == "RTN"]["measure"]) == set(controls.MEASURES) - {"spread", "change"}
    assert (
        controls.summary(found).set_index("question").loc["Quantization without training: RTN less ERM"].eq("").sum()
        == 2
    )


# --- the in-domain test of Table 12 ------------------------------------------------------------------------------


def test_the_test_images_are_scored_beside_validation_and_shown(tmp_path):
    tested = spec(test_share=0.2)
    store = trained(tmp_path, tested)
    rows = store.run(tested).rows()
    assert {name: score["n"] for name, score in rows[-1]["test"].items()} == {"rot0": 90, "rot15": 90, "rot30": 90}
    assert {score["n"] for score in rows[-1]["source"].values()} == {89, 90}  # validation is as large as before
    chosen = tables.accuracies(store, [("ERM", tested)]).set_index("selection")
    mean = np.mean([score["accuracy"] for score in rows[-1]["test"].values()])
    assert chosen.loc["last", "test"] == pytest.approx(mean)
    (value,) = papertable.accuracies(store, [("ERM", tested)], ["test"])["value"]
    assert value == pytest.approx(100 * chosen.loc["training-domain", "test"])


def test_figure_1_scales_areas_by_memory():
    labels = [line.label for line in table1.TABLE.lines]
    rows = pd.DataFrame(
        {"method": labels, "value": range(len(labels)), "memory": range(1, len(labels) + 1), "nominal": 0.25}
    )
    whole = rows.assign(dataset="digits", panel="out", held_out="all", over="seeds", low=0.0, high=1.0)
    above, below = fig1.draw(whole, "title\nsmall print").axes
    ours, theirs = (
        {
            round(float(size) / fig1.AREA, 3)
            for dots in ax.collections
            if isinstance(dots, PathCollection)
            for size in dots.get_sizes()
        }
        for ax in (above, below)
    )
    assert {*range(1, 11)} <= ours
    assert {0.22, 1.1, 6.0, 1.0} <= theirs  # QT-DoG, EoQ, EoA, ERM
    assert [text.get_text() for text in above.texts] == [f"{size}\n(0.25)" for size in range(1, 11)]


def test_figure_1s_memory_is_that_of_the_exported_file(tmp_path):
    quantized, joint = spec("QT-DoG"), ERM.replace(members=(ERM, spec("QT-DoG")))
    trained(tmp_path, ERM)
    store = trained(tmp_path, quantized)
    join(joint, store, PLACE)
    told = {}
    for each in (ERM, quantized, joint):
        measure(store.run(each), fig1.SIZE, PLACE)
        told[each] = {name: int(array) for name, array in store.run(each).measured(fig1.SIZE)[0].items()}
    for each in (quantized, joint):
        file = export(store.run(each), tmp_path / "file.safetensors", PLACE)
        assert told[each] == {"bytes": file.bytes, "float_bytes": file.float_bytes}
    assert 0 < told[ERM]["bytes"] - told[ERM]["float_bytes"] < 4000  # the header
    assert told[joint]["float_bytes"] == 2 * told[ERM]["float_bytes"]


# --- the mean over data sets ---------------------------------------------------------------------------------------


MEANS = PaperTable(
    number="1",
    lines=tuple(
        Line(name, method, printed={"algorithm": name}) for name, method in {"ERM": "ERM", "SWAD": "SWAD"}.items()
    ),
    columns=table1.TABLE.columns,
    average="Avg",
)


def of(*names):
    first, *others = (
        SMOKE.replace(dataset=name, held_out=held, seeds=3) for name, held in zip(names, HELD, strict=False)
    )
    return first.replace(others=tuple(others))


HELD = [("a", "b"), ("c",), ("d",), ("e",), ("f",)]


def filled(root, setting):
    """A store whose accuracies differ in each cell."""
    store = RunStore(root)
    for index, (_, wanted) in enumerate(MEANS.labelled(setting)):
        run = store.run(wanted)
        run.create()
        target = {part: {"accuracy": 0.01 * index} for part in ("in", "out")}
        run.write_log([{"step": wanted.steps, "validation": 0.9, "target": target}])
        run.finish()
    return store


def test_the_mean_over_data_sets_weighs_each_alike_and_says_which_they_are(tmp_path):
    setting = of("PACS", "VLCS")
    frame = MEANS.table(filled(tmp_path, setting), setting)
    assert not frame.duplicated(["dataset", "panel", "method", "held_out", "seed", "over"]).any()
    whole = frame[(frame["over"] == "seeds") & (frame["held_out"] == "all")].set_index(["dataset", "method"])
    runs = frame[(frame["over"] == "run") & (frame["held_out"] != "all")]
    for line in ("ERM", "SWAD"):
        mine = runs[runs["method"] == line]
        cells = mine.groupby(["dataset", "seed"])["value"].mean().unstack()  # the mean over its domains
        seeds = cells.mean()
        told = whole.loc[("Avg of PACS, VLCS", line)]
        assert (told["value"], told["stderr"]) == pytest.approx((seeds.mean(), stats.sem(seeds)))
        assert np.isnan(told["published"])  # the printed one is of all five
        assert whole.loc[("VLCS", line), "published"] == {"ERM": 77.4, "SWAD": 79.1}[line]
    assert any("Avg of PACS, VLCS" in column for column in MEANS.sheet(frame))
    found = MEANS.findings(frame)
    assert (found["dataset"] == "Avg of PACS, VLCS").sum() == 1


def test_the_printed_mean_stands_beside_that_of_all_five(tmp_path):
    setting = of(*table1.TABLE.columns)
    frame = MEANS.table(filled(tmp_path, setting), setting)
    whole = frame[(frame["over"] == "seeds") & (frame["held_out"] == "all")].set_index(["dataset", "method"])
    assert whole.loc[("Avg.", "ERM"), ["published", "published_on"]].tolist() == [63.8, "Avg."]
    assert not whole.loc["Avg.", "comparable"].any()  # SMOKE is not the paper's protocol
    alone = MEANS.table(filled(tmp_path / "one", of("PACS")), of("PACS"))
    assert set(alone["dataset"]) == {"PACS"}
