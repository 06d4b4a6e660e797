"""Runs for tuning: nothing is computed on the held-out domain, and all else is as without the option."""

import json
from functools import partial

import pytest
from commandline import TINY, call
from stores import GROUP, QT, refuses, spec, trained

from flatlab.loading.data import Domains
from flatlab.report import stability, tables
from flatlab.specs.methods import METHODS, compose
from flatlab.specs.settings import SMOKE
from flatlab.store.runs import RunStore


@pytest.fixture
def unseen(monkeypatch):
    """Fail where images of a held-out domain are asked for."""
    own = Domains.evaluation

    def evaluation(self, part, names, device):
        assert self.target not in names
        return own(self, part, names, device)

    monkeypatch.setattr(Domains, "evaluation", evaluation)


def test_the_held_out_domain_is_never_evaluated(tmp_path, unseen):
    del unseen
    for runs in ([each.replace(target_logged=False) for each in GROUP], [QT.replace(target_logged=False)]):
        store = trained(tmp_path / "tuning", *runs)
        for run in map(store.run, runs):
            assert run.done and all("target" not in row and row["looks"] == 0 for row in run.rows())
        found = tables.accuracies(store, [("tuned", each) for each in runs])
        assert found["target"].isna().all() and (found["looks"] == 0).all() and "oracle" not in set(found["selection"])
        assert (found["validation"] > 0).all()
        refuses(partial(stability.curves, store, [("tuned", runs[0])]), "--no-target")


def test_the_weights_are_the_same_and_the_name_is_another(tmp_path):
    run, tuned = spec(), spec().replace(target_logged=False)
    assert run.digest != tuned.digest and "target_logged" not in json.loads(run.canonical())
    seen, unseen = trained(tmp_path / "a", run).run(run), trained(tmp_path / "b", tuned).run(tuned)
    same = ("step", "source", "validation", "validation_loss", "train_loss")
    assert [[row[name] for name in same] for row in seen.rows()] == [
        [row[name] for name in same] for row in unseen.rows()
    ]
    assert [row["looks"] for row in seen.rows()] == list(range(1, len(seen.rows()) + 1))


def test_the_option_makes_such_runs(tmp_path, capsys):
    words = (*TINY, "--no-target", "--store", tmp_path, "--json")
    assert call("train", *words, "--method", "sam", "--sam-rho", "0.2") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["target"] for row in rows} == {None}
    (run,) = RunStore(tmp_path).runs()
    assert not run.spec.target_logged and run.spec.step.rho == 0.2
    assert call("runs", "list", "--store", tmp_path) == 0
    assert call("reproduce", "fig3", *words) == 2  # a figure needs the held-out domain


@pytest.mark.parametrize("words", [("--sam-rho", "0.1"), ("--swad-every", "3"), ("--method", "swad", "--sam-rho", "1")])
def test_options_of_other_methods_are_refused(tmp_path, capsys, words):
    assert call("train", *TINY, "--store", tmp_path, *words) == 2
    assert "does nothing" in capsys.readouterr().err


def test_the_interval_of_swad_is_the_settings():
    setting = SMOKE.replace(swad_every=3)
    assert compose(METHODS["SWAD"], setting, held_out="rot0", seed=0, trial_seed=0).average.every == 3
