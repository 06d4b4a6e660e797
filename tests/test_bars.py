"""A bar for library calls that last: on standard error, after a while, in a terminal; never in a pipe."""

import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import flatlab
from flatlab.metrics import progress


@pytest.fixture
def landscape():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    batches = [(torch.randn(8, 3), torch.randint(0, 2, (8,))) for _ in range(2)]
    return flatlab.Landscape(model, batches, nn.functional.cross_entropy)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)


CALLS = {
    "sphere_flatness": lambda around, **more: flatlab.sphere_flatness(around, [0.1], num_samples=4, **more),
    "hessian_trace": lambda around, **more: flatlab.hessian_trace(around, budget=40, **more),
    "hessian_spectrum": lambda around, **more: flatlab.hessian_spectrum(around, k=2, **more),
    "spectral_density": lambda around, **more: flatlab.spectral_density(around, num_vectors=2, steps=4, **more),
    "line": lambda around, **more: flatlab.line(around, grid=3, **more),
    "worst_rise": lambda around, **more: flatlab.worst_rise(around, [0.1], **more),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bar_changes_no_number_and_names_the_call(landscape, capsys, at_once, name):
    plain = CALLS[name](landscape)
    assert capsys.readouterr().err == ""  # no terminal here
    watched = CALLS[name](landscape, progress=True)
    err = capsys.readouterr()
    assert name in err.err and err.out == ""
    numbers = [np.concatenate(each.nodes) if name == "spectral_density" else each.value for each in (watched, plain)]
    assert torch.equal(*map(torch.as_tensor, numbers))


def test_in_a_terminal_by_default_and_not_where_it_is_declined(landscape, capsys, at_once, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    CALLS["line"](landscape)
    assert "line" in capsys.readouterr().err
    CALLS["line"](landscape, progress=False)
    assert capsys.readouterr().err == ""


def test_forced_colours_make_no_terminal(landscape, capsys, at_once, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    CALLS["line"](landscape)
    assert capsys.readouterr().err == ""


def test_a_short_call_shows_none(landscape, capsys):
    CALLS["line"](landscape, progress=True)
    assert capsys.readouterr().err == ""


def test_count_rate_and_time_left(capsys, at_once):
    with progress.bar("work", progress=True) as count:
        for done in range(1, 5):
            count(done, 8)
            time.sleep(0.05)
    err = capsys.readouterr().err
    assert "4/8" in err and "/s" in err and "left" in err


def test_the_caller_s_own_report_is_called_too(landscape, at_once):
    heard = []
    flatlab.line(landscape, grid=3, report=lambda *told: heard.append(told), progress=True)
    assert heard
    hessian = flatlab.Hessian(landscape)
    hessian.watch = heard.append
    flatlab.hessian_trace(hessian, budget=40, progress=True)
    assert heard[-1] == hessian.products and hessian.watch == heard.append
