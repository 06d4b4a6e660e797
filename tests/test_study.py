"""The study's claims, their tests and their power; rank correlations over blocks; on hand-made numbers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analyses import _claims, _correlation, _grid, _rows, study
from flatlab.errors import UserError
from flatlab.report import verdicts
from flatlab.specs.settings import SMOKE, for_data

TARGETS = ("art_painting", "photo", "sketch")


def frame(shift, *, spread=0.01, seeds=3, dataset="PACS"):
    """Return rows of single runs: each measure 1 (accuracies 80) plus a method's shift, and noise over seeds."""
    draw = np.random.default_rng(0)
    rows = [
        {"measure": measure, "method": method, "held_out": target, "seed": seed, "over": "run", "dataset": dataset}
        | {"made": method, "data": "f00d"}
        | {
            "value": (80 if measure in ("test", "target") else 1)
            + shift(measure, method, target)
            + spread * draw.normal()
        }
        for measure in study.MEASURES
        if measure != "validation"
        for method in study.ORDER
        if not (measure in ("spread", "change") and method in ("SWA", "SWAD"))
        for target in TARGETS
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def lines(found):
    return dict(zip([claim.words for claim in _claims.CLAIMS], _claims.sentences(found, study.MEASURES), strict=True))


def test_a_claim_is_supported_contradicted_or_undecided():
    def shift(measure, method, target):
        del target
        if method == "QT-DoG":
            return {"target": 5.0, "spread": 3.0}.get(measure, 0.0)
        return -0.9 if method == study.STRONG and measure in _claims.FLATNESS else 0.0

    told = lines(study.findings(frame(shift, seeds=5)))
    assert "**supported**" in told["QT-DoG is better than ERM out of domain"]
    assert "**contradicted**" in told["QT-DoG is steadier than ERM after the switch"]
    assert "**cannot be told at this size**" in told["QT-DoG is flatter than ERM"]
    assert "**supported**" in told[_claims.CLAIMS[0].words]
    assert {name for name, line in told.items() if "seeds would tell" in line} == {
        name for name, line in told.items() if _claims.UNKNOWN in line
    }
    assert all("without photo" in line and "5 seeds" in line for line in told.values())


def test_a_claim_in_brief_counts_the_tests_for_and_against_it():
    def shift(measure, method, target):
        if method == "QT-DoG" and measure == "target":
            return 5.0 if target == "photo" else 0.0
        return -0.9 if method in ("SAM", study.STRONG) and measure in _claims.FLATNESS else 0.0

    found = study.findings(frame(shift, seeds=5))
    told = {line.partition(": **")[0]: line for line in _claims.brief(found, study.MEASURES)}
    assert list(told) == [claim.words for claim in _claims.CLAIMS]
    assert (
        "**contradicted** (all targets, 5 seeds; 8 tests, 0 for it and 4 against it; "
        in told["QT-DoG is flatter than SAM and SWA"]
    )
    assert "4 tests, 4 for it and 0 against it; differences from -0." in told[_claims.CLAIMS[0].words]
    better = told["QT-DoG is better than ERM out of domain"]
    assert "**supported** (all targets, 5 seeds; 1 test, 1 for it and 0 against it; difference +" in better
    assert better.endswith("; without photo: **cannot be told at this size**.")
    few = found[found["claim"] != "7 bits are best"]
    assert len(list(_claims.brief(few, study.MEASURES))) == len(_claims.CLAIMS) - 1


def test_both_directions_are_said_to_be_both():
    claim = next(each for each in _claims.CLAIMS if each.words == "QT-DoG is flatter than ERM")
    for said, words in {
        ("lower", "higher"): _claims.MIXED,
        ("lower", verdicts.NONE): _claims.SUPPORTED,
        ("higher", verdicts.NONE): _claims.CONTRADICTED,
        (verdicts.NONE, verdicts.UNREAD): _claims.UNKNOWN,
    }.items():
        assert _claims.verdict_of(claim, pd.DataFrame({"verdict": said})) == words


def test_the_families_are_those_of_the_protocol():
    found = study.findings(frame(lambda *_: 0.0))
    sizes = found[found["targets"] == study.ALL].groupby("family")["family_size"].unique()
    assert sizes.map(len).eq(1).all()
    for claim, size in {"QT-DoG is flatter than ERM": 4, "QT-DoG is flatter than SAM and SWA": 8}.items():
        assert sizes[claim].item() == size
    assert sizes["QT-DoG is better than ERM out of domain"].item() == 1
    assert sizes["Out of domain (points), less ERM"].item() == len(study.ORDER) - 2  # all but ERM and the claim's
    assert sizes["Out of domain (points), QT-DoG less the others"].item() == len(study.AGAINST) - 1
    assert set(found["correction"]) == {"Holm"}
    assert study.FEWER not in set(study.findings(frame(lambda *_: 0.0, dataset="VLCS"))["targets"])


def test_without_photo_the_differences_are_those_of_the_others():
    found = study.findings(frame(lambda m, method, target: 9.0 * (target == "photo" and method == "SAM"), spread=0.0))
    less = found[(found["method"] == "SAM") & (found["baseline"] == "ERM") & (found["measure"] == "target")]
    assert less.set_index("targets")["value"].to_dict() == pytest.approx({study.ALL: 3.0, study.FEWER: 0.0})


def test_one_seed_has_no_verdict_and_no_power():
    found = study.findings(frame(lambda *_: 0.0, seeds=1))
    assert found[["p_holm", "seeds_needed", "detectable"]].isna().all(axis=None)
    assert all("cannot be told" in line for line in lines(found).values())
    short = list(_claims.brief(found, study.MEASURES))
    assert all("1 seed; no test; difference" in line and "for it" not in line for line in short)
    assert "filled" not in study.caption(SMOKE.replace(seeds=1)) and "filled where p" in study.caption(SMOKE)


def test_the_seeds_that_would_tell_are_from_the_least_to_the_most_of_the_tests():
    found = study.findings(frame(lambda *_: 0.0, spread=0.5))
    told = lines(found)["QT-DoG is flatter than ERM"]
    needed = found[(found["claim"] == "QT-DoG is flatter than ERM") & (found["targets"] == study.ALL)]["seeds_needed"]
    assert f"; {needed.min():,.0f} to {needed.max():,.0f} seeds would tell" in told
    assert "to" not in lines(found)["QT-DoG is better than ERM out of domain"].partition("; ")[2].partition("would")[0]


def test_the_page_says_up_to_which_radius_f_is_averaged():
    whole = pd.concat([_rows.points(curves()), _rows.flatness(curves(), study.ends(curves()))]).assign(over="run")
    (told,) = _rows.reach(whole, "ERM")
    assert told == "F is averaged up to γ = 0.5 (ERM's rise: 0.5 nats)."
    low = whole.assign(value=whole["value"].where(whole["measure"] != "limit, target, none", 0.25))
    assert (
        "γ = 0.5 (ERM's rise: 0.5 nats) on source domains, γ = 0.25 (ERM's rise: 0.25 nats) on target domains"
        in (_rows.reach(low, "ERM")[0])
    )
    assert _rows.reach(frame(lambda *_: 0.0), "ERM") == []


def test_the_caption_says_what_is_not_drawn_and_what_the_error_is_of():
    told = study.caption(SMOKE.replace(num_samples=None))
    assert "the mean change is not drawn" in told and "15% error of F over all domains" in told


def test_the_seeds_needed_give_an_interval_half_as_wide_as_the_effect():
    for spread, effect in ((1.0, 2.0), (0.3, 0.2), (2.0, 1.0)):
        count = int(_claims.seeds_needed(spread, effect))
        width = [2 * stats.t.ppf(0.975, n - 1) * spread / n**0.5 for n in (count, max(2, count - 1))]
        assert width[0] <= effect / 2 < width[1]
    assert _claims.seeds_needed(0.0, 1.0) == 2 and np.isinf(_claims.seeds_needed(1e6, 1e-3))
    assert np.isnan(_claims.seeds_needed(float("nan"), 1.0))


@pytest.mark.parametrize("seeds", [3, 8])
def test_what_seeds_can_detect_is_found_with_the_power_it_says(seeds):
    true = _claims.detectable(2.0, seeds)
    found = stats.ttest_1samp(np.random.default_rng(0).normal(true, 2.0, (200_000, seeds)), 0, axis=1)
    power = np.mean((found.pvalue < 0.05) & (found.statistic > 0))
    assert power == pytest.approx(_claims.POWER, abs=0.004)  # four standard errors
    assert np.isnan(_claims.detectable(2.0, 1))


def test_spearman_is_scipys():
    x, y = np.random.default_rng(0).normal(size=(2, 3, 4, 9)).round(1)
    ours = _correlation.spearman(x, y)
    assert ours.shape == (3, 4)
    assert ours[1, 2] == pytest.approx(stats.spearmanr(x[1, 2], y[1, 2]).statistic)
    assert np.isnan(_correlation.spearman(np.ones(5), np.arange(5.0)))


def test_correlations_within_and_between_are_distinguished():
    """Flatter methods are better, while within each method flatter blocks are worse."""
    draw = np.random.default_rng(0)
    methods, blocks = np.arange(6)[:, None], draw.normal(size=12)[None]
    x, y = (pd.DataFrame(10 * methods + blocks), pd.DataFrame(-10 * methods + blocks))
    found = _correlation.correlations(x, y).set_index("kind")
    assert found["value"]["between methods"] == pytest.approx(-1) == found["value"]["within block"]
    assert found["value"]["within method"] == pytest.approx(1)
    assert (found["low"] <= found["high"]).all()
    assert _correlation.correlations(x, y).equals(_correlation.correlations(x, y))
    other = pd.DataFrame(draw.normal(size=(6, 12)))
    assert not _correlation.correlations(x, other).equals(_correlation.correlations(x, other, seed=1))
    assert _correlation.correlations(x[[0]], y[[0]])["low"].isna().all()


def test_the_plan_has_eleven_methods_and_the_curvature_of_one_seed():
    setting = for_data(SMOKE, "PACS").replace(sam_rho=0.1, seeds=3, domains=TARGETS, held_out=TARGETS)
    runs, measured = study.FIGURE.plan(setting)
    assert len({run.digest for run in runs}) == 11 * 3 * 3
    assert sorted({run.step.rho for run in runs if run.step.kind == "sam"}) == pytest.approx([0.1, 0.15])
    digits = study.FIGURE.plan(SMOKE)[0]
    assert sorted({run.step.rho for run in digits if run.step.kind == "sam"}) == pytest.approx([0.05, 0.2])
    assert {run.quantizer.bits for run in runs if run.quantizer} == {4, 7}
    kinds = pd.Series([each.metric for _, each in measured]).value_counts()
    assert kinds["sphere"] == 2 * 99 and kinds["spectrum"] == 2 * 33
    more = study.FIGURE.plan(setting.replace(seeds=5))[1]
    assert set(measured) <= set(more)  # seeds can be added: the radii are those of the first


def test_methods_that_are_left_out_are_not_planned_and_are_named():
    setting = SMOKE.replace(leave_out=("sam", "strong SAM", "noise"))
    assert {name for name, _ in study.labelled(setting)} == set(study.ORDER) - {"SAM", "strong SAM", "noise"}
    assert set(study.FIGURE.plan(setting)[1]) < set(study.FIGURE.plan(SMOKE)[1])
    assert "Left out: SAM, strong SAM, noise." in study.caption(setting)
    assert "Left out" not in study.caption(SMOKE)
    for name in ("ERM", "adam"):
        with pytest.raises(UserError, match="Unknown method that can be left out"):
            study.labelled(SMOKE.replace(leave_out=(name,)))


def test_the_others_are_compared_and_drawn_without_those_left_out():
    whole = frame(lambda *_: 0.0)
    found = study.findings(whole[~whole["method"].isin(("SAM", "strong SAM"))])
    pairs = set(zip(found["method"], found["baseline"], strict=True))
    assert pairs == {pair for pair in study.PAIRS if not {"SAM", "strong SAM"} & set(pair)}
    told = lines(found)
    assert told[_claims.CLAIMS[0].words].endswith("No measurement decides this.")
    assert told["QT-DoG is flatter than SAM and SWA"].endswith("Not measured: QT-DoG less SAM.")
    assert "Not measured" not in told["QT-DoG is flatter than ERM"]
    axis = plt.figure().add_subplot()
    study._differences(axis, found[found["targets"] == study.ALL], ("target",))
    shown = [label.get_text() for label in axis.get_yticklabels()]
    assert len(shown) == len(pairs) and not any("SAM" in each for each in shown)
    assert study._power(found[found["method"] != "QT-DoG"]) == "QT-DoG was left out."


def test_the_distance_from_the_grid_is_none_on_it_and_a_quarter_off_it():
    draw = np.random.default_rng(0)
    codes = draw.integers(-127, 128, size=(8, 16, 3, 3))
    codes[:, 0, 0, 0] = 127
    scale = np.geomspace(1e-3, 1, 8)[:, None, None, None]
    start = {"features.0.0.weight": (codes * scale).astype("float32")}
    names = ("features.features.0.0.weight", "features.features.0.0.parametrizations.weight.original")
    for name in names:
        on = {name: start["features.0.0.weight"] - scale * draw.integers(0, 3, size=codes.shape)}
        off = {name: start["features.0.0.weight"] + scale * draw.normal(size=codes.shape) * 50}
        assert _grid.distance(start, on) == pytest.approx(0, abs=1e-4)
        assert _grid.distance(start, off) == pytest.approx(_grid.UNIFORM, abs=0.02)
    assert np.isnan(_grid.distance(start, {"head.weight": np.ones((2, 2))}))


def test_there_is_one_row_for_each_run():
    whole = frame(lambda *_: 0.0)
    wide = _rows.wide(pd.concat([whole, whole[:1].assign(held_out="all", seed="all", over="seeds")]))
    assert len(wide) == len(study.ORDER) * len(TARGETS) * 3
    assert {"method", "held_out", "seed", "target", "target, filter"} <= set(wide)


def curves(apart=""):
    """Return rises that are the radius, and of one method 0 at a loss of chance."""
    return pd.DataFrame(
        [
            {
                "method": method,
                "held_out": "photo",
                "seed": 0,
                "panel": panel,
                "normalisation": "none",
                "radius": radius,
            }
            | {"value": 0.0 if method == apart else radius, "base_loss": 1.95 if method == apart else 0.3}
            | {
                "rise": radius or float("nan"),
                "stderr": 0.01,
                "chance": 1.9459,
                "each_domain": f"rot0 {radius}",
                "highest": radius,
                "ratio": 1.0,
            }
            for method in ("ERM", "SAM", *study.APART)
            for panel in ("source", "target")
            for radius in (0.0, 0.25, 0.5, 1.0)
        ]
    )


@pytest.mark.parametrize("apart", study.APART)
def test_a_method_at_chance_leaves_the_others_radii_as_they_are(apart):
    found = _rows.flatness(curves(apart), study.ends(curves(apart)))
    limits = found["measure"].str.startswith(_rows.LIMIT)
    assert set(found[limits]["method"]) == {"ERM", "SAM", *study.APART} and (found[limits]["value"] == 0.5).all()
    assert set(found[~limits]["method"]) == {"ERM", "SAM", *study.APART} - {apart}
    whole = found[~limits & found["panel"].isin(("source", "target"))]
    assert whole["value"].to_numpy() == pytest.approx(0.25)  # of a rise that is the radius, up to 0.5
    rest = curves()[lambda rows: ~rows["method"].isin(study.APART)]
    assert set(_rows.flatness(rest, study.ends(rest))["method"]) == {"ERM", "SAM"}


def test_the_means_are_over_seeds_for_all_targets_and_for_each():
    each = frame(lambda measure, method, target: 3.0 * (target == "sketch") * (measure == "target"), spread=0.0)
    each = each[each["method"].isin(("ERM", "SWA"))]
    each = pd.concat([each, study.tables.over_seeds(each, ["measure", "method"])], ignore_index=True)
    found = _rows.means(each, study.MEASURES).set_index(["held_out", "method"])["Out of domain (points)"]
    assert list(found.index)[:2] == [("all", "ERM"), ("all", "SWA")] and len(found) == 2 * (1 + len(TARGETS))
    assert found["sketch", "SWA"] == "83.00 ± 0.00" and found["photo", "ERM"] == "80.00 ± 0.00"
    assert found["all", "SWA"] == "81.00 ± 0.00"
    alone = _rows.means(each[each["seed"].isin((0, "all"))], study.MEASURES).set_index(["held_out", "method"])
    assert alone["Out of domain (points)"]["photo", "ERM"] == "80.00"


def test_another_stores_limit_is_kept_and_a_method_that_does_not_reach_it_is_not_compared():
    own = curves("SAM")  # its loss is at chance everywhere
    theirs = _rows.flatness(curves(), study.ends(curves()))
    near = theirs.assign(value=theirs["value"] * (1 - 1e-12))  # rounding, from one store to another
    assert (_rows.limits_of(near, own)["limit"] == 0.5).all()
    found = _rows.flatness(own, _rows.limits_of(near, own))
    read = found[~found["measure"].str.startswith(_rows.LIMIT)]
    assert set(read["method"]) == {"ERM", *study.APART}
    low = pd.DataFrame({"panel": ["source", "target"], "normalisation": "none", "limit": 0.25})
    mean = _rows.flatness(curves(), low)
    assert (mean.loc[mean["measure"] == "source, none", "value"] == 0.125).all()


ASKED = for_data(SMOKE, "PACS").replace(
    model="mobilenet_v2", domains=TARGETS, held_out=TARGETS, seeds=2, leave_out=("SAM", "SWA")
)


def kept(path, setting, names=("ERM", "SAM", "QT-DoG")):
    """Write rows of single runs as a page of this setting has them; return them."""
    each = _rows.points(curves()), _rows.flatness(curves(), study.ends(curves()))
    own = pd.concat([*each, *(each[0][:1].assign(measure=name, value=70.0) for name in study.PERCENT)])
    own = own.loc[own["method"] == "ERM", ["measure", "value"]]
    rows = [
        own.assign(dataset="PACS", method=name, held_out=run.held_out, seed=run.seed, data="f00d").assign(
            made=_rows.made(run, study._page(setting))
        )
        for name, run in study._runs(setting, list(names))
    ]
    found = _rows.wide(pd.concat(rows, ignore_index=True))
    found.to_csv(path, index=False)
    return found


def test_rows_of_another_store_are_read_as_they_were(tmp_path):
    path = tmp_path / "runs.csv"
    written = kept(path, ASKED)
    found = study._kept(ASKED.replace(rows=str(path)))
    pd.testing.assert_frame_equal(
        _rows.wide(found.assign(dataset="PACS"))[list(written)].sort_values(_rows.RUN, ignore_index=True),
        written[written["method"] == "SAM"].sort_values(_rows.RUN, ignore_index=True),
        check_dtype=False,
    )
    assert len(study._kept(ASKED.replace(rows=str(path), seeds=1))["seed"].unique()) == 1
    path.write_text("a,b\n1,2\n")
    for broken in (path, tmp_path / "none.csv", tmp_path):
        with pytest.raises(UserError, match=r"--rows must be a csv with a row for each run"):
            study._kept(ASKED.replace(rows=str(broken)))


@pytest.mark.parametrize(
    ("changes", "ours", "theirs"),
    [
        ({"trial_seed": 5}, "trial_seed (default)", "trial_seed 5"),
        ({"batch_size": 9}, "batch_size 8", "batch_size 9"),
        ({"lr": 1e-5}, "lr 5e-05", "lr 1e-05"),
        ({"steps": 12}, "steps 10", "steps 12"),
        ({"eval_every": 2}, "eval_every 3", "eval_every 2"),
        ({"sam_rho": 0.02}, "step.rho (default)", "step.rho 0.02"),
        ({"weights": "sha256:0"}, "weights imagenet", "weights sha256:0"),
        ({"num_samples": 4}, "num_samples 3", "num_samples 4"),
        ({"rises": (0.1, 0.5)}, "radii.rises 0.02+0.5+1.0", "radii.rises 0.1+0.5+1.0"),
        ({"held_out": (*TARGETS, "cartoon")}, "measurements ", "measurements "),  # other radii
    ],
)
def test_rows_of_runs_that_this_command_would_not_make_are_refused_and_the_difference_is_named(
    tmp_path, changes, ours, theirs
):
    kept(tmp_path / "runs.csv", ASKED.replace(**changes))
    with pytest.raises(UserError) as refused:
        study.FIGURE.plan(ASKED.replace(rows=str(tmp_path / "runs.csv")))
    told = str(refused.value)
    ours_told, theirs_told = told.partition(", got ")[::2]
    assert ours in ours_told and theirs in theirs_told and "SAM on art_painting (PACS), seed 0" in told
    assert "\n" not in told and ("run " in theirs_told.partition(" for ")[0]) is False


def test_the_rho_of_rows_is_that_of_the_command_and_the_caption_says_it(tmp_path):
    path = tmp_path / "runs.csv"
    kept(path, ASKED.replace(sam_rho=0.02))
    asked = ASKED.replace(rows=str(path), sam_rho=0.02)
    assert study.FIGURE.plan(asked)[0] and "SAM: rho 0.02." in study.caption(asked)


def _unlike(column, value, row=0):
    def change(found):
        found[column] = found[column].astype(object) if isinstance(value, str) else found[column]
        found.loc[found.index[found["method"] == "SAM"][row], column] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _unlike("radius at 0.5 nats, none", 0.6, 1),
            r"radius at 0\.5 nats, none must be .* got 0\.5 for .*0\.6 for SAM",
        ),
        (_unlike("limit, target, none", 0.55), r"limit, target, none must be the same"),
        (_unlike("target", 170.0), r"target must be from 0 to 100, got 170 for SAM on art_painting \(PACS\), seed 0"),
        (_unlike("test", -1.0), r"test must be from 0 to 100, got -1"),
        (
            _unlike("source, none", 0.1),
            r"mean of F, source, none, must be that of F at its radii, 0\.25, got 0\.1 for SAM",
        ),
        (_unlike("target", "much"), r"has text in the column 'target'"),
        (_unlike("made", "lr"), r"--rows must have runs as this command would make them"),
        (_unlike("method", "SAMM"), r"Unknown method in .*runs\.csv 'SAMM'; did you mean SAM\?"),
        (_unlike("held_out", "photo"), r"must have one row for SAM on art_painting \(PACS\), seed 0, got 0"),
        (lambda found: found.pop("held_out"), r"has no column held_out"),
        (lambda found: found.pop("made"), r"has no column made"),
        (_unlike("seed", "all"), r"has text in the column 'seed'"),
        (
            lambda found: [found.pop(name) for name in [*found] if "radius" in name],
            r"has no column radius at \.\.\.",
        ),
        (
            lambda found: found.update(found["method"].replace("SAM", "noise")),
            r"must have runs of one of SWA, SAM",
        ),
    ],
)
def test_rows_that_cannot_be_those_of_runs_are_refused(tmp_path, change, message):
    path = tmp_path / "runs.csv"
    found = kept(path, ASKED)
    study._kept(ASKED.replace(rows=str(path)))
    change(found)
    found.to_csv(path, index=False)
    with pytest.raises(UserError, match=message):
        study._kept(ASKED.replace(rows=str(path)))


def test_rows_need_the_baseline_where_it_is_left_out_and_a_method_to_run(tmp_path):
    path = tmp_path / "runs.csv"
    kept(path, ASKED, ["SAM"])
    with pytest.raises(UserError, match=r"--rows must have runs of ERM, with which the others are compared"):
        study._kept(ASKED.replace(rows=str(path), leave_out=("ERM", "SAM")))
    with pytest.raises(UserError, match=r"--leave-out must leave one of ERM, SWA, .* got all of them"):
        study._kept(ASKED.replace(rows=str(path), leave_out=study.ORDER))


def test_rows_of_other_images_are_refused():
    ours = pd.DataFrame({"data": ["f00d", "f00d"]})
    _rows.same_data(ours, ours)
    _rows.same_data(ours, ours.head(0))
    with pytest.raises(UserError, match=r"data of this store, whose fingerprint is f00d, got beef"):
        _rows.same_data(ours, ours.assign(data=["f00d", "beef"]))


def test_radii_of_other_rows_must_be_the_same():
    ours = _rows.points(curves())
    _rows.same_radii(pd.concat([ours, ours]))
    theirs = ours.assign(value=ours["value"].where(ours["measure"] != "radius at 0.5 nats, none", 0.6))
    with pytest.raises(UserError, match=r"radius at 0.5 nats, none must be the same .* 5%, got 0.5 .* and 0.6 .*: why"):
        _rows.same_radii(pd.concat([ours, theirs]), ": why")


def test_what_the_means_of_flatness_are_made_from_is_kept_with_each_run():
    found = _rows.points(curves())
    wide = _rows.wide(found.assign(dataset="PACS", made="", data="")).set_index("method")
    assert len(wide) == 2 + len(study.APART)
    assert (wide["loss, target"] == 0.3).all()
    for rise in (0.25, 0.5, 1.0):
        assert (wide[f"radius at {rise:g} nats, none"] == rise).all()
        assert (wide[f"F at {rise:g} nats, source, none"] == rise).all()
    assert (wide["standard error of F at 1 nats, target, none"] == 0.01).all()
    assert not any("nan" in name or "at 0 " in name for name in wide)
