"""The numbers behind the word "stable": against series written by hand, and of runs through the command line."""

import numpy as np
import pandas as pd
import pytest
from commandline import call, documented
from scipy import stats
from stores import ERM, QT, refuses, trained

from analyses import fig4
from flatlab.report import stability as module
from flatlab.report import tables
from flatlab.report.stability import numbers
from flatlab.resources import published
from flatlab.results.stability import stability
from flatlab.specs.run import AverageSpec
from flatlab.specs.settings import PAPER, QUICK
from flatlab.store.runs import RunStore
from flatlab.train.replay import valley


def test_the_numbers_of_a_series_written_by_hand():
    found = stability([0.7, 0.9, 0.8, 0.9], [0.5, 0.6, 0.8, 0.7])
    assert found.spread == pytest.approx(np.sqrt((0.15**2 + 0.05**2 + 0.15**2 + 0.05**2) / 3))
    assert found.change == pytest.approx((0.1 + 0.2 + 0.1) / 3)
    assert found.regret == pytest.approx(0.8 - 0.6)  # the first of equal validations
    ranks = np.corrcoef([1, 3.5, 2, 3.5], [1, 2, 4, 3])[0, 1]  # Spearman's is Pearson's of the ranks
    assert found.correlation == pytest.approx(ranks) and found.points == 4
    assert stability([1, 2, 3], [0.1, 0.2, 0.4]).correlation == pytest.approx(1)


def test_what_never_moves_has_no_correlation():
    still = stability([0.9, 0.9, 0.9], [0.5, 0.6, 0.7])
    assert np.isnan(still.correlation) and still.regret == pytest.approx(0.2)
    assert stability([0.7, 0.9, 0.8], [0.5] * 3).spread == 0
    two = stability([0.7, 0.9], [0.5, 0.6])
    assert np.isnan(two.correlation) and two.change == pytest.approx(0.1)


def test_too_short_a_series_is_refused():
    refuses(lambda: stability([0.5], [0.5]), "two evaluations", "--eval-every")
    refuses(lambda: stability([0.5] * 3, [0.5] * 4), "(3,)", "(4,)")


def along(seeds=3):
    draw = np.random.default_rng(0)
    cells = [(q, m, t, s, step) for q in module.QUANTITIES for m in ("ERM", "QT-DoG") for t in ("a", "b")
             for s in range(seeds) for step in (0, 30, 60, 90, 120)]  # fmt: skip
    return pd.DataFrame(cells, columns=module.KEYS).assign(value=draw.random(len(cells)))


def test_only_evaluations_from_the_switch_on_count():
    frame = along()
    found = numbers(frame, 30).set_index(["method", "held_out", "seed"])
    assert len(found) == 12 and (found["points"] == 4).all()
    mine = frame[(frame.method == "QT-DoG") & (frame.held_out == "b") & (frame.seed == 2) & (frame.step >= 30)]
    inside, outside = (mine[mine.quantity == name].sort_values("step").value for name in ("validation", "target"))
    row = found.loc[("QT-DoG", "b", 2)]
    assert row.spread == pytest.approx(np.std(outside, ddof=1))
    assert row.correlation == pytest.approx(stats.spearmanr(inside, outside).statistic)
    shuffled = frame.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(numbers(shuffled, 30).set_index(found.index.names).loc[found.index], found)


def test_figure_4_takes_the_papers_targets_or_the_first_and_the_last():
    assert fig4.targets(QUICK) == ("rot0", "rot45") and fig4.targets(QUICK.replace(held_out=("rot15",))) == ("rot15",)
    terra = PAPER.replace(held_out=("location_100", "location_38", "location_43", "location_46"))
    assert fig4.targets(terra) == tuple(published()["figures"]["4"]["test_domains"])


def test_figure_4_shows_what_the_logs_say(tmp_path):
    chosen = QUICK.replace(steps=12, eval_every=2, batch_size=8, seeds=2, held_out=("rot0", "rot45"), switch=4)
    store = RunStore(tmp_path)
    for _, spec in fig4.labelled(chosen):
        trained(tmp_path, spec)
    frame = fig4.table(store, chosen)
    one = fig4.labelled(chosen)[-1][1]
    rows = store.run(one).rows()
    mine = frame[(frame.method == "QT-DoG") & (frame.over == "run") & (frame.held_out == "rot45") & (frame.seed == 1)]
    shown = mine[mine.quantity == "target"].dropna(subset="step").set_index("step").value
    assert shown.to_dict() == {row["step"]: row["target"]["in"]["accuracy"] for row in rows}
    late = [row for row in rows if row["step"] >= 4]
    expected = stability([row["validation"] for row in late], [row["target"]["in"]["accuracy"] for row in late])
    assert mine[mine.quantity == "spread"].value.item() == expected.spread
    band = frame[
        (frame.over == "seeds") & (frame.quantity == "target") & (frame.step == 12) & (frame.held_out == "rot0")
    ]
    assert set(band.method) == {"ERM", "QT-DoG"}
    draws = frame[
        (frame.over == "run") & (frame.quantity == "target") & (frame.step == 12) & (frame.held_out == "rot0")
    ]
    for method, row in band.set_index("method").iterrows():
        told = tables.estimate(draws[draws.method == method].value.to_numpy())
        assert row.value == told["value"] and 0 <= row.low <= row.value <= row.high <= 1
    tested = frame[(frame.quantity == "test") & (frame.over == "run") & frame.step.notna()]
    assert len(tested) == len(frame[(frame.quantity == "target") & (frame.over == "run") & frame.step.notna()])
    last = tested[(tested.method == "QT-DoG") & (tested.held_out == "rot45") & (tested.seed == 1)].value.iloc[-1]
    assert last == tables.tested(rows[-1])
    figure = fig4.draw(frame, fig4.caption(chosen))
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert "source domains,\ntest split (%)" in labels and "held-out domain (%)" in labels
    assert all(
        ax.get_ylim()[1] <= 1
        for ax in figure.axes
        if ax.get_ylabel() in ("source domains, test split (%)", "held-out domain (%)")
    )
    told = fig4.findings(frame).set_index(["method", "quantity"])
    spreads = mine_of(frame, "spread")
    assert told.loc[("QT-DoG", "spread"), "value"] == pytest.approx(100 * (spreads["QT-DoG"] - spreads["ERM"]))
    assert set(told["family_size"]) == {len(told)} and any("Tests: 1 family" in each for each in fig4.remarks(frame))
    both = fig4.labelled(chosen.replace(controls=True))
    assert {name for name, _ in both} == {"ERM", "QT-DoG", "freeze", "release-parity"}


def mine_of(frame, quantity):
    return frame[(frame.quantity == quantity) & (frame.over == "run")].groupby("method").value.mean()


SIGNED = ("correlation", "agreement")


@pytest.mark.parametrize(
    ("quantity", "draws", "least", "most"),
    [
        ("target", [0.99, 1.0, 0.95], 0, 1),
        ("test", [0.0, 0.01, 0.3], 0, 1),
        ("validation", [1.0, 1.0, 1.0], 0, 1),
        ("spread", [0.001, 0.02, 0.0], 0, 1),
        ("change", [0.0, 0.0, 0.0], 0, 1),
        ("regret", [0.0, 0.05, 0.0], 0, 1),
        ("correlation", [0.9, 1.0, 0.1], -1, 1),
        ("agreement", [0.999, 1.0 + 1e-12, 0.95], -1, 1),
        ("vanished", [0.0, 0.0, 0.01], 0, 1),
    ],
)
def test_no_band_leaves_the_bounds_of_what_it_is_of(quantity, draws, least, most):
    frame = pd.DataFrame({"quantity": quantity, "method": "a", "held_out": "rot0", "seed": range(3), "value": draws})
    (row,) = tables.over_seeds_within(frame, ["quantity", "method"], correlations=SIGNED).itertuples()
    assert row.value == pytest.approx(np.mean(draws))
    assert least <= row.low <= row.value <= row.high <= most
    plain = tables.estimate(draws)
    if np.ptp(draws):
        assert not least <= plain["low"] <= plain["high"] <= most  # where the plain interval does
    alone = tables.over_seeds_within(frame[frame.seed == 0], ["quantity", "method"], correlations=SIGNED)
    assert alone["low"].isna().all() and alone["value"].notna().all()


def test_within_the_bounds_a_band_is_nearly_the_plain_one():
    draws = np.array([0.50, 0.51, 0.52, 0.49])
    frame = pd.DataFrame({"quantity": "target", "method": "a", "held_out": "rot0", "seed": range(4), "value": draws})
    (row,) = tables.over_seeds_within(frame, ["quantity", "method"], correlations=SIGNED).itertuples()
    plain = tables.estimate(draws)
    assert (row.low, row.high) == pytest.approx((plain["low"], plain["high"]), abs=1e-4)


def test_the_command_compares_runs_from_the_latest_switch_on(tmp_path, capsys):
    for each in (ERM, QT):
        trained(tmp_path, each)
    words = ("--store", tmp_path, "--out", tmp_path / "figures", "--json")
    assert call("stability", ERM.digest[:8], QT.digest[:8], *words) == 0
    assert {row["points"] for row in documented("stability", capsys.readouterr().out)} == {3}  # 8, 12, 13
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".csv", ".pdf", ".png"}
    assert call("stability", ERM.digest[:8], QT.digest[:8], "--valley", *words) == 0
    assert '"valley threshold":' in capsys.readouterr().out
    assert call("stability", ERM.digest[:8], "--since", "12", *words) == 2
    assert "fewer than three evaluations from step 12" in capsys.readouterr().err
    assert call("reproduce", "fig3", "--controls", "--store", tmp_path, "--dry-run") == 2
    assert "--controls does nothing for fig3" in capsys.readouterr().err


class Logged:
    """A run with a log written by hand: an evaluation each ten steps."""

    spec = ERM

    def __init__(self, losses):
        self.losses = losses

    def rows(self):
        return [{"step": 10 * i, "validation_loss": loss} for i, loss in enumerate(self.losses)]


def test_the_valley_of_a_scripted_loss_is_the_one_worked_out_by_hand():
    chosen = AverageSpec(converge=3, tolerance=3, ratio=0.3)
    found = valley(Logged([1.0, 0.6, 0.5, 0.55, 0.52, 0.5, 0.8, 0.9, 0.95, 1.0]), chosen)
    assert found["threshold"] == pytest.approx(1.3 * (0.5 + 0.55 + 0.52) / 3)
    assert (found["start"], found["end"], found["dead"]) == (20, 50, True)  # segments 2 to 5
    falling = valley(Logged([1.0, 0.9, 0.8, 0.7, 0.6]), chosen)
    assert falling["start"] is None and falling["threshold"] is None
    alive = valley(Logged([1.0, 0.5, 0.6, 0.7, 0.6, 0.55]), chosen)
    assert (alive["start"], alive["end"], alive["dead"]) == (10, 50, False)
