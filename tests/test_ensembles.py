"""Ensembles: what their members say together, and that they are runs like any other."""

import itertools

import numpy as np
import pytest
import torch
from commandline import call
from stores import ERM, PLACE, QT, SIZES, TINY, content, refuses, spec, trained
from torch import nn

from flatlab.jobs import plan as jobs_plan
from flatlab.jobs.worker import work
from flatlab.loading import data as loading_data
from flatlab.loading.checkpoint import network as network_of
from flatlab.measure.inputs import landscape
from flatlab.measure.runner import measure
from flatlab.models.networks import Ensemble
from flatlab.quant.attach import bake, quantized_layers
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.methods import METHODS, compose
from flatlab.store.runs import RunStore
from flatlab.train.derived import join


class Says(nn.Module):
    """Says the same, whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits, dtype=torch.float64))

    def forward(self, inputs):
        return self.logits.expand(len(inputs), -1)


LOGITS = [[3.0, 0.0, -1.0], [0.0, 0.5, 0.0], [0.0, 2.2, 0.1]]


def said(logits, combine="logits"):
    return Ensemble(map(Says, logits), combine=combine)(torch.zeros(2, 1))[0].numpy()


def test_logits_are_averaged_or_probabilities():
    np.testing.assert_allclose(said(LOGITS), np.mean(LOGITS, axis=0))
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    found = np.exp(said(LOGITS, "probabilities"))
    np.testing.assert_allclose(found, probabilities.mean(0), rtol=1e-12)
    assert said(LOGITS).argmax() == 0 and said(LOGITS, "probabilities").argmax() == 1  # the choice matters


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_the_order_does_not_matter_and_twins_say_what_one_says(combine):
    each = [said(order, combine) for order in itertools.permutations(LOGITS)]
    np.testing.assert_allclose(each, np.broadcast_to(each[0], np.shape(each)), rtol=1e-12, atol=1e-14)
    alone = said(LOGITS[:1], combine)
    np.testing.assert_allclose(said(LOGITS[:1] * 4, combine), alone, rtol=1e-12, atol=1e-14)


MIXED = ERM.replace(members=(ERM, QT, spec("SMA", seed=1)))  # of several kinds


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = trained(tmp_path_factory.mktemp("ensembles"), ERM)
    for member in (QT, spec("SMA", seed=1)):
        trained(store.root, member)
    join(MIXED, store, PLACE)
    return store


def test_an_ensemble_answers_with_its_members_checkpoints(store):
    run = store.run(MIXED)
    assert content(run) and [row["step"] for row in run.rows()] == [TINY.steps]
    joint = network_of(run, "selected", PLACE)
    domains = loading_data.domains(MIXED, PLACE)
    images = domains.data.normalise(domains.data.domain("rot45").images[:20])
    with torch.no_grad():
        each = [network_of(store.run(member), "selected", PLACE)(images) for member in MIXED.members]
        torch.testing.assert_close(joint(images), torch.stack(each).mean(0))
        hits = joint(domains.data.normalise(domains.data.domain("rot45").images)).argmax(1).numpy()
    right = hits == domains.data.domain("rot45").labels.numpy()
    target = run.rows()[0]["target"]  # the two parts together are the whole target
    assert target["in"]["n"] + target["out"]["n"] == len(right)
    assert sum(part["accuracy"] * part["n"] for part in target.values()) == pytest.approx(right.sum())


def test_an_ensemble_is_baked_and_measured_as_any_run(store):
    run = store.run(MIXED)
    network = network_of(run, "selected", PLACE)
    assert len(quantized_layers(network)) == 3
    before = network(torch.ones(2, 1, 16, 16))
    bake(network)
    assert not quantized_layers(network) and torch.equal(network(torch.ones(2, 1, 16, 16)), before)
    measurement = SphereSpec(radii=(0.0, 1.0), num_samples=2, images=8)
    measure(run, measurement, PLACE)
    assert run.measurement(measurement).done
    assert landscape(run, measurement, PLACE).num_params == 3 * landscape(store.run(ERM), measurement, PLACE).num_params


def test_members_are_trained_first_and_shared_with_who_else_wants_them(tmp_path):
    store = RunStore(tmp_path)
    eoq, ensemble = (
        compose(METHODS[name], TINY, held_out="rot45", seed=0, trial_seed=0) for name in ("EoQ", "ERM-ensemble")
    )
    todo = jobs_plan.missing(store, [eoq, ensemble, ERM], [], sizes=SIZES)
    names = [job.name.split(" on ")[0] for job in todo]
    assert sorted(names) == sorted(["train erm"] * 2 + ["train lsq"] * 2 + ["make 2 x lsq", "make 2 x erm"])
    assert set(todo[-2].needs + todo[-1].needs) == {member.digest for member in eoq.members + ensemble.members}
    events = []
    work(todo, store, PLACE, emit=events.append)
    assert not [event for event in events if "error" in event]
    assert store.run(eoq).done and store.run(ensemble).done
    assert not jobs_plan.missing(store, [eoq, ensemble, ERM], [], sizes=SIZES)
    done = store.run(eoq).path / "done"
    stamp = done.stat().st_mtime_ns
    join(eoq, store, PLACE)
    assert done.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ((ERM, QT), "erm + lsq"),
        ((QT, ERM), "lsq + erm"),
        ((ERM, QT, spec("SMA", seed=1)), "erm + lsq + sma"),
        ((ERM, QT, QT.replace(seed=1)), "erm + 2 x lsq"),
        ((QT, QT.replace(seed=1)), "2 x lsq"),
        ((QT,), "1 x lsq"),
        ((QT.replace(members=(QT, ERM)), QT), "(lsq + erm) + lsq"),
    ],
)
def test_an_ensemble_is_labelled_by_its_members(members, label):
    assert members[0].replace(members=members).label == label


def test_an_ensemble_of_what_is_not_trained_is_refused(tmp_path):
    refuses(
        lambda: join(MIXED, RunStore(tmp_path), PLACE), ERM.digest, "not finished", "repeat the command that started it"
    )


def test_an_ensemble_is_trained_by_its_name(tmp_path, capsys):
    words = ("--setting", "smoke", "--held-out", "rot0", "--store", tmp_path, "--json")
    assert call("train", "--method", "eoq", "--combine", "probabilities", *words) == 0
    assert '"method":"EoQ, combine probabilities"' in capsys.readouterr().out
    (run,) = [run for run in RunStore(tmp_path).runs() if run.spec.members]
    assert run.done and run.spec.combine == "probabilities" and len(run.spec.members) == 2
    assert call("train", "--combine", "probabilities", *words) == 2
    assert "does nothing without an ensemble" in capsys.readouterr().err
