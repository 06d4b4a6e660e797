"""Inputs of measurements: landscapes, images and quantized weights of a run."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlab.data.batches import evaluation_batches
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.loading.checkpoint import network
from flatlab.quant.attach import bake, channel_axis, layers, quantized_layers, tensor_of
from flatlab.quant.codebook import check_finite
from flatlab.quant.lsq import LSQ
from flatlab.seeds import generator
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.methods import name_of
from flatlab.specs.run import Place, RunSpec
from flatlab.store.runs import Run, RunStore
from flatlab.tensors.nested import Pairs


@dataclass(frozen=True)
class Layer:
    """One quantized weight.

    Attributes:
        weight: the latent weight, in full precision.
        quantized: the weight with which the network computes.
        step: its step sizes, which broadcast against it.
        bits: bits of a code.
    """

    weight: Tensor
    quantized: Tensor
    step: Tensor
    bits: int


def trained_layers(run: Run, checkpoint: str, place: Place) -> dict[str, Layer]:
    """Return each weight that a run has quantized, by its name; none if it has no quantizer.

    Args:
        run: a finished run.
        checkpoint: "selected" or "last".
        place: device and data.
    """
    return _layers(network(run, checkpoint, place), run.spec)


def _layers(loaded: nn.Module, spec: RunSpec) -> dict[str, Layer]:
    bits = spec.quantizer.bits if spec.quantizer else 0
    return {
        f"{name}.{tensor_of(each.layer)}": _layer(each.latent, each.weight, each.quantizer.scale, bits)
        for name, each in quantized_layers(loaded).items()
    }


def _layer(weight: Tensor, quantized: Tensor, step: Tensor, bits: int) -> Layer:
    return Layer(weight.detach().clone(), quantized.detach().clone(), step.detach().clone(), bits)


def rounded(weight: Tensor, bits: int, *, granularity: str, name: str, axis: int = 0) -> Layer:
    """Return a weight rounded to the nearest level of LSQ's initial grid.

    Args:
        weight: weight of a layer.
        bits: 2 to 16.
        granularity: "channel" or "tensor".
        name: name of the weight, for errors.
        axis: axis of the output channels.
    """
    check_finite(weight, name)
    quantizer = LSQ(weight, bits=bits, granularity=granularity, axis=axis).to(weight.device)
    return _layer(weight, quantizer(weight), quantizer.scale, bits)


def noise_norm(run: Run, checkpoint: str, place: Place, bits: int | None) -> float:
    """Return the L2 norm of w_q - w over all quantized weights of a run, or of rounding those of a plain one.

    Args:
        run: a finished run.
        checkpoint: "selected" or "last".
        place: device and data.
        bits: those to which a run without a quantizer is rounded, by channel; None for a quantized one.

    Raises:
        UserError: if a plain run lacks `bits`, or a quantized one is given any.
    """
    plain, found = latent_network(run, checkpoint, place)
    if (bits is None) != bool(found):
        raise UserError(
            f"Radii in units of quantization noise need `bits` for a run without a quantizer, and only there; got "
            f"bits={bits} for run {run.spec.digest} ({name_of(run.spec)})."
        )
    if bits is not None:
        found = {
            name: rounded(plain.get_parameter(name).detach(), bits, granularity="channel", name=name, axis=axis)
            for name, axis in quantizable(plain).items()
        }
    return float(sum((each.quantized - each.weight).double().square().sum() for each in found.values()) ** 0.5)


def latent_network(run: Run, checkpoint: str, place: Place) -> tuple[nn.Module, dict[str, Layer]]:
    """Return a run's network with its latent weights, as a plain one, and its quantized weights by name.

    For a run without a quantizer that is its network, and no weights.

    Args:
        run: a finished run.
        checkpoint: "selected" or "last".
        place: device and data.
    """
    loaded = network(run, checkpoint, place)
    found = _layers(loaded, run.spec)
    bake(loaded)
    with torch.no_grad():
        for name, layer in found.items():
            loaded.get_parameter(name).copy_(layer.weight)
    return loaded, found


def quantizable(loaded: nn.Module) -> dict[str, int]:
    """Return the weights that a quantizer would be attached to, by name, with the axis of their output channels.

    Raises:
        UserError: the network has none.
    """
    return {f"{name}.{tensor_of(layer)}": channel_axis(layer) for name, layer in layers(loaded).items()}


SIZE = 128  # images of a batch for BatchNorm's statistics


def landscape(run: Run, spec: MeasurementSpec, place: Place, *, of: Collection[str] | None = None) -> Landscape:
    """Return the loss of a run's checkpoint on each domain, or on some, as a function of its weights.

    Strata are the domains. A quantized network is baked, so that all methods are measured in the same space; or, for
    `space="latent"`, quantized again at each point, with fixed step sizes.

    Raises:
        UserError: if latent weights do not determine the quantized ones, or the data differ from the run's.
    """
    batches = {name: each for name, each in images(run, spec, place).items() if of is None or name in of}
    loaded = network(run, spec.checkpoint, place)
    if spec.space != "latent":
        bake(loaded)
        return Landscape(loaded, batches, F.cross_entropy, params=spec.params)
    if any(not isinstance(quantizer, LSQ) for _, quantizer in quantized_layers(loaded).values()):
        raise UserError(
            f"Run {run.spec.digest} ({name_of(run.spec)}) has fixed codes, which latent weights do not change: write "
            "--space baked."
        )
    scales = loading_network.roles(loaded)["scales"].values()
    for scale in scales:
        scale.requires_grad_(False)
    return Landscape(loaded, batches, F.cross_entropy, params=spec.params)


def images(run: Run, spec: MeasurementSpec, place: Place) -> dict[str, Pairs]:
    """Return the batches of each domain for a measurement."""
    domains = loading_data.domains(run.spec, place)
    run.check_data(domains.data.fingerprint)
    data, rows = domains.data, {name: each[: spec.images] for name, each in domains.measured(spec.split).items()}
    if spec.corruption:
        from flatlab.data.corruptions import corrupted  # here: scipy.ndimage takes a third of a second to load

        data = corrupted(data, spec.corruption, rows)
        rows = {domain.name: np.arange(len(domain)) for domain in data.domains}
    device = loading_data.device(place)
    return {name: evaluation_batches(data, name, rows[name], device=device) for name in data.names if name in rows}


def training_images(run: Run, count: int | None, place: Place) -> Pairs | None:
    """Return batches of the first `count` training images of each source domain, the domains mixed in each batch."""
    if count is None:
        return None
    batches = loading_data.domains(run.spec, place).calibration(count, loading_data.device(place))
    x, y = (torch.cat([pair[k] for domain in batches for pair in domain]) for k in range(2))
    order = torch.randperm(len(y), generator=generator("statistics", count)).to(y.device)
    return list(zip(torch.split(x[order], SIZE), torch.split(y[order], SIZE), strict=True))


def other_of(run: Run, digest: str, place: Place) -> Run:
    """Return another run of the store, of the same data.

    Raises:
        UserError: if there is none, or its data differ.
    """
    other = RunStore(run.path.parent).find(digest)
    other.check_data(loading_data.domains(run.spec, place).data.fingerprint)
    return other
