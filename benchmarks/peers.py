"""Other tools for curvature and surfaces, called as their users call them."""

import importlib
import sys
import warnings
from contextlib import contextmanager
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import nn

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


def eigenthings_product(problem, vector):
    from hessian_eigenthings import HessianOperator
    from hessian_eigenthings.loss_fns import supervised_loss

    operator = HessianOperator(problem.network, problem.batches, supervised_loss(F.cross_entropy))
    return lambda: operator.matvec(vector)


def curvlinops_product(problem, vector):
    import curvlinops

    parameters = list(problem.network.parameters())
    arguments = (problem.network, nn.CrossEntropyLoss(), parameters, problem.batches)
    operator = curvlinops.HessianLinearOperator(*arguments, check_deterministic=False)
    return lambda: operator @ vector


def losslandscapes_plane(problem, steps):
    """Return a call that evaluates a plane of steps x steps points: all images as one batch, a copy of the network."""
    import loss_landscapes
    from loss_landscapes.metrics import Loss

    metric = Loss(F.cross_entropy, problem.x, problem.y)
    return lambda: loss_landscapes.random_plane(problem.network, metric, steps=steps, deepcopy_model=True)
