"""Products with curvature against those of the libraries that the field cites, on the same model and data."""

import warnings

import pytest
import torch
from spectra import double, normal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatlab.derivatives.operators import Hessian
from flatlab.derivatives.outer import GGN, Fisher


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "tied"])
def test_curvlinops_agrees(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import curvlinops

        case = double(name)
        batches = case.batches([5, 1, 11, 7])
        arguments = (case.model, nn.CrossEntropyLoss(), list(case.model.parameters()), batches)
        landscape = case.landscape([5, 1, 11, 7])
        v = normal("oracles", shape=(landscape.num_params, 3))
        pairs = [
            (Hessian(landscape), curvlinops.HessianLinearOperator(*arguments)),
            (GGN(landscape), curvlinops.GGNLinearOperator(*arguments)),
            (Fisher(landscape, kind="empirical"), curvlinops.EFLinearOperator(*arguments)),
        ]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours @ v, theirs @ v, rtol=1e-4, atol=1e-8)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "vit"])
def test_pyhessian_agrees(name):
    case = double(name)
    landscape = case.landscape([5, 1, 11, 7])
    v = normal("oracles", shape=(landscape.num_params,))
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        import pyhessian

        oracle = pyhessian.hessian(case.model, case.loss, dataloader=case.batches([5, 1, 11, 7]), cuda=False)
        product = torch.cat([p.reshape(-1) for p in oracle.dataloader_hv_product(landscape.split(v))[1]])
    case.model.zero_grad()
    torch.testing.assert_close(Hessian(landscape) @ v, product, rtol=1e-4, atol=1e-8)
