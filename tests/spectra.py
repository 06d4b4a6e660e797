"""Matrices with known spectra and landscapes with known curvature, for the tests of all that measures it."""

import functools

import cases
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatlab import seeds
from flatlab.landscape.landscape import Landscape
from flatlab.metrics import closed_forms

LAYOUTS = ("one", "uneven", "strata")


def normal(*names, shape):
    return torch.randn(shape, generator=seeds.generator("spectra", *names), dtype=torch.float64)


def rotated(eigenvalues, *names):
    """A symmetric matrix with these eigenvalues in a random basis."""
    values = torch.as_tensor(np.asarray(eigenvalues, dtype=np.float64))
    return closed_forms.rotated(values, normal(*names, shape=(len(values), len(values))))


def quadratic(eigenvalues, *names):
    """The landscape of 1/2 w'Hw."""
    return cases.Quadratic(rotated(eigenvalues, *names)).landscape(check=False)


def landscape_of(case, layout, **kwargs):
    """A case in one batch, in uneven batches, or in two strata of unequal sizes, the larger in two batches."""
    if layout != "strata":
        return case.landscape(cases.CUTS[layout], **kwargs)
    batches = case.batches([5, 12, 7])
    return Landscape(case.model, {"few": batches[:1], "many": batches[1:]}, case.loss, **kwargs)


@functools.cache
def double(name):
    return cases.make(name).double()


def parts(case, layout):
    """The case itself, or one case for each stratum; their mean is the landscape."""
    if layout != "strata":
        return [case]
    pairs = [(case.inputs[:5], case.targets[:5]), (case.inputs[5:], case.targets[5:])]
    return [cases.Case(case.model, x, y, case.loss) for x, y in pairs]


@functools.cache
def dense(name, layout):
    """The Hessian (P, P) by torch.func, which shares no code with the operators."""
    if layout == "uneven":
        return dense(name, "one")
    case = double(name)
    point = case.landscape(check=False).point
    with sdpa_kernel(SDPBackend.MATH):
        return torch.stack([part.dense_hessian(point) for part in parts(case, layout)]).mean(0)


@functools.cache
def dense_outer(name, layout, kind):
    """GGN ("ggn"), expected ("expected") and empirical Fisher ("empirical"), sample by sample."""
    case = double(name)
    point, matrices = case.landscape(check=False).point, []
    named = dict(case.model.named_parameters())

    def logits(vector, x):
        pieces = vector.split([p.numel() for p in named.values()])
        state = {n: piece.reshape(p.shape) for (n, p), piece in zip(named.items(), pieces, strict=True)}
        return torch.func.functional_call(case.model, state, x[None])[0]

    for part in parts(case, layout):
        total = 0
        for x, y in zip(part.inputs, part.targets, strict=True):
            jacobian, z = torch.func.jacrev(logits)(point, x), logits(point, x).detach()
            scores = [torch.func.grad(lambda o, c=c: torch.log_softmax(o, 0)[c])(z) for c in range(len(z))]
            labels = list(zip(z.softmax(0), scores, strict=True))
            middle = {
                "ggn": lambda z=z, y=y: torch.func.hessian(lambda o: case.loss(o[None], y[None]))(z),
                "expected": lambda labels=labels: sum(p * torch.outer(g, g) for p, g in labels),
                "empirical": lambda y=y, s=scores: torch.outer(s[y], s[y]),
            }[kind]()
            total = total + jacobian.T @ middle @ jacobian / len(part.inputs)
        matrices.append(total)
    return torch.stack(matrices).mean(0).detach()


def softmax_regression():
    """The landscape of a linear classifier in two uneven batches, and its Hessian in closed form."""
    golden = closed_forms.softmax_regression({"device": "cpu", "dtype": torch.float64})
    return golden.landscape, golden.hessian
