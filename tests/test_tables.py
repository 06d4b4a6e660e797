"""Tables against plain pandas and SciPy, on hand-written frames and stores."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatlab import files
from flatlab.errors import UserError
from flatlab.report import tables
from flatlab.results.estimate import Cost
from flatlab.results.sphere import SamplingPlan, SphereFlatness
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.quantizers import QuantSpec
from flatlab.specs.run import RunSpec
from flatlab.store.runs import RunStore

RUN = RunSpec(dataset="digits", held_out="rot15", image_size=16, model="digits-cnn", steps=10, eval_every=5, lr=0.1)
PROBE = SphereSpec(radii=(0.0, 1.0, 2.0), num_samples=4)
DOMAINS = ["rot0", "rot15", "rot30", "rot45"]


def crossed(methods=("ERM", "SAM", "SWA"), targets=("rot0", "rot15"), seeds=(0, 1, 2)):
    """Return a shuffled frame with one row for each method, radius, held-out domain and seed."""
    rng = np.random.default_rng(0)
    cells = list(itertools.product(methods, (1.0, 2.0), targets, seeds))
    frame = pd.DataFrame(cells, columns=["method", "radius", "held_out", "seed"])
    return frame.assign(value=rng.normal(size=len(frame)), unused=1.0).sample(frac=1, random_state=0)


# --- intervals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_an_estimate_is_students_interval(level):
    draws = np.random.default_rng(1).normal(size=7)
    found = tables.estimate(draws, level)
    assert found["value"] == pytest.approx(draws.mean())
    assert found["stderr"] == pytest.approx(stats.sem(draws))
    interval = stats.t.interval(level, 6, loc=draws.mean(), scale=stats.sem(draws))
    assert (found["low"], found["high"]) == pytest.approx(interval)


def test_one_draw_has_no_interval_and_infinities_are_shown():
    alone = tables.estimate([2.0])
    assert alone["value"] == 2.0 and np.isnan([alone["stderr"], alone["low"], alone["high"]]).all()
    assert tables.estimate([1.0, np.inf])["value"] == np.inf
    assert np.isnan(tables.estimate([1.0, np.nan, 2.0])["value"])


def test_over_seeds_averages_domains_within_a_seed_and_seeds_are_the_replicates():
    frame = crossed()
    found = tables.over_seeds(frame, ["method", "radius"]).set_index(["method", "radius"])
    assert len(found) == 6
    for (method, radius), row in found.iterrows():
        mine = frame[(frame["method"] == method) & (frame["radius"] == radius)]
        seeds = [mine[mine["seed"] == seed]["value"].mean() for seed in (0, 1, 2)]
        assert row["value"] == pytest.approx(np.mean(seeds))
        interval = stats.t.interval(0.95, 2, loc=np.mean(seeds), scale=stats.sem(seeds))
        assert (row["low"], row["high"]) == pytest.approx(interval)
        assert (row["held_out"], row["seed"], row["over"]) == ("all", "all", "seeds")


def test_paired_is_the_paired_t_interval_over_seeds():
    frame = crossed()
    frame.loc[frame["method"] == "SWA", "value"] -= 100
    found = tables.paired(frame, "ERM", ["radius"]).set_index(["method", "radius"])
    assert set(found.index) == set(itertools.product(("SAM", "SWA"), (1.0, 2.0)))
    for (method, radius), row in found.iterrows():
        at = frame[frame["radius"] == radius].groupby(["method", "seed"])["value"].mean()
        test = stats.ttest_rel(at[method], at["ERM"])
        assert row["value"] == pytest.approx((at[method] - at["ERM"]).mean())
        interval = test.confidence_interval(0.95)
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
        assert row["p"] == pytest.approx(test.pvalue) and row["baseline"] == "ERM"
    assert "verdict" not in found  # which family decides


def test_one_seed_gives_a_difference_without_a_verdict():
    found = tables.paired(crossed(seeds=(4,)), "ERM", ["radius"])
    assert np.isfinite(found["value"]).all() and found["low"].isna().all()
    assert found["p"].isna().all()


def test_a_loss_that_is_none_stays_visible():
    frame = crossed()
    broken = (frame["method"] == "SAM") & (frame["seed"] == 1) & (frame["radius"] == 2) & (frame["held_out"] == "rot0")
    frame.loc[broken, "value"] = np.nan
    over = tables.over_seeds(frame, ["method", "radius"]).set_index(["method", "radius"])["value"]
    assert np.isnan(over["SAM", 2.0]) and over.isna().sum() == 1
    pairs = tables.paired(frame, "ERM", ["radius"]).set_index(["method", "radius"])
    assert np.isnan(pairs.loc[("SAM", 2.0), "value"]) and pairs["value"].isna().sum() == 1
    assert np.isnan(pairs.loc[("SAM", 2.0), "p"])


def test_uneven_groups_and_missing_partners_are_refused():
    frame = crossed()
    gone = (frame["method"] == "SAM") & (frame["seed"] == 1) & (frame["held_out"] == "rot15") & (frame["radius"] == 2)
    with pytest.raises(UserError, match=r"^SAM, 2\.0: 0 rows with rot15 held out and seed 1; a mean over seeds needs"):
        tables.over_seeds(frame[~gone], ["method", "radius"])
    with pytest.raises(UserError, match=r"2 rows with "):
        tables.over_seeds(frame, ["method"])
    erm = (frame["method"] == "ERM") & (frame["seed"] == 1) & (frame["held_out"] == "rot15")
    with pytest.raises(UserError, match=r"^S.. with rot15 held out and seed 1 has no partner of ERM\.$"):
        tables.paired(frame[~erm], "ERM", ["radius"])
    with pytest.raises(UserError, match=r" has no partner of FQAT\.$"):
        tables.paired(frame, "FQAT", ["radius"])


# --- from the store ----------------------------------------------------------------------------------------------


def measured(store, spec, samples):
    run = store.run(spec)
    run.create()
    run.finish()
    measurement = run.measurement(PROBE)
    measurement.create()
    flat = SphereFlatness(
        radii=np.array(PROBE.radii),
        visits=tuple(samples[:, index] for index in range(len(PROBE.radii))),
        plans=tuple(SamplingPlan(radius, 0) for radius in PROBE.radii),
        blocks=(1,) * len(PROBE.radii),
        stopped=("samples",) * len(PROBE.radii),
        strata=tuple(DOMAINS),
        base_loss=np.arange(4.0),
        chance=2.3,
        normalisation="none",
        seed=0,
        num_params=10,
        norm=2.0,
        cost=Cost(),
    )
    files.save_arrays(measurement.result, *flat.to_arrays())
    measurement.finish()


def test_flatness_has_a_panel_of_source_domains_and_one_of_the_held_out(tmp_path):
    samples = np.random.default_rng(2).normal(size=(4, 3, 4))  # directions, radii, domains
    measured(RunStore(tmp_path), RUN, samples)
    frame = tables.flatness(RunStore(tmp_path), [("ERM", RUN, PROBE)])
    assert list(frame["panel"]) == ["source"] * 3 + ["target"] * 3
    assert list(frame["radius"]) == [0.0, 1.0, 2.0] * 2
    assert list(frame["base_loss"]) == [5 / 3] * 3 + [1.0] * 3 and set(frame["chance"]) == {2.3}
    assert frame["rise"].isna().all()
    draws = {"source": samples[:, :, [0, 2, 3]].mean(axis=2), "target": samples[:, :, 1]}
    for row in frame.itertuples():
        expected = draws[row.panel][:, PROBE.radii.index(row.radius)]
        assert (row.value, row.stderr) == pytest.approx((expected.mean(), stats.sem(expected)))
        assert (row.held_out, row.seed, row.over, row.method) == ("rot15", 0, "directions", "ERM")


def test_what_is_not_measured_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"^Run {RUN.digest} \(ERM, rot15\) is not measured yet: .*{PROBE.digest}"):
        tables.flatness(RunStore(tmp_path), [("ERM", RUN, PROBE)])


def row(step, validation, inside, outside):
    target = {"in": {"accuracy": inside}, "out": {"accuracy": outside}}
    return {"step": step, "validation": validation, "target": target}


LOG = [row(0, 0.9, 0.1, 0.9), row(5, 0.5, 0.2, 0.4), row(10, 0.8, 0.3, 0.5), row(15, 0.6, 0.4, 0.7)]


def logged(store, spec, *, done=True):
    run = store.run(spec)
    run.create()
    run.write_log(LOG)
    if done:
        run.finish()


def test_accuracies_by_selection_rule_count_the_looks_at_the_target(tmp_path):
    store = RunStore(tmp_path)
    quantized = RUN.replace(quantizer=QuantSpec(), switch=4)
    logged(store, RUN)
    logged(store, quantized)
    frame = tables.accuracies(store, [("ERM", RUN), ("QT-DoG", quantized)])
    columns = ["method", "selection", "step", "validation", "target", "looks"]
    assert frame[columns].to_numpy().tolist() == [
        ["ERM", "training-domain", 0, 0.9, 0.1, 1],
        ["ERM", "oracle", 0, 0.9, 0.1, 4],
        ["ERM", "last", 15, 0.6, 0.4, 1],
        ["QT-DoG", "training-domain", 10, 0.8, 0.3, 1],
        ["QT-DoG", "oracle", 15, 0.6, 0.4, 3],
        ["QT-DoG", "last", 15, 0.6, 0.4, 1],
    ]
    both = tables.accuracies(store, [("ERM", RUN), ("QT-DoG", quantized)], among_all=True)
    more = both[~both["selection"].isin(frame["selection"])]
    assert more[columns].to_numpy().tolist() == [["QT-DoG", "training-domain, all steps", 0, 0.9, 0.1, 1]]
    with pytest.raises(UserError, match=r"\(SAM, rot15, seed 3\) is not trained yet\.$"):
        tables.accuracies(store, [("ERM", RUN), ("SAM", RUN.replace(seed=3))])


def test_an_overview_says_how_far_each_run_is(tmp_path):
    store = RunStore(tmp_path)
    frame, faults = tables.overview(store)
    assert frame.empty and "composition" in frame and faults == []
    fresh, going = RUN.replace(seed=1), RUN.replace(seed=2, quantizer=QuantSpec(), switch=4)
    logged(store, RUN)
    logged(store, going, done=False)
    store.run(fresh).create()
    frame = tables.overview(store)[0].set_index("run")
    assert dict(frame["state"]) == {RUN.digest: "done", going.digest: "step 15", fresh.digest: "begun"}
    assert frame.loc[going.digest, ["composition", "validation", "target"]].tolist() == ["lsq", 0.8, 0.3]
    assert frame.loc[fresh.digest, ["validation", "target"]].isna().all()
