"""What decides in Figure 3, and the one rule from tests to sentences: closed forms, simulated families, exact words."""

import itertools

import numpy as np
import pandas as pd
import pytest

from analyses import fig3
from flatlab.report import tables, verdicts
from flatlab.report.areas import areas, areas_by_domain, limits, named_by_rise
from flatlab.results.estimate import Estimate

RADII, RISES = [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.1, 0.3, 0.5, 1.0]
SCALE = {"ERM": 1.0, "SAM": 0.5, "SWA": 1.0, "SWAD": 0.9, "QT-DoG": 0.8}


def frame(*, seeds=4, base=0.1, noise=0.01, radii=RADII, rises=RISES):
    """Return what Figure 3's table holds of runs: rises are SCALE times the nominal ones, but for noise by seed."""
    rng = np.random.default_rng(0)
    rows = []
    for kind, method, held_out, seed in itertools.product(("none", "filter"), SCALE, ("a", "b"), range(seeds)):
        for panel in ("source", "target"):
            own = SCALE[method] + noise * rng.normal()
            for radius, rise in zip(radii, rises, strict=True):
                where = {"panel": panel, "normalisation": kind, "method": method, "held_out": held_out, "seed": seed}
                rows.append({**where, "radius": radius, "rise": rise, "value": own * rise})
    return pd.DataFrame(rows).assign(over="directions", base_loss=base, chance=np.log(10))


# --- areas


def test_the_mean_of_f_is_the_trapezoid_over_the_radius():
    each = frame(noise=0.0)
    found = areas(each, limits(each)).set_index(["panel", "normalisation", "method", "held_out", "seed"])["value"]
    own = (0.05 * 1 + 0.2 * 1 + 0.4 * 1) / 3  # between 0, 0.1, 0.3 and 0.5 nats
    for method, scale in SCALE.items():
        assert found["source", "none", method, "a", 0] == pytest.approx(own * scale)
    fine = np.linspace(0, 1, 301)
    curve = frame(noise=0.0, radii=list(2 * fine), rises=list(0.5 * fine**2))
    assert areas(curve, limits(curve))["value"].iloc[0] == pytest.approx(0.5 / 3, rel=1e-4)  # of c r^2: c R^2 / 3


def test_the_mean_of_f_of_single_domains_of_the_sharpest_and_its_ratio():
    """Domain "c 1" is sharper at small radii, "d" at large ones."""
    each = frame(noise=0.0)
    parts = {"c 1": each["value"] * (1.6 - 0.4 * each["radius"]), "d": each["value"] * (0.4 + 0.4 * each["radius"])}
    pairs = zip(parts["c 1"], parts["d"], strict=True)
    each = each.assign(each_domain=[f"c 1 {a:.9g}; d {b:.9g}" for a, b in pairs])
    each["highest"] = np.maximum(parts["c 1"], parts["d"])
    found = areas_by_domain(each, limits(each))
    assert set(found["panel"]) == {"source", "target", "highest", "ratio", "c 1", "d"}
    of = found.query("normalisation == 'none' and method == 'ERM' and held_out == 'a' and seed == 0")
    of = of.set_index("panel")["value"]
    rises = np.array(RISES[:4])  # up to 0.5 nats, at radii 0 to 3
    c, d = rises * [1.6, 1.2, 0.8, 0.4], rises * [0.4, 0.8, 1.2, 1.6]
    expected = {"c 1": c, "d": d, "highest": np.maximum(c, d), "source": rises}
    for panel, curve in expected.items():
        assert of[panel] == pytest.approx((curve[0] / 2 + curve[1] + curve[2] + curve[3] / 2) / 3)
    assert of["ratio"] == pytest.approx(of["highest"] / of["source"]) and of["ratio"] > 1.2


def test_nothing_is_read_beyond_half_a_nat_or_where_guessing_is_reached():
    ends = limits(frame(noise=0.0))
    assert (ends["limit"] == 3.0).all() and ends["met"].isna().all()
    late = frame(noise=0.0, base=np.log(10) - 0.4)  # ERM's and SWA's 0.5 reach it, SWAD's 0.45, and QT-DoG's 0.4
    ends = limits(late)
    assert (ends["limit"] == 2.0).all() and (ends["met"] == 3.0).all() and set(ends["by"]) == {"ERM, SWA, SWAD, QT-DoG"}
    late.loc[(late["method"] == "SAM") & (late["radius"] == 1.0), "value"] = np.inf
    assert limits(late)["limit"].isna().all() and set(limits(late)["by"]) == {"SAM"}
    assert areas(late, limits(late))["value"].isna().all()


def test_radii_that_were_given_are_named_by_the_baselines_rise():
    given = frame(noise=0.0).assign(rise=np.nan)
    given.loc[given["panel"] == "target", "value"] *= 2
    named = named_by_rise(given, "ERM")
    assert named.groupby("radius")["rise"].unique().apply(list).to_dict() == {
        radius: [pytest.approx(rise)] for radius, rise in zip(RADII, RISES, strict=True)
    }
    kept = frame()
    pd.testing.assert_series_equal(named_by_rise(kept, "ERM")["rise"], kept["rise"])


# --- Figure 3


def test_each_pair_is_tested_in_families_of_a_panel_and_a_normalisation():
    each = frame()
    found = fig3.findings(each)
    primary, single = found[found["quantity"] != "at"], found[found["quantity"] == "at"]
    assert len(primary) == 4 * 7 and primary["family"].nunique() == 4 and set(primary["family_size"]) == {7}
    assert set(zip(primary["method"], primary["baseline"], strict=True)) == set(fig3.PAIRS)
    assert len(single) == 4 * 7 * 4 and set(single["family_size"]) == {0, 21}  # three radii of at most 0.5 nats
    assert (single[single["radius"] == 4.0]["verdict"] == verdicts.UNREAD).all()
    assert set(found["correction"]) == {"Holm"} and (primary["p_holm"] >= primary["p"]).all()
    row = primary.set_index(["panel", "normalisation", "method", "baseline"]).loc[("source", "none", "SAM", "ERM")]
    at = areas(each, limits(each)).query("panel == 'source' and normalisation == 'none'")
    less = at.pivot_table(index="seed", columns="method", values="value")
    assert row["value"] == pytest.approx((less["SAM"] - less["ERM"]).mean()) and row["verdict"] == "lower"
    assert (row["radius"], row["rise"]) == (3.0, 0.5)


def test_the_page_has_every_pair_and_says_which_corrections():
    each = frame()
    shown = fig3.summary(fig3.findings(each))
    assert shown["pair"].tolist() == [f"{a} less {b}" for a, b in fig3.PAIRS]
    assert list(shown.columns[1:]) == ["source, γ ≤ 3", "target, γ ≤ 3", "source, ρ ≤ 3", "target, ρ ≤ 3"]
    assert shown.set_index("pair").loc["SAM less ERM", "source, γ ≤ 3"].partition(" ")[0].endswith("*")
    told = fig3.remarks(each)
    start = "Mean of F up to γ = 3 (ERM's rise: 0.5 nats), source domains: "
    assert told[0].startswith(start) and "SAM is flatter than ERM (-0.1" in told[0] and "SWA is" not in told[0]
    assert told[0].endswith("no difference is established for the other pair.")  # SWA and ERM are alike
    assert "4 families of 7 tests" in told[4] and "Holm" in told[4] and "0.2 of 4" in told[4]
    assert "SAM is flatter than ERM at γ = 1, γ = 2, γ = 3" in told[5]
    assert told[-1] == "Chance (2.30 nats), held-out domain, ρ: the loss stays below at all radii."


def test_past_chance_and_with_one_seed_no_verdict_is_read():
    beyond = frame(base=2.4)
    assert set(fig3.findings(beyond)["verdict"]) == {verdicts.UNREAD}
    assert set(fig3.summary(fig3.findings(beyond)).iloc[:, 1:].to_numpy().ravel()) == {"not read"}
    told = fig3.remarks(beyond)
    assert told[0].endswith("source domains: no test was made.") and "reached at 0 by ERM" in told[-1]
    alone = fig3.remarks(frame(seeds=1))
    assert alone[0].endswith("there is no test, and no difference is established.")
    assert "Tests of the mean of F (primary): none, so that there is no verdict." in alone


# --- the rule


def test_families_of_nothing_hold_a_verdict_in_at_most_one_of_twenty():
    """2,000 families of the figure's pairs, whose methods differ by chance alone, with three seeds."""
    families, seeds = 2000, 3
    drawn = dict(zip(fig3.ORDER, np.random.default_rng(3).normal(size=(5, families, seeds)), strict=True))
    rows = []
    for method, baseline in fig3.PAIRS:
        less = drawn[method] - drawn[baseline]
        for family, (value, spread) in enumerate(zip(less.mean(axis=1), less.std(axis=1, ddof=1), strict=True)):
            p = Estimate(value, spread / np.sqrt(seeds), seeds - 1).p_value
            rows.append({"method": method, "baseline": baseline, "value": value, "p": p, "family": f"{family}"})
    found = pd.DataFrame(rows)
    alone = (found["p"] < 0.05).groupby(found["family"]).any().mean()
    told = verdicts.corrected(found, found["family"])
    share = (told["verdict"] != verdicts.NONE).groupby(told["family"]).any().mean()
    assert alone > 0.15  # what uncorrected intervals would claim
    assert 0.01 < share <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / families)


def test_a_paired_p_value_and_the_interval_say_the_same():
    found = tables.paired(frame(noise=0.3), "ERM", ["panel", "normalisation", "radius"])
    known = found[found["p"].notna() & (found["radius"] > 0)]
    assert len(known) and ((known["p"] < 0.05) == (known["low"] * known["high"] > 0)).all()


@pytest.mark.parametrize("off", [0.0, 1e-15])
@pytest.mark.parametrize("less", [0.0, 1.25])
def test_seeds_that_agree_by_chance_give_no_verdict(less, off):
    """Accuracies on few images agree; the p-value would be 0."""
    rows = [("ERM", seed, 80.0 + seed) for seed in range(3)]
    rows += [("A", seed, 80.0 + seed + less + off * seed) for seed in range(3)]
    frame = pd.DataFrame(rows, columns=["method", "seed", "value"]).assign(held_out="rot0", kind="test")
    found = tables.paired(frame, "ERM", ["kind"])
    assert found["value"].item() == pytest.approx(less) and found[["low", "high", "p"]].isna().all(axis=None)
    told = verdicts.corrected(found, found["kind"])
    assert verdicts.sentences(told)[0].endswith("there is no test, and no difference is established.")
    assert verdicts.cells(told) == [f"{less:+.3f} (no interval)"]


def test_sentences_follow_from_the_family_and_nothing_else():
    rows = [
        ("A", "ERM", -0.2, -0.3, -0.1, 0.001, "F"),
        ("B", "ERM", 0.1, 0.01, 0.2, 0.04, "F"),
        ("C", "ERM", 0.3, 0.2, 0.4, 0.001, "G"),
    ]
    bare = pd.DataFrame(rows, columns=["method", "baseline", "value", "low", "high", "p", "family"])
    found = verdicts.corrected(bare, bare["family"])
    assert found["p_holm"].tolist() == pytest.approx([0.002, 0.04, 0.001])
    assert found["family_size"].tolist() == [2, 2, 1]
    assert verdicts.sentences(found, unit="points", digits=1) == [
        "F: A is lower than ERM (-0.2 [-0.3, -0.1] points, p = 0.002); B is higher than ERM (+0.10 [+0.01, +0.20] "
        "points, p = 0.04).",
        "G: C is higher than ERM (+0.3 [+0.2, +0.4] points, p = 0.001).",
    ]
    larger = verdicts.corrected(bare.assign(p=[0.001, 0.06, 0.001]), bare["family"].replace("G", "F"))
    assert larger["verdict"].tolist() == ["lower", verdicts.NONE, "higher"]
    assert verdicts.sentences(larger.iloc[1:2]) == ["F: no difference is established for the pair."]
    assert verdicts.statement(larger).startswith("Tests: 1 family of 3 tests, paired t tests over seeds, corrected by")
    assert "3 of 3 exclude zero, 0.15 would by chance." in verdicts.statement(larger)


def test_an_interval_without_zero_does_not_end_at_zero():
    assert verdicts.bracketed(0.006, 0.0049, 0.007, digits=2, starred=True) == "+0.006* [+0.005, +0.007]"
    assert verdicts.bracketed(0.3, 0.1, 0.5, digits=2, starred=True) == "+0.30* [+0.10, +0.50]"
    assert verdicts.bracketed(0.006, -0.004, 0.016, digits=2) == "+0.01 [-0.00, +0.02]"
