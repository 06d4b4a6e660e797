"""Optimizers, schedules, clipping, epochs and the percentile over classes, through the loop."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from commandline import TINY as WORDS
from commandline import call
from stores import PLACE, content, forked, spec, trained
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import get_parameter_names

from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.models.networks import build_network, set_training
from flatlab.specs.methods import METHODS, compose
from flatlab.specs.optimizing import Optimizing, rate
from flatlab.specs.settings import QUICK
from flatlab.store.runs import RunStore
from flatlab.train import loop
from flatlab.train.batches import stream
from flatlab.train.evaluate import evaluate
from flatlab.train.objectives import erm
from flatlab.train.trajectory import decaying, optimizer_of

UPDATES = 14
SGD = {"optimizer": "sgd", "momentum": 0.7, "lr": 0.05}
ALL = {**SGD, "schedule": "cosine", "warmup": 3, "clip_norm": 0.8, "weight_decay": 0.01, "class_percentile": 10.0}


def scheduled(optimizer, kind, warmup):
    """Return another library's schedule of an optimizer."""
    if kind == "constant":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / warmup) if warmup else 1)
    make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[kind]
    return make(optimizer, warmup, UPDATES)


@pytest.mark.oracle
@pytest.mark.parametrize("warmup", (0, 1, 3, UPDATES - 1))
@pytest.mark.parametrize("kind", ("constant", "linear", "cosine"))
def test_schedules_are_those_of_transformers(kind, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs, rates = scheduled(optimizer, kind, warmup), []
    for _ in range(UPDATES):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [rate(Optimizing(schedule=kind, warmup=warmup), step, UPDATES) for step in range(UPDATES)]
    assert ours == pytest.approx(rates, abs=1e-12)


@pytest.mark.oracle
def test_schedules_without_warm_up_are_those_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    for step in range(UPDATES):
        assert rate(Optimizing(schedule="cosine"), step, UPDATES) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


OPTIMIZERS = {
    "adamw": ({"optimizer": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1)),
    "sgd": ({**SGD, "weight_decay": 0.1}, lambda p: torch.optim.SGD(p, 0.05, momentum=0.7, weight_decay=0.1)),
    "clipped": ({"clip_norm": 0.5}, lambda p: torch.optim.Adam(p, 3e-3)),
    "all": (ALL, lambda p: torch.optim.SGD(p, 0.05, momentum=0.7, weight_decay=0.01)),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_is_the_plain_loop_with_torchs_optimizer(name, tmp_path):
    options, make = OPTIMIZERS[name]
    run = spec().replace(**options)
    rows = trained(tmp_path, run).run(run).rows()
    domains = loading_data.domains(run, PLACE)
    network, batches = loading_network.network(run, domains.data, PLACE), stream(run, domains, torch.device("cpu"))
    optimizer, norms = make(network.parameters()), []
    theirs = scheduled(optimizer, options.get("schedule", "constant"), options.get("warmup", 0))
    set_training(network, freeze_batchnorm=False)
    for step in range(UPDATES):
        optimizer.zero_grad()
        loss = erm(network, batches.batch(step))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), run.clip_norm or math.inf))
        optimizer.step()
        theirs.step()
    last = evaluate(network, domains.evaluation("out", domains.sources, torch.device("cpu")))
    assert rows[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-3)
    for domain, score in last.items():
        assert rows[-1]["source"][domain]["loss"] == pytest.approx(score["loss"], rel=1e-3)
    if run.clip_norm:
        assert rows[0]["gradient_norm"] == pytest.approx(float(norms[0]), rel=1e-5) and norms[0] > run.clip_norm
    assert ("gradient_norm" in rows[0], "lr" in rows[0]) == (run.clip_norm is not None, run.scheduled)
    if run.scheduled:
        assert [row["lr"] for row in rows] == pytest.approx([0.05 * rate(run, row["step"], UPDATES) for row in rows])


EXEMPT = {  # layers without decay, and whether biases have it
    "all": ([], True),
    "weights": ([], False),
    "matrices": ([torch.nn.LayerNorm], False),  # the groups of transformers' Trainer
}


@pytest.mark.oracle
@pytest.mark.parametrize("decayed", EXEMPT)
def test_weight_decay_leaves_out_biases_and_norms_on_request(decayed):
    network = build_network("digits-vit", num_classes=10, in_channels=1)
    groups = decaying(loading_network.roles(network), decayed)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {names[id(p)]: "weight_decay" in group for group in groups for p in group["params"]}
    layers, biases = EXEMPT[decayed]
    theirs = {name for name in get_parameter_names(network, layers) if biases or "bias" not in name}
    assert {name for name, exempt in found.items() if not exempt} == theirs
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    optimizer = optimizer_of(spec(optimizer="adamw", weight_decay=0.1, decayed=decayed), groups)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without gradients only decay moves a parameter
    shrunk = {n for n, p in network.named_parameters() if before[n].any() and not torch.equal(p, before[n])}
    assert shrunk == {name for name, value in before.items() if value.any() and not found[name]}


def test_step_sizes_follow_the_schedule_of_the_weights(tmp_path):
    run = spec("QT-DoG").replace(schedule="linear")
    training = loop.Training([RunStore(tmp_path).run(run)], RunStore(tmp_path), PLACE, forks=())
    seen = []
    training.run(lambda *_: seen.append([group["lr"] for group in training.trajectory.optimizer.param_groups]))
    factors = [rate(run, step, UPDATES) for step in range(UPDATES)]
    assert [each[0] for each in seen] == pytest.approx([run.lr * factor for factor in factors])
    after = [each[-1] for each in seen[run.switch :]]
    assert after == pytest.approx([run.quantizer.scale_lr * factor for factor in factors[run.switch :]])


@pytest.mark.parametrize("method", ("ERM", "QT-DoG"))
def test_a_run_that_is_stopped_goes_on_with_the_same_bytes(method, tmp_path, monkeypatch):
    run = spec(method).replace(**ALL)
    whole, store = trained(tmp_path / "whole", run), RunStore(tmp_path / "stopped")
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)  # a state at each step

    class StopError(Exception):
        pass

    def stop(done, *_, at):
        if done == at:
            raise StopError

    for at in (2, 7, 11):
        with pytest.raises(StopError):
            loop.train([run], store, PLACE, report=partial(stop, at=at))
    loop.train([run], store, PLACE)
    assert len(store.run(run).provenance["sessions"]) == 4
    assert content(store.run(run)) == content(whole.run(run))


def test_a_forked_run_is_the_run_alone(tmp_path):
    forked(tmp_path, spec("QT-DoG").replace(**ALL))


def test_the_percentile_over_classes_is_numpys():
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 1, 1, 2, 0, 2, 2, 2])]
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])  # 2 of 4, 1 of 4, 2 of 2
    batches = {"only": [(logits[:3], labels[:3]), (logits[3:], labels[3:])]}
    network = torch.nn.Identity()
    assert "class_percentile" not in evaluate(network, batches)["only"]
    for percentile in (0.0, 10.0, 50.0, 100.0):
        found = evaluate(network, batches, percentile=percentile)["only"]
        assert found["class_percentile"] == pytest.approx(np.percentile([0.5, 0.25, 1.0], percentile), abs=1e-6)
        assert found["accuracy"] == pytest.approx(0.5)


def test_epochs_are_steps_that_draw_the_training_images(tmp_path, capsys):
    sizes = (450, 449, 449, 449)
    own = QUICK.replace(epochs=3, sizes=sizes, batch_size=32, test_share=0.2)
    for held_out, sources in (("rot0", (449, 449, 449)), ("rot45", (450, 449, 449))):
        run = compose(METHODS["QT-DoG"], own, held_out=held_out, seed=0, trial_seed=0)
        inside = sum(n - int(n * 0.4) for n in sources)
        assert run.steps + 1 == 3 * math.ceil(inside / 96) and run.switch == round(0.4 * run.steps)
        domains = loading_data.domains(run, PLACE)
        assert inside == sum(len(domains.in_[name]) for name in domains.sources)
    assert "epochs: 3" in own.replace(image_size=32).words
    assert call("train", *without(WORDS, "--steps"), "--epochs", "1", "--store", tmp_path, "--json") == 0
    (run,) = RunStore(tmp_path).runs()
    assert run.spec.steps + 1 == math.ceil(
        sum(n - int(n * 0.4) for n in sizes if n) / 4 * 3 / (3 * run.spec.batch_size)
    )
    capsys.readouterr()


def without(words, name):
    """Return a command's words without an option and its value."""
    words = list(words)
    if name in words:
        at = words.index(name)
        del words[at : at + 2]
    return words


def test_the_options_make_such_runs(tmp_path, capsys):
    words = ["--optimizer", "SGD", "--momentum", "0.7", "--schedule", "cosine", "--warmup", "1", "--clip-norm", "0.8"]
    words += ["--weight-decay", "0.01", "--decayed", "weights", "--class-percentile", "10"]
    assert call("train", *WORDS, *words, "--store", tmp_path, "--json") == 0
    (run,) = RunStore(tmp_path).runs()
    asked = {**ALL, "warmup": 1, "decayed": "weights"}
    assert {name: getattr(run.spec, name) for name in Optimizing.model_fields} == {
        name: asked[name] for name in Optimizing.model_fields
    }
    assert all({"lr", "gradient_norm"} <= row.keys() for row in run.rows())
    assert 0 <= run.rows()[-1]["target"]["in"]["class_percentile"] <= 1
    assert json.loads(capsys.readouterr().out)


MISTAKES = {
    "--momentum does nothing": ["--momentum", "0.5"],
    "The warm-up must end at a step <= 2 (--steps), got --warmup 3.": ["--warmup", "3", "--steps", "2"],
    "--warmup must be an integer >= 0, got -1.": ["--warmup", "-1"],
    "--clip-norm must be a number > 0, got 0.0.": ["--clip-norm", "0"],
    "--momentum must be a number < 1, got 1.0.": ["--momentum", "1", "--optimizer", "sgd"],
    "--weight-decay must be a number >= 0, got -0.1.": ["--weight-decay", "-0.1"],
    "--class-percentile must be a number <= 100, got 101.0.": ["--class-percentile", "101"],
    "Unknown optimizer 'adan'; did you mean adam?": ["--optimizer", "adan"],
    "Unknown schedule 'cosin'; did you mean cosine?": ["--schedule", "cosin"],
    "--epochs must be an integer >= 1, got 0.": ["--epochs", "0"],
    "--epochs 2 sets the number of steps; leave --steps 2 out.": ["--epochs", "2", "--steps", "2"],
    "--keep-every must be at most --steps": ["--keep-every", "100", "--steps", "2"],
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes_have_a_sentence(sentence, tmp_path, capsys):
    assert call("train", *without(WORDS, "--steps"), *MISTAKES[sentence], "--store", tmp_path) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
