"""Losses, models and surroundings that once gave a wrong number without a word: each is right now, or refused."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import flatlab
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.compare import compare_flatness
from flatlab.metrics.flatness.sphere import sphere_flatness

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(48) % 3


def mlp(outputs=3, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)).to(dtype).eval()


# --- samples that are compared with their neighbours: blocks separate them


def preferred(outputs, targets):
    return -F.logsigmoid(outputs[0::2, 0] - outputs[1::2, 0]).mean()


@pytest.mark.parametrize("size", [4, 6, 16, 48])
def test_a_loss_of_pairs_of_neighbours_is_refused(size):
    batches = list(zip(X.split(size), Y.split(size), strict=True))
    with pytest.raises(UserError, match="compares them with each other"):
        Landscape(mlp(1), batches, preferred)


class Paired(nn.Module):
    """Half of each output is that of another row: the neighbour, or the one half a batch away."""

    def __init__(self, shift):
        super().__init__()
        self.inner, self.shift = mlp(), shift

    def forward(self, x):
        out = self.inner(x)
        if len(x) < 2:
            return out
        other = torch.arange(len(x)) ^ 1 if self.shift == 1 else (torch.arange(len(x)) + len(x) // 2) % len(x)
        return out + out[other.clamp(max=len(x) - 1)]


@pytest.mark.parametrize("shift", [1, "half"])
@pytest.mark.parametrize("size", [4, 16])
def test_a_model_that_mixes_pairs_of_rows_is_refused(shift, size, untouched):
    model = Paired(shift).eval()
    with untouched(model), pytest.raises(UserError, match="samples mix in the model"):
        Landscape(model, list(zip(X.split(size), Y.split(size), strict=True)), F.cross_entropy)


class Packed(nn.Module):
    """A recurrent network that needs its samples sorted by length, as pack_padded_sequence does by default."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, inputs):
        packed = nn.utils.rnn.pack_padded_sequence(inputs["x"], inputs["lengths"], batch_first=True)
        return self.head(self.rnn(packed)[1][0])


def test_samples_that_are_sorted_by_length_stay_sorted():
    torch.manual_seed(0)
    lengths = torch.arange(12).flip(0) % 6 + 1
    lengths = lengths.sort(descending=True).values
    inputs = {"x": torch.randn(12, 6, 2), "lengths": lengths}
    landscape = Landscape(Packed().eval(), [(inputs, torch.arange(12) % 3)], F.cross_entropy)
    assert np.isfinite(sphere_flatness(landscape, [0.1], num_samples=3).value).all()


# --- what a loss reads


def confident(outputs, targets):
    keep = (outputs.softmax(1).max(1).values > 0.4).to(outputs).detach()
    return F.cross_entropy(outputs, targets, reduction="none") * keep, keep


def test_weights_that_follow_the_outputs_are_refused():
    with pytest.raises(UserError, match="must come from the targets alone"):
        Landscape(mlp(), [(X, Y)], confident)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_penalty_of_parameters_kept_outside_has_no_curvature_in_16_bits(dtype):
    model = mlp(dtype=dtype)
    kept = list(model.parameters())

    def landscape(read):
        def loss(outputs, targets):
            return F.cross_entropy(outputs.float(), targets) + sum(p.float().square().sum() for p in read())

        return Landscape(model, [(X.to(dtype), Y)], loss)

    inside, outside = landscape(model.parameters), landscape(lambda: kept)
    trace = flatlab.hessian_trace(inside).trace.value
    assert trace > 2 * inside.num_params  # the penalty's own, and that of the cross-entropy
    if dtype == torch.float32:
        assert flatlab.hessian_trace(outside).trace.value == trace
        return
    with pytest.raises(UserError, match="kept outside of it"):
        flatlab.hessian_trace(outside)


def test_a_penalty_of_one_model_is_none_of_another():
    model = mlp()

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets) + sum(p.square().sum() for p in model.parameters())

    one, other = (Landscape(each, [(X, Y)], loss) for each in (model, copy.deepcopy(model)))
    for action in (lambda: compare_flatness(one, other, [0.1], num_samples=3), lambda: one.around(mlp())):
        with pytest.raises(UserError, match="written for .*also for the other model"):
            action()
    assert sphere_flatness(one, [0.1], num_samples=3).value[0] > 0


def test_landscapes_of_two_layers_of_one_model_do_not_disturb_each_other():
    square = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).eval()
    first, second = (Landscape(square, [(X, Y)], F.cross_entropy, params=f"{layer}.weight") for layer in (0, 2))
    apart = [Landscape(copy.deepcopy(square), [(X, Y)], F.cross_entropy, params=f"{layer}.weight") for layer in (0, 2)]
    found = compare_flatness(first, second, [2.0], num_samples=8)
    for mine, each in zip((found.a, found.b), apart, strict=True):
        assert np.array_equal(mine.visits[0], sphere_flatness(each, [2.0], num_samples=8).visits[0])


class OwnWeights(nn.Module):
    """A model whose own loss weighs the classes."""

    def __init__(self):
        super().__init__()
        self.inner = mlp(2)
        self.register_buffer("weight", torch.tensor([1.0, 20.0]))

    def forward(self, x, labels=None):
        logits = self.inner(x)
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=self.weight)
        return {"logits": logits, "loss": loss}


def test_the_own_loss_is_compared_beyond_a_first_batch_of_one_class():
    labels = (torch.arange(48) >= 32).long()
    batches = [{"x": x, "labels": y} for x, y in zip(X.split(16), labels.split(16), strict=True)]
    model = OwnWeights().eval()
    with pytest.raises(UserError, match="none that flatlab can divide"):
        Landscape(model, batches, flatlab.loss_of(model))


# --- the surroundings, and the point itself


def test_contexts_that_change_the_loss_are_refused():
    model = mlp()
    landscape = Landscape(model, [(X, Y)], F.cross_entropy)
    for context, why in (
        (torch.autocast("cpu", dtype=torch.bfloat16), "torch.autocast is active"),
        (torch.inference_mode(), "torch.inference_mode is active"),
    ):
        with context:
            for action in (
                lambda: Landscape(model, [(X, Y)], F.cross_entropy),
                lambda: sphere_flatness(landscape, [1.0], num_samples=3),
                lambda: landscape.evaluate(landscape.point),
                lambda: flatlab.hessian_trace(landscape),
            ):
                with pytest.raises(UserError, match=why):
                    action()
    assert sphere_flatness(landscape, [1.0], num_samples=3).value[0] > 0


class Halved(nn.Module):
    """Autocast inside: values are rounded to 16 bits, whatever the loss is computed in."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x)


def test_rounding_inside_of_a_model_is_seen():
    landscape = Landscape(Halved().eval(), [(X, Y)], lambda outputs, targets: F.cross_entropy(outputs.float(), targets))
    assert landscape.resolution > 1e-3 > Landscape(mlp(), [(X, Y)], F.cross_entropy).resolution
    assert any("rounding" in note for note in sphere_flatness(landscape, [1e-3], num_samples=3).notes)


def test_a_loss_that_jumps_at_the_point_is_told():
    torch.manual_seed(0)
    wide = nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)).eval()
    assert any("jumps at the point" in each for each in Landscape(wide, [(X, Y)], F.cross_entropy).remarks)
    assert not Landscape(mlp(), [(X, Y)], F.cross_entropy).remarks


def test_directions_do_not_depend_on_the_default_dtype():
    landscape = Landscape(mlp(), [(X, Y)], F.cross_entropy)
    before = sphere_flatness(landscape, [0.5], num_samples=4).visits[0]
    torch.set_default_dtype(torch.float64)
    try:
        assert np.array_equal(sphere_flatness(landscape, [0.5], num_samples=4).visits[0], before)
    finally:
        torch.set_default_dtype(torch.float32)


class Drawing(torch.utils.data.Dataset):
    """Draws from all global generators whenever a sample is read, without effect on the sample."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(())
        return X[index], Y[index]


def test_reading_data_and_measuring_leave_all_global_generators_as_they_were():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with torch.random.fork_rng():
        model = mlp()
    landscape = Landscape(model, torch.utils.data.DataLoader(Drawing(), batch_size=16), F.cross_entropy)
    sphere_flatness(landscape, [0.5], num_samples=3)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == wanted
