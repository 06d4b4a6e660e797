"""Nests in and out of a model, wrappers around it, weights of 16 bits, and the loss that it computes itself."""

import collections
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatlab
from flatlab import seeds
from flatlab.errors import UserError


def rng(*names):
    return seeds.generator("test_structures", *names)


@dataclass
class Outputs:
    logits: Tensor
    loss: Tensor | None = None
    hidden: Any = None


class Tagger(nn.Module):
    """Scores of three tags for each of four words, with the loss of its labels, as the models of transformers."""

    def __init__(self, own=F.cross_entropy):
        super().__init__()
        self.embed, self.mix, self.head, self.own = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3), own

    def forward(self, words, mask=None, labels=None):
        hidden = torch.tanh(self.mix(self.embed(words)))
        if mask is not None:
            hidden = hidden * mask[..., None]
        logits = self.head(hidden.cumsum(1))
        loss = None if labels is None else self.own(logits.flatten(0, 1), labels.flatten())
        return Outputs(logits, loss, {"states": (hidden, None), "cache": object()})


class Words(collections.UserDict):
    """A mapping that is no dict, as transformers' BatchEncoding."""


def tagger(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tagger(**options).double().eval()


def sentences():
    words, labels = torch.randint(0, 7, (6, 4), generator=rng("w")), torch.randint(0, 3, (6, 4), generator=rng("y"))
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 4, 1, 3])[:, None]
    return {"words": words, "mask": mask.double(), "labels": labels.masked_fill(~mask, -100)}


def batches(*sizes, kind=dict):
    whole = sentences()
    return [kind(zip(whole, each, strict=True)) for each in zip(*(v.split(sizes) for v in whole.values()), strict=True)]


def dense(model, loss):
    """The Hessian by torch.func, of a loss that is a function of the parameters by name."""
    named = dict(model.named_parameters())
    point = torch.cat([p.detach().flatten() for p in named.values()])

    def value(vector):
        pieces = vector.split([p.numel() for p in named.values()])
        return loss({n: v.view(p.shape) for (n, p), v in zip(named.items(), pieces, strict=True)})

    return torch.func.jacrev(torch.func.grad(value))(point)


def of_tokens(model, whole):
    def loss(state):
        kept = {"words": whole["words"], "mask": whole["mask"]}
        logits = torch.func.functional_call(model, state, (), kept).logits
        return F.cross_entropy(logits.flatten(0, 1), whole["labels"].flatten())

    return loss


@pytest.mark.parametrize("kind", [dict, Words])
@pytest.mark.parametrize("sizes", [(6,), (1, 3, 2)])
def test_dictionaries_in_and_dataclasses_out(sizes, kind, untouched):
    model = tagger()
    with untouched(model):
        landscape = flatlab.Landscape(model, batches(*sizes, kind=kind), flatlab.loss_of(model))
        block = torch.randn(landscape.num_params, 3, generator=rng("block"), dtype=torch.float64)
        found = flatlab.Hessian(landscape) @ block
        ggn = flatlab.GGN(landscape) @ block
    whole = sentences()
    hessian = dense(model, of_tokens(model, whole))
    assert landscape.base_loss == pytest.approx(model(**whole).loss.item(), rel=1e-12)
    torch.testing.assert_close(found, hessian @ block, rtol=1e-8, atol=1e-11)
    # The last layer is linear in its own parameters, so that the two matrices agree in its block.
    last = slice(-15, None)
    torch.testing.assert_close((flatlab.GGN(landscape) @ eye(landscape))[last, last], hessian[last, last])
    assert (ggn - found).norm() > 0.01 * found.norm()


def eye(landscape):
    return torch.eye(landscape.num_params, dtype=torch.float64)


def test_the_loss_of_a_model_weighs_tokens_alike_and_says_so():
    model = tagger()
    landscape = flatlab.Landscape(model, batches(2, 4), flatlab.loss_of(model))
    assert landscape.weights.tolist() == [17]  # tokens that are labelled, of 24
    assert "mean cross-entropy of tokens, over all counted tokens" in landscape.remarks[0]
    parts = [model(**batch).loss.item() for batch in batches(2, 4)]
    assert landscape.base_loss != pytest.approx((2 * parts[0] + 4 * parts[1]) / 6, rel=1e-6)  # the mean over samples


LOSSES = {  # outputs (6, 3) and labels, the model's own loss, and what it is called
    "classes": (torch.randint(0, 3, (6,), generator=rng("c")), F.cross_entropy, "cross-entropy of classes"),
    "binary": (torch.eye(6)[:, :3], F.binary_cross_entropy_with_logits, "binary cross-entropy"),
    "squares": (torch.randn(6, 3, generator=rng("s")), F.mse_loss, "squared error"),
}


class Scores(nn.Linear):
    own = None

    def forward(self, x, labels=None):
        scores = super().forward(x)
        return scores if labels is None else {"loss": type(self).own(scores, labels), "logits": scores}


@pytest.mark.parametrize("name", LOSSES)
def test_which_loss_a_model_returns_is_found(name):
    labels, own, kind = LOSSES[name]
    model = type("Own", (Scores,), {"own": staticmethod(own)})(4, 3).eval()
    x, loss = torch.randn(6, 4, generator=rng("x")), flatlab.loss_of(model)
    landscape = flatlab.Landscape(model, [({"x": x}, labels)], loss)
    assert loss.kind == kind and not landscape.remarks
    assert landscape.base_loss == pytest.approx(own(model(x), labels).item(), rel=1e-6)


def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.3)


def test_a_loss_that_cannot_be_divided_is_refused():
    model = tagger(own=smoothed)
    with pytest.raises(UserError, match=r"Tagger returns a loss of [\d.]+, which is none .*cross-entropy of tokens: "):
        flatlab.Landscape(model, batches(6), flatlab.loss_of(model))
    bare = tagger()
    with pytest.raises(UserError, match="needs batches that are dictionaries with an entry 'labels', got Tensor"):
        flatlab.Landscape(bare, [(sentences()["words"], sentences()["labels"])], flatlab.loss_of(bare))
    silent = type("Silent", (Tagger,), {"forward": lambda self, words, mask, labels: Tagger.forward(self, words)})()
    with pytest.raises(UserError, match="Silent returns no `loss` for its labels"):
        flatlab.Landscape(silent.double().eval(), batches(6), flatlab.loss_of(silent))
    with pytest.raises(UserError, match=r"Pass loss_of\(model\) to a Landscape"):
        flatlab.loss_of(bare)(bare(sentences()["words"]), sentences()["labels"])


def test_a_key_that_the_model_does_not_know_is_named():
    model, whole = tagger(), sentences()
    inputs = {"words": whole["words"], "index": whole["labels"]}
    with pytest.raises(UserError, match=r"keys are arguments of its forward \(got other keys or lacks some: index\)"):
        flatlab.Landscape(model, [(inputs, whole["labels"])], lambda o, t: o.logits.mean((1, 2)))


class Pair(nn.Linear):
    """Needs two arguments; returns them in a tuple of a tuple."""

    def forward(self, x, scale):
        return (super().forward(x) * scale[:, None],), x


def test_tuples_in_and_out():
    model, x, scale = Pair(4, 3).double().eval(), torch.randn(6, 4).double(), torch.rand(6).double()
    labels = torch.randint(0, 3, (6,), generator=rng("pair"))
    landscape = flatlab.Landscape(model, [((x, scale), labels)], lambda o, t: F.cross_entropy(o[0][0], t))
    assert landscape.base_loss == pytest.approx(F.cross_entropy(model(x, scale)[0][0], labels).item(), rel=1e-12)
    torch.testing.assert_close(flatlab.GGN(landscape) @ eye(landscape), flatlab.Hessian(landscape) @ eye(landscape))


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank update, as LoRA."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x)).to(x)


def test_adapters_beside_frozen_weights_are_all_that_varies():
    model = tagger().requires_grad_(False)
    model.mix = Adapted(model.mix).double().eval()
    landscape = flatlab.Landscape(model, batches(2, 4), flatlab.loss_of(model))
    assert list(landscape.named) == ["mix.down.weight", "mix.up.weight"]
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss, point = of_tokens(model, sentences()), landscape.point

    def value(vector):
        down, up = vector.split([8, 8])
        return loss({**fixed, "mix.down.weight": down.view(2, 4), "mix.up.weight": up.view(4, 2)})

    assert len(named) == 2
    torch.testing.assert_close(
        flatlab.Hessian(landscape) @ eye(landscape), torch.func.jacrev(torch.func.grad(value))(point)
    )


def test_tied_weights_vary_once():
    model = tagger()
    model.head = nn.Linear(4, 7, bias=False).double().eval()
    model.head.weight = model.embed.weight
    whole = sentences()
    landscape = flatlab.Landscape(model, batches(6), flatlab.loss_of(model))
    assert landscape.num_params == sum(p.numel() for p in model.parameters()) == 7 * 4 + 20
    torch.testing.assert_close(flatlab.Hessian(landscape) @ eye(landscape), dense(model, of_tokens(model, whole)))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_are_called_by_the_arguments_of_the_inner_one(wrap):
    model = tagger()
    wrapped = wrap(model).eval()
    landscape = flatlab.Landscape(wrapped, batches(6), flatlab.loss_of(wrapped), params="head.*")
    bare = flatlab.Landscape(model, batches(6), flatlab.loss_of(model), params="head.*")
    assert landscape.num_params == 15
    assert landscape.base_loss == pytest.approx(bare.base_loss, rel=1e-12)
    torch.testing.assert_close(landscape.hvp(landscape.point), bare.hvp(bare.point))


def test_16_bit_weights_have_sums_in_float64_and_curvature_in_float32(untouched):
    model = tagger().bfloat16()
    wide = tagger().bfloat16().float()
    data = [{**b, "mask": b["mask"].bfloat16()} for b in batches(2, 4)]
    with untouched(model):
        landscape = flatlab.Landscape(model, data, flatlab.loss_of(model))
        other = flatlab.Landscape(
            wide, [{**b, "mask": b["mask"].float()} for b in batches(2, 4)], flatlab.loss_of(wide)
        )
        assert landscape.point.dtype == torch.float32 and torch.equal(landscape.point, other.point)
        assert landscape.base_loss == pytest.approx(other.base_loss, rel=2e-2)
        torch.testing.assert_close(landscape.hvp(landscape.point), other.hvp(other.point), rtol=1e-4, atol=1e-6)
        found, truth = (flatlab.sphere_flatness(each, [1.0], num_samples=8).value for each in (landscape, other))
        assert found == pytest.approx(truth, rel=0.1)
    sums, _ = landscape.loss(model(**data[1]), data[1]["labels"])
    assert sums.dtype == torch.float32  # of each sample; `total` adds them in float64
