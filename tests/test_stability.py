"""The numbers behind the word "stable": against series written by hand, and of runs through the command line."""

import numpy as np
import pandas as pd
import pytest
from commandline import call
from scipy import stats
from stores import ERM, QT, refuses, trained

from analyses import fig4
from flatlab import stability as module
from flatlab import tables
from flatlab.resources import published
from flatlab.runs import RunStore
from flatlab.settings import PAPER, QUICK
from flatlab.stability import numbers, stability


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


def test_too_short_a_series_is_refused():
    refuses(lambda: stability([0.5, 0.6], [0.5, 0.6]), "three evaluations", "--eval-every")
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
    inside, outside = (mine[mine.quantity == name].sort_values("step").value for name in module.QUANTITIES)
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
        assert (row.value, row.low, row.high) == (told["value"], told["low"], told["high"])
    both = fig4.labelled(chosen.replace(controls=True))
    assert {name for name, _ in both} == {"ERM", "QT-DoG", "freeze", "release-parity"}


def test_the_command_compares_runs_from_the_latest_switch_on(tmp_path, capsys):
    for each in (ERM, QT):
        trained(tmp_path, each)
    words = ("--store", tmp_path, "--out", tmp_path / "figures", "--json")
    assert call("stability", ERM.digest[:8], QT.digest[:8], *words) == 0
    assert '"points":3' in capsys.readouterr().out  # 8, 12, 13
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".csv", ".pdf", ".png"}
    assert call("stability", ERM.digest[:8], "--since", "12", *words) == 2
    assert "fewer than three evaluations from step 12" in capsys.readouterr().err
    assert call("reproduce", "fig3", "--controls", "--store", tmp_path, "--dry-run") == 2
    assert "--controls does nothing for fig3" in capsys.readouterr().err
