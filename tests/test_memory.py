"""A batch that does not fit into memory is halved, is said to be, and leaves the numbers alone."""

import logging

import cases
import numpy as np
import pytest
import torch
from cases import in_blocks

from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.tensors.memory import SplitOnOOM


def refusing(model, most):
    """Make a model run out of memory beyond so many samples."""
    seen = []

    def refuse(module, given):
        if len(given[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(len(given[0]))

    model.register_forward_pre_hook(refuse)
    return seen


@pytest.mark.parametrize("most", [11, 3, 1])
def test_a_landscape_goes_on_in_halves_and_says_so_once(most, caplog):
    case = cases.make("conv_bn").double()
    batches = [pair for pair in case.batches([24])]
    whole = Landscape(case.model, batches, case.loss)
    expected = sphere_flatness(whole, [0.5], num_samples=3), in_blocks(whole, [0.5], 12, errors=(0.5, 0))
    seen = refusing(case.model, most)
    with caplog.at_level(logging.WARNING, "flatlab"):
        halved = Landscape(case.model, batches, case.loss)
        found = sphere_flatness(halved, [0.5], num_samples=3), in_blocks(halved, [0.5], 12, errors=(0.5, 0))
    # The first probe looks at two samples.
    first = "1 image at a time instead of 2" if most == 1 else "12 images at a time instead of 24"
    assert caplog.messages[0] == f"Out of memory: evaluating {first}."
    assert len(caplog.messages) == {11: 2, 3: 3, 1: 1}[most] and 0 < max(seen) <= most
    for one, other in zip(found, expected, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-9)
        assert np.concatenate(one.visits) == pytest.approx(np.concatenate(other.visits), rel=1e-7, abs=1e-12)


def test_nests_are_cut_and_joined_and_other_errors_pass():
    def model(inputs):
        if len(inputs["x"]) > 2:
            raise MemoryError
        return {"sum": inputs["x"] + inputs["y"][0]}

    x = torch.arange(7.0)
    halving = SplitOnOOM(model)
    assert torch.equal(halving({"x": x, "y": (x,)})["sum"], 2 * x) and halving.fits == 1
    with pytest.raises(MemoryError):
        SplitOnOOM(lambda inputs: (_ for _ in ()).throw(MemoryError))(x)
    with pytest.raises(RuntimeError, match="a bug"):
        SplitOnOOM(lambda inputs: (_ for _ in ()).throw(RuntimeError("a bug")))(x)
