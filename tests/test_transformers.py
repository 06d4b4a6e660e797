"""Models as people have them: dictionaries in, dataclasses out, attention, labels that are left out, tied weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatlab
from flatlab import seeds
from flatlab.metrics.flatness.perturbations import draw_direction

SIZES = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
WORDS = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2():
    config = transformers.GPT2Config(**WORDS, n_positions=6, n_embd=4, n_layer=1, n_head=2, n_inner=6)
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(**WORDS, **SIZES, max_position_embeddings=6, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def t5():
    config = transformers.T5Config(**WORDS, d_model=4, d_kv=2, d_ff=6, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def vit():
    config = transformers.ViTConfig(**SIZES, image_size=4, patch_size=2, num_channels=1, num_labels=3)
    return transformers.ViTForImageClassification(config)


MODELS = {"gpt2": gpt2, "bert": bert, "t5": t5, "vit": vit}


def rng(*names):
    return seeds.generator("test_transformers", *names)


def make(name):
    """Return a model in double precision with weights that matter, and a batch of six samples of unequal lengths."""
    model = MODELS[name]().double().eval()
    draws = rng(name)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=draws, dtype=torch.float64)
            weight.copy_(0.5 * noise + (weight.mean() > 0.5))  # the scales of norms stay near one
    classes = torch.randint(0, 3, (6,), generator=draws)
    if name == "vit":
        images = torch.randn(6, 1, 4, 4, generator=draws, dtype=torch.float64)
        return model, {"pixel_values": images, "labels": classes}
    words = torch.randint(3, 11, (6, 5), generator=draws)
    mask = (torch.arange(5) < torch.tensor([5, 3, 4, 5, 2, 4])[:, None]).long()
    labels = classes if name == "bert" else words.masked_fill(mask == 0, -100)
    return model, {"input_ids": words, "attention_mask": mask, "labels": labels}


def cut(batch, *sizes):
    pieces = [
        dict(zip(batch, each, strict=True)) for each in zip(*(v.split(sizes) for v in batch.values()), strict=True)
    ]
    return [transformers.BatchEncoding(piece) for piece in pieces]


def landscape_of(name, *sizes, **options):
    model, batch = make(name)
    return flatlab.Landscape(model, cut(batch, *(sizes or (6,))), flatlab.loss_of(model), **options)


def forward(name, model, batch, vector):
    """The logits by torch.func at a flat vector: shares no code with the landscape."""
    named = dict(model.named_parameters())
    pieces = vector.split([p.numel() for p in named.values()])
    state = {n: piece.reshape(p.shape) for (n, p), piece in zip(named.items(), pieces, strict=True)}
    kept = batch if name == "t5" else {key: value for key, value in batch.items() if key != "labels"}
    return torch.func.functional_call(model, state, (), kept).logits


def mean_loss(name, logits, labels):
    if name in ("bert", "vit"):
        return F.cross_entropy(logits, labels)
    if name == "gpt2":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # over the tokens that are not -100


def rows(values, point):
    """The derivative of each value by the point."""
    flat = values.flatten()
    eye = torch.eye(len(flat), dtype=flat.dtype)
    return torch.autograd.grad(flat, point, eye, retain_graph=True, is_grads_batched=True)[0]


@pytest.fixture(scope="module", params=MODELS)
def dense(request):
    """The Hessian and the Gauss-Newton matrix of a model's loss, entry by entry."""
    name = request.param
    model, batch = make(name)
    with sdpa_kernel(SDPBackend.MATH):
        point = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
        logits = forward(name, model, batch, point)
        loss = mean_loss(name, logits, batch["labels"])
        (slope,) = torch.autograd.grad(loss, point, create_graph=True)
        hessian, jacobian = rows(slope, point), rows(logits, point)
        z = logits.detach().requires_grad_()
        (of_outputs,) = torch.autograd.grad(mean_loss(name, z, batch["labels"]), z, create_graph=True)
        middle = rows(of_outputs, z).flatten(1)
    return name, loss.item(), slope.detach(), hessian, jacobian.T @ middle @ jacobian


@pytest.mark.parametrize("sizes", [(6,), (1, 3, 2)])
def test_curvature_agrees_with_dense_autograd(dense, sizes, untouched):
    name, loss, slope, hessian, ggn = dense
    landscape = landscape_of(name, *sizes)
    block = torch.randn(landscape.num_params, 4, generator=rng("block"), dtype=torch.float64)
    with untouched(landscape.model):
        assert landscape.base_loss == pytest.approx(loss, rel=1e-12)
        rtol, atol = (1e-7, 1e-7) if name == "t5" else (1e-9, 1e-12)
        torch.testing.assert_close(landscape.gradient(), slope, rtol=rtol, atol=atol)
        for operator, matrix in ((flatlab.Hessian, hessian), (flatlab.GGN, ggn)):
            off = (operator(landscape) @ block - matrix @ block).norm() / (matrix @ block).norm()
            assert off < (1e-5 if name == "t5" else 1e-10)  # T5 takes the variance of its norms in float32
    assert (ggn - hessian).norm() > 0.01 * hessian.norm()


def test_eigenvalues_and_trace_agree_with_dense_autograd(dense):
    name, _, _, hessian, _ = dense
    landscape = landscape_of(name)
    values = torch.linalg.eigvalsh(hessian).numpy()
    found = flatlab.hessian_spectrum(landscape, k=3, tol=1e-6)
    assert found.value == pytest.approx(values[::-1][:3], rel=1e-5)
    trace = flatlab.hessian_trace(landscape, budget=60)
    off = np.abs(trace.value - [values.sum(), (values**2).sum()])
    assert (off < 4 * trace.stderr).all() and (
        trace.stderr < 0.3 * np.abs(values).sum() * np.array([1, values.max()])
    ).all()


@pytest.mark.parametrize("sizes", [(6,), (2, 1, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_flatness_is_the_mean_rise_of_the_models_own_loss(name, sizes):
    landscape, (model, batch) = landscape_of(name, *sizes), make(name)
    found = flatlab.sphere_flatness(landscape, [0.1, 1.0], num_samples=3, seed=5)
    rises = []
    with torch.no_grad():
        own = model(**batch).loss.item()
        for k in range(3):
            ray, each = draw_direction(landscape, 5, k), []
            for radius in (0.1, 1.0):
                nn.utils.vector_to_parameters(landscape.point + radius * ray, model.parameters())
                each.append(model(**batch).loss.item() - own)
            rises.append(each)
    assert np.abs(rises).min() > 1e-4
    assert found.value == pytest.approx(np.mean(rises, axis=0), rel=1e-3, abs=2e-7)  # their loss is in float32


def test_a_loss_that_takes_no_outputs_of_transformers_is_refused_with_the_way_out():
    model, batch = make("bert")
    with pytest.raises(flatlab.UserError, match=r"outputs that are a SequenceClassifierOutput of .*flatlab.loss_of"):
        flatlab.Landscape(model, cut(batch, 6), F.cross_entropy)
    labels = batch.pop("labels")
    with pytest.raises(flatlab.UserError, match=r"a BatchEncoding with .*, but without 'labels': add the targets"):
        flatlab.Landscape(model, cut(batch, 6), flatlab.loss_of(model))
    with pytest.raises(flatlab.UserError, match=r"The model fails on a batch of 6 samples \(Expected input batch_size"):
        flatlab.Landscape(model, cut({**batch, "labels": labels[:, None].repeat(1, 2)}, 6), flatlab.loss_of(model))
