"""What each test may rely on: no figure left open, one thread, and a watch over models."""

import os

import matplotlib

matplotlib.use("Agg")

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib.pyplot as plt
import pytest
import torch


def pytest_collection_modifyitems(items):
    """Begin with the tests that are allowed the most time, so that none of them is left to one worker at the end."""
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers("timeout")), default=0))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Decoded images go to a folder of the tests, not to the user's; children inherit it."""
    os.environ["FLATLAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def tidy():
    torch.set_num_threads(1)
    yield
    plt.close("all")


_HOOKS = [name for name in vars(torch.nn.Module()) if name.endswith("_hooks")]


def _snapshot(model):
    modules = dict(model.named_modules())
    return {
        "state": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "storage": {n: (id(p), p.data_ptr(), p.stride()) for n, p in model.named_parameters(remove_duplicate=False)},
        "flags": {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in modules.items()},
        "hooks": {(n, kind): len(getattr(m, kind)) for n, m in modules.items() for kind in _HOOKS},
    }


@pytest.fixture
def untouched():
    """`with untouched(model):` asserts that the block leaves the model bit-identical, with no hook behind."""

    @contextmanager
    def watch(model) -> Iterator[None]:
        before = _snapshot(model)
        try:
            yield
        finally:
            after = _snapshot(model)
            old, new = before.pop("state"), after.pop("state")
            assert old.keys() == new.keys()
            for name, tensor in old.items():
                bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, new[name])]
                assert torch.equal(*bits), f"{name} has changed"
            assert before == after

    return watch
