"""Other tools for curvature and surfaces, called as their users call them."""

import importlib
import sys
import warnings
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn

from flatlab import Hessian, hessian_spectrum

PEERS = {
    "PyHessian": "pyhessian",
    "curvlinops": "curvlinops-for-pytorch",
    "hessian-eigenthings": "hessian-eigenthings",
    "loss-landscapes": "loss-landscapes",
}
warnings.simplefilter("ignore")  # PyHessian differentiates with create_graph


def versions():
    return {name: version(package) for name, package in PEERS.items()}


def pyhessian_of(problem, *, loader):
    import pyhessian

    data = {"dataloader": problem.batches} if loader else {"data": (problem.x, problem.y)}
    return pyhessian.hessian(problem.network, nn.CrossEntropyLoss(), cuda=False, **data)


@contextmanager
def pyhessian_products():
    """Count PyHessian's products."""
    importlib.import_module("pyhessian")
    module = sys.modules["pyhessian.hessian"]  # the package hides it behind a class of that name
    count, true = [0], module.hessian_vector_product
    module.hessian_vector_product = lambda *args: count.__setitem__(0, count[0] + 1) or true(*args)
    try:
        yield count
    finally:
        module.hessian_vector_product = true


def pyhessian_product(problem, vector, *, loader):
    """Return a call that multiplies: over the loader afresh, or by the kept graph of one batch."""
    views = problem.landscape.split(vector)  # first: it writes the weights, which the graph must not see
    tool = pyhessian_of(problem, loader=loader)
    if loader:
        return lambda: torch.cat([each.reshape(-1) for each in tool.dataloader_hv_product(views)[1]])
    multiply = importlib.import_module("pyhessian.utils").hessian_vector_product
    return lambda: torch.cat([each.reshape(-1) for each in multiply(tool.gradsH, tool.params, views)])


def eigenthings_operator(problem):
    from hessian_eigenthings import HessianOperator
    from hessian_eigenthings.loss_fns import supervised_loss

    return HessianOperator(problem.network, problem.batches, supervised_loss(F.cross_entropy))


def eigenthings_product(problem, vector):
    operator = eigenthings_operator(problem)
    return lambda: operator.matvec(vector)


def curvlinops_product(problem, vector):
    import curvlinops

    parameters = list(problem.network.parameters())
    arguments = (problem.network, nn.CrossEntropyLoss(), parameters, problem.batches)
    operator = curvlinops.HessianLinearOperator(*arguments, check_deterministic=False)
    return lambda: operator @ vector


def searches(landscape, problem, k, seed):
    """Return by tool a call that finds the k largest eigenvalues by the tool's own defaults, and counts products."""

    def ours():
        found = hessian_spectrum(landscape, k=k, seed=seed)
        return found.eigenvalues, found.cost.hvps

    def scipys():
        operator, start = Hessian(landscape), np.random.default_rng(seed).normal(size=landscape.num_params)
        found = eigsh(operator.to_scipy(), k=k, which="LA", v0=start, return_eigenvectors=False)
        return found, operator.products

    def pyhessians():
        torch.manual_seed(seed)
        with pyhessian_products() as count:
            found = pyhessian_of(problem, loader=False).eigenvalues(top_n=k)[0]
        return np.array(found), count[0]

    def eigenthings():
        from hessian_eigenthings import lanczos

        operator, count = eigenthings_operator(problem), [0]
        once = operator.matvec
        operator.matvec = lambda vector: count.__setitem__(0, count[0] + 1) or once(vector)
        found = lanczos(operator, k=k, which="LA", seed=seed).eigenvalues
        return np.asarray(found), count[0]

    return {"flatlab": ours, "SciPy eigsh": scipys, "PyHessian": pyhessians, "hessian-eigenthings": eigenthings}


def losslandscapes_plane(problem, steps):
    """Return a call that evaluates a plane of steps x steps points: all images as one batch, a copy of the network."""
    import loss_landscapes
    from loss_landscapes.metrics import Loss

    metric = Loss(F.cross_entropy, problem.x, problem.y)
    return lambda: loss_landscapes.random_plane(problem.network, metric, steps=steps, deepcopy_model=True)
