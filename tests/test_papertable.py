"""Tables of the paper, on stores written by hand: what stands beside what, and whether the order agrees."""

import itertools
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from commandline import call
from matplotlib.collections import PathCollection
from scipy import stats
from stores import ERM, PLACE, spec, trained

from analyses import (
    _accuracy_table,
    _percent,
    _rank_agreement,
    controls,
    fig1,
    fig5,
    table1,
    table7,
    table9,
    table10,
    table12,
    table14,
    table15,
)
from analyses._accuracy_table import Line, PaperTable
from flatlab.jobs import plan as jobs_plan
from flatlab.loading.export import export
from flatlab.measure.runner import measure
from flatlab.report import tables
from flatlab.results.verdicts import holm
from flatlab.specs.methods import METHODS, RELEASED, compose, is_papers
from flatlab.specs.settings import PAPER, QUICK, SMOKE, for_data
from flatlab.store.runs import RunStore
from flatlab.train.derived import join

TABLE = PaperTable(
    number="9",
    lines=(
        Line("ERM", "ERM", printed={"bits": 32}),
        Line("7 bit", "QT-DoG", {"bits": 7}, {"bits": 7}),
        Line("5 bit", "QT-DoG", {"bits": 5}, {"bits": 5}),
        Line("nobody's", "SAM"),
    ),
    columns={"PACS": {"source": "PACS_in", "target": "PACS_out"}, "TerraIncognita": {"target": "TerraIncognita_out"}},
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
            "test": {"rot15": {"accuracy": 0.8}, "rot30": {"accuracy": 0.9}},
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
    assert list(frame.columns) == _accuracy_table.COLUMNS
    assert not frame.duplicated(["dataset", "panel", "method", "held_out", "seed"]).any()
    runs = frame[frame["over"] == "run"]
    assert len(runs) == 4 * 2 * 2 * 3  # lines, panels, held-out domains, seeds
    assert {*zip(frame["panel"], frame["split"], strict=True)} == {("source", "test"), ("target", "in")}
    assert runs[runs["panel"] == "source"]["value"].tolist() == pytest.approx([85] * 24)
    mine = runs[(runs["panel"] == "target") & (runs["method"] == "7 bit")]
    for where, part in (("rot45", mine[mine["held_out"] == "rot45"]), ("all", mine)):
        seeds = part.groupby("seed")["value"].mean()
        whole = frame[(frame["over"] == "seeds") & (frame["held_out"] == where) & (frame["panel"] == "target")]
        told = whole[whole["method"] == "7 bit"].squeeze()
        assert (told["value"], told["stderr"]) == pytest.approx((seeds.mean(), stats.sem(seeds)))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The same table on the paper's own data, by its protocol."""
    setting = PAPER.replace(seeds=3)
    return TABLE.table(written(tmp_path_factory.mktemp("theirs"), setting), setting)


def test_a_printed_number_stands_beside_ours_where_data_and_protocol_are_the_same(frame, theirs):
    assert frame["published"].isna().all() and not frame["comparable"].any()  # digits are not PACS
    assert {*zip(theirs["panel"], theirs["split"], strict=True)} == {("source", "out"), ("target", "in")}
    whole = theirs[(theirs["over"] == "seeds") & (theirs["panel"] == "target")].set_index(["method", "held_out"])
    told = whole.loc[("7 bit", "all")]
    assert (told["published"], told["published_stderr"], told["comparable"]) == (87.8, 0.3, True)
    assert np.isnan(whole.loc[("7 bit", "sketch"), "published"]) and np.isnan(
        whole.loc[("nobody's", "all"), "published"]
    )
    assert theirs[theirs["over"] == "run"]["published"].isna().all()
    inside = theirs[(theirs["panel"] == "source") & (theirs["held_out"] == "all")].set_index("method")
    assert inside.loc["7 bit", "published"] == 97.3


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, {"ERM", "7 bit", "5 bit"}),
        ({"seeds": 1, "seed": 5, "num_samples": 7}, {"ERM", "7 bit", "5 bit"}),
        ({"precision": "bf16"}, set()),
        ({"steps": 300}, set()),
        ({"test_share": 0.2}, set()),
        ({"switch": 4500}, {"ERM"}),
        ({"scale_lr": 1e-3}, {"ERM"}),
        ({"sam_rho": 5.0}, {"ERM", "7 bit", "5 bit"}),  # no line with a printed number is SAM's
        ({"bits": 4}, {"ERM", "7 bit", "5 bit"}),  # the lines say their own bits
        ({"held_out": ("sketch",)}, set()),  # the printed mean is over all four
    ],
)
def test_only_the_whole_of_a_lines_runs_makes_it_the_papers(tmp_path, changes, lines):
    setting = PAPER.replace(**{"seeds": 1, **changes})
    frame = TABLE.table(written(tmp_path, setting), setting)
    assert set(frame[frame["comparable"]]["method"]) == lines


@pytest.mark.parametrize("changes", [{"bits": 4}, {"switch": 4500}, {"precision": "bf16"}, {"granularity": "tensor"}])
def test_what_is_the_papers(changes):
    at = {"seeds": 1, "held_out": ("sketch",), "seed": 3}
    quantized = METHODS["QT-DoG"]
    assert is_papers(quantized, PAPER) and is_papers(quantized, PAPER.replace(**at))
    assert not is_papers(quantized, PAPER.replace(**changes)) and not is_papers(quantized, QUICK)
    assert is_papers(quantized, PAPER.replace(bits=4), {"bits": 5}) and not is_papers(
        METHODS["SAM"], PAPER.replace(sam_rho=5.0)
    )


def test_a_table_of_domains_has_the_printed_number_of_each():
    assert table7.TABLE.printed("SWAD", "PACS", ("target", "in"), "sketch").value == 82.5
    assert table7.TABLE.printed("SWAD", "PACS", ("target", "in"), "all").value == 88.1
    assert np.isnan(table7.TABLE.printed("SWAD", "digits", ("target", "in"), "rot0").value)
    assert np.isnan(table7.TABLE.printed("SWAD", "digits", ("target", "in"), "all").value)
    assert table9.TABLE.printed("8 bit", "TerraIncognita", ("source", "out"), "all").value == 90.9
    assert np.isnan(table9.TABLE.printed("8 bit", "TerraIncognita", ("source", "test"), "all").value)  # of other images
    assert table12.TABLE.printed("ERM", "PACS", ("source", "test"), "all").value == 96.6


def test_elsewhere_the_printed_numbers_have_a_block_of_their_own():
    block = TABLE.as_published().set_index("method")
    assert block.loc["7 bit", "PACS_out"] == "87.8 ± 0.3" and list(block.index) == ["ERM", "7 bit", "5 bit"]
    assert table7.TABLE.as_published().set_index("method").loc["SWAD", "sketch"] == "82.5"


# --- the order ---------------------------------------------------------------------------------------------------


def test_pairs_are_paired_and_say_whether_the_order_agrees(frame, theirs):
    assert set(TABLE.findings(frame)["agrees"]) == {""}  # other data
    frame = theirs
    found = TABLE.findings(frame)
    assert len(found) == 2 * 6
    out = found[found["panel"] == "target"].set_index(["method", "baseline"])
    assert out["agrees"].to_dict() == {
        ("7 bit", "ERM"): "yes",  # 87.8 against 84.7
        ("5 bit", "ERM"): "no",  # 85.3 against 84.7
        ("5 bit", "7 bit"): "yes",
        ("nobody's", "ERM"): "",
        ("nobody's", "7 bit"): "",
        ("nobody's", "5 bit"): "",
    }
    each = frame[(frame["over"] == "run") & (frame["panel"] == "target")]
    means = each.groupby(["method", "seed"])["value"].mean()
    test = stats.ttest_rel(means["5 bit"], means["ERM"])
    row = out.loc[("5 bit", "ERM")]
    assert (row["low"], row["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert row["published"] == pytest.approx(0.6) and row["published_stderr"] == pytest.approx(np.hypot(0.4, 0.5))
    inside = found[(found["panel"] == "source") & found["published"].notna()]
    assert set(inside["agrees"]) == {"not distinguishable"}  # all are 90 %


def test_the_lines_less_the_first_are_a_family_and_the_verdict_is_holms(frame):
    found = TABLE.findings(frame)
    first = found[(found["panel"] == "target") & (found["baseline"] == "ERM")]
    assert set(first["family"]) == {"digits, held-out domain, less ERM"} and set(first["family_size"]) == {3}
    assert first["p_holm"].tolist() == pytest.approx(holm(first["p"]).tolist())
    assert (first["verdict"] != "not distinguishable").tolist() == (first["p_holm"] < 0.05).tolist()
    others = found[(found["panel"] == "target") & (found["baseline"] != "ERM")]
    assert set(others["family"]) == {"digits, held-out domain, other pairs"}
    told = " ".join(TABLE.remarks(frame))
    assert "Tests: 2 families of 3 tests" in told and "exclude zero" in told and "the paper" not in told


def test_the_sentence_counts_and_names_the_pairs(frame, theirs):
    assert _rank_agreement.sentence(frame, TABLE.findings(frame), "digits", ("target", "in")) == ""
    frame = theirs.assign(dataset="digits")
    told = _rank_agreement.sentence(frame, TABLE.findings(frame), "digits", ("target", "in"))
    assert "of 3 pairs of lines 2 (7 bit > ERM; 5 bit < 7 bit) lie distinguishably in the order of the paper" in told
    assert "1 (5 bit < ERM) in the opposite one, and 0 are not" in told
    assert _rank_agreement.sentence(frame, TABLE.findings(frame).assign(agrees=""), "digits", ("target", "in")) == ""


def test_kendalls_tau_is_taken_in_each_seed(theirs):
    found = _rank_agreement.kendall(theirs, "PACS", ("target", "in"))
    each = stats.kendalltau([0.0, 0.1, -0.1], [84.7, 87.8, 85.3]).statistic
    assert found["value"] == pytest.approx(each) and -1 <= found["low"] <= found["high"] <= 1


def test_a_line_with_other_seeds_is_compared_with_means_over_all_seeds(frame):
    one = frame[~((frame["method"] == "5 bit") & (frame["over"] == "run") & (frame["seed"] != 0))]
    found = TABLE.findings(one).set_index(["panel", "method", "baseline"])
    alone = found.loc[("target", "5 bit", "ERM")]
    runs = one[(one["over"] == "run") & (one["panel"] == "target")].groupby("method")["value"].mean()
    assert alone["value"] == pytest.approx(runs["5 bit"] - runs["ERM"])  # not with ERM's seed 0
    assert np.isnan(alone["low"]) and alone["verdict"] == "not read"
    other = found.loc[("target", "7 bit", "ERM")]
    assert np.isfinite(other["low"]) and other["family_size"] == 2  # what has no p-value is in no family


def test_an_ensemble_stands_beside_the_mean_of_its_members(tmp_path):
    setting = SMOKE.replace(held_out=("rot0",), seeds=2, members=3)
    chosen = PaperTable("7", (Line("ERM", "ERM"), Line("EoQ", "EoQ")), {"PACS": {"target": ""}})
    store = RunStore(tmp_path)
    (joint,) = (run for label, run in chosen.labelled(setting) if label == "EoQ")
    wanted = {run: 0.5 + 0.1 * run.seed for label, run in chosen.labelled(setting) if label == "ERM"}
    wanted |= {run: 0.6 + 0.1 * run.seed for run in joint.members} | {joint: 0.9}
    for each, accuracy in wanted.items():
        run = store.run(each)
        run.create()
        run.write_log(
            [{"step": 10, "validation": 0.9, "target": {"in": {"accuracy": accuracy}, "out": {"accuracy": 0}}}]
        )
        run.finish()
    table = chosen.table(store, setting)
    members = table[(table["over"] == "members") & (table["held_out"] == "all")]["value"]
    assert members.tolist() == pytest.approx([70.0])
    (row,) = chosen.findings(table).to_dict("records")
    assert row["value"] == pytest.approx(90 - 55) and np.isnan(row["low"])  # ERM's mean over both seeds
    assert "less the mean of their members, in points, without an interval: EoQ +20.00" in " ".join(
        chosen.remarks(table)
    )


def test_misprints_are_named_on_the_table_that_has_them():
    assert any("Fishr" in note for note in table1.TABLE.notes()) and not table10.TABLE.notes()
    assert table7.TABLE.notes()[0] == "Printed, and not made here: DiWA."
    assert any("Tables 8 and 9" in note for note in table9.TABLE.notes())


# --- what is shown -----------------------------------------------------------------------------------------------


def test_the_sheet_and_the_summary_hold_ours_and_comparable_ones_alone(frame, theirs):
    sheet = TABLE.sheet(frame).set_index("method")
    assert sheet.loc["ERM", "digits, held-out domain, rot45"].startswith("51.")
    assert list(sheet.columns) == [
        "digits, source domains, test split, mean",
        *(f"digits, held-out domain, {where}" for where in ("mean", "rot0", "rot45")),
    ]
    summary = TABLE.summary(TABLE.findings(frame)).set_index("method")
    assert summary.loc["7 bit", "digits, held-out domain"].partition(" ")[0].endswith("*")
    assert not [column for column in summary if "order" in column or "published" in column]
    both = TABLE.sheet(theirs).set_index("method")
    assert both.loc["ERM", "published (PACS, held-out domain, mean)"] == "84.7 ± 0.5"
    assert both.loc["ERM", "published (PACS, source domains, out split (selected on), mean)"] == "96.9 ± 0.1"
    assert both.loc["nobody's", "published (PACS, held-out domain, mean)"] == ""
    agreed = TABLE.summary(TABLE.findings(theirs)).set_index("method")
    assert agreed.loc["7 bit", "published (PACS, held-out domain)"] == "+3.1"
    assert agreed.loc["5 bit", "order agrees (PACS, held-out domain)"] == "no"


def test_published_values_are_drawn_where_they_are_comparable_and_nowhere_else(frame, theirs):
    ours = {"ours, 95 % over seeds", "ours, no interval"}  # the runs agree in their source domains
    for shown, labels, name in ((frame, ours, "digits"), (theirs, {*ours, "published"}, "PACS")):
        figure = TABLE.draw(shown, "title\nsmall print")
        drawn = {line.get_label() for ax in figure.axes for line in ax.lines if not line.get_label().startswith("_")}
        assert drawn == labels
        inside = {"digits": "source domains, test split", "PACS": "source domains, out split (selected on)"}[name]
        assert [ax.get_title(loc="left") for ax in figure.axes][::2] == [
            f"{name}, {inside}",
            f"{name}, held-out domain",
        ]


def test_figure_5_shows_the_gains_of_the_bits(tmp_path):
    panels = [{"panel": "source", "split": "test"}, {"panel": "target", "split": "in"}]
    shift = {"ERM": 0.0, "8 bit": 0.1, "7 bit": 0.2, "6 bit": 0.1, "5 bit": -0.1}
    rows = [
        {**where, "dataset": "digits", "method": m, "held_out": "rot0", "seed": s, "value": 50 + 100 * d + s}
        for (m, d), s, where in itertools.product(shift.items(), (0, 1), panels)
    ]
    each = pd.DataFrame(rows).assign(over="run")
    whole = pd.concat([each, tables.over_seeds(each, ["dataset", "panel", "split", "method"])], ignore_index=True)
    shown = whole.assign(published=np.nan, published_stderr=np.nan, comparable=False)
    (ax,) = fig5.draw(shown, "title\nsmall print").axes
    assert ax.lines[0].get_xdata().tolist() == [5, 6, 7, 8]
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([-10, 10, 20, 10])
    assert all("source domains" not in each for each in fig5.remarks(shown))


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
    assert {run.switch for label, run in table14.TABLE.labelled(QUICK)} == {None, 60, 120, 180, 240}
    assert {run.test_share for _, run in table12.TABLE.labelled(QUICK)} == {0.2}


def test_noise_is_as_wide_as_the_papers_in_learning_rates():
    widths = {run.noise.amplitude / run.lr for _, run in table15.TABLE.labelled(QUICK) if run.noise}
    assert sorted(widths) == pytest.approx([0.1, 0.2, 1, 2])
    paper = {run.noise.amplitude for _, run in table15.TABLE.labelled(PAPER) if run.noise}
    assert sorted(paper) == pytest.approx(sorted(table15.WIDTHS))


def test_memory_is_bits_times_members():
    sizes = {label: fig1.nominal(run) for label, run in table1.TABLE.labelled(SMOKE)}
    assert (sizes["ERM"], sizes["QT-DoG"], sizes["EoA"], sizes["EoQ"]) == (1, 7 / 32, 2, 14 / 32)


def test_jobs_that_differ_in_their_bits_have_names_of_their_own(tmp_path):
    runs, _ = table10.FIGURE.plan(SMOKE)
    todo = jobs_plan.missing(RunStore(tmp_path), runs, [], sizes={name: 450 for name in SMOKE.domains})
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


MEASURES = [measure for measure in controls.MEASURES if measure != "source, out"]


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
        for measure, method, seed in itertools.product(MEASURES, controls.ORDER, range(3))
    ]
    frame = pd.DataFrame(rows).assign(over="run")
    return frame.assign(value=frame["value"] + 0.001 * np.random.default_rng(1).normal(size=len(frame)))


@pytest.mark.parametrize(
    ("shifts", "said"),
    [
        ({}, "no effect of QT-DoG is established."),
        ({"freeze": -1.0}, "no effect of QT-DoG is established, while freeze is lower."),
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
    assert told[0] == f"{controls.MEASURES['source, test']}: {said}"
    assert len(told) == len(MEASURES) + 1 and told[-1].startswith(f"Tests: {len(MEASURES)} families of 10 tests")


def test_one_seed_says_nothing_of_the_controls():
    frame = controlled(**{"QT-DoG": -1.0})
    assert controls.remarks(frame[frame["seed"] == 0]) == [
        "One seed gives no interval, so that neither an effect nor its absence is established.",
        RELEASED,
    ]


def test_a_derived_run_has_no_unrest(tmp_path):
    frame = controlled()
    bare = frame[~((frame["method"] == "RTN") & frame["measure"].isin(("spread", "change")))]
    found = controls.findings(bare)
    assert set(found[found["method"] == "RTN"]["measure"]) == set(MEASURES) - {"spread", "change"}
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
    (value,) = _percent.accuracies(store, [("ERM", tested)], [("source", "test")])["value"]
    assert value == pytest.approx(100 * chosen.loc["training-domain", "test"])


def test_figure_1_scales_areas_by_memory():
    labels = [line.label for line in table1.TABLE.lines]
    rows = pd.DataFrame(
        {"method": labels, "value": range(len(labels)), "memory": range(1, len(labels) + 1), "nominal": 0.25}
    )
    whole = rows.assign(dataset="digits", panel="target", split="in", held_out="all", over="seeds", low=0.0, high=1.0)
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
        told[each] = asdict(store.run(each).result(fig1.SIZE))
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
        assert np.isnan(whole.loc[("VLCS", line), "published"])
    assert any("Avg of PACS, VLCS" in column for column in MEANS.sheet(frame))
    found = MEANS.findings(frame)
    assert (found["dataset"] == "Avg of PACS, VLCS").sum() == 1


def test_the_printed_mean_stands_beside_that_of_all_five(tmp_path):
    own = [
        for_data(PAPER, name).replace(seeds=1, domains=held, held_out=held)
        for name, held in zip(table1.TABLE.columns, HELD, strict=True)
    ]
    setting = own[0].replace(others=tuple(own[1:]))
    frame = MEANS.table(filled(tmp_path, setting), setting)
    whole = frame[(frame["over"] == "seeds") & (frame["held_out"] == "all")].set_index(["dataset", "method"])
    assert whole.loc[("Avg.", "ERM"), ["published", "comparable"]].tolist() == [63.8, True]
    other = of(*table1.TABLE.columns)
    frame = MEANS.table(filled(tmp_path / "smoke", other), other)
    assert "Avg." in set(frame["dataset"]) and not frame["comparable"].any()  # SMOKE is not the paper's protocol
    alone = MEANS.table(filled(tmp_path / "one", of("PACS")), of("PACS"))
    assert set(alone["dataset"]) == {"PACS"}
