"""The networks of `qgen` and their measurements: width x depth x lr x weight decay x seed x bits.

The networks of one trajectory differ only in their bits: up to the switch they are one training, whose state there is
stored. Each trajectory has its own seeds of split, initialisation and batches, so that trajectories are independent. A
training ends at the first evaluation from the switch on at which the mean cross-entropy on the training images is at
most `TARGET` nats, or at the setting's number of steps. Torch-free.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from flatlab.arguments import Normalisation
from flatlab.specs.generalisation import GeneralisationSpec
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.measurements import SpectrumSpec, SphereSpec
from flatlab.specs.methods import METHODS, Labelled, compose
from flatlab.specs.rises import ByNoise, ByRise
from flatlab.specs.run import RunSpec, StopSpec
from flatlab.specs.settings import QUICK, SMOKE, Setting

TARGET = 0.05  # nats
FULL = 32  # bits of a network that is not quantized
SWITCH = 0.1  # share of the steps
IMAGES = 32  # of each domain, for measurements
DIRECTIONS = 10  # the same for all networks of one width and depth, each on all images
RISES = (0.5,)  # nats, of the reference network of the same width and depth
MULTIPLES = (0.5, 1.0, 2.0, 4.0)  # of a network's quantization noise


@dataclass(frozen=True)
class Grid:
    """Values along each axis of the grid; learning rates are multiples of the setting's."""

    models: tuple[str, ...]
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    batches: tuple[int, ...]
    bits: tuple[int, ...]
    seeds: int  # at least


DIGITS = Grid(
    models=("cnn-10x2", "cnn-10x3", "cnn-16x2", "cnn-16x3"),
    rates=(2.0, 4.0),
    decays=(0.0, 1e-3),
    batches=(QUICK.batch_size,),
    bits=(2, 3, 4, 8, FULL),
    seeds=1,
)
TINY = Grid(models=("cnn-10x2",), rates=(1.0,), decays=(0.0,), batches=(8,), bits=(2, 8, FULL), seeds=1)
PHOTOGRAPHS = Grid(  # INFERRED: 2,160 networks, of the order of the paper's
    models=tuple(f"cnn-{width}x{depth}" for width, depth in itertools.product((16, 32, 64), (4, 5))),
    rates=(0.5, 1.0, 2.0),
    decays=(0.0, 1e-4, 1e-3),
    batches=(16, 32),
    bits=(2, 4, 8, FULL),
    seeds=5,
)


def grid(setting: Setting) -> Grid:
    """Return the grid of a setting."""
    if setting.name == SMOKE.name:
        return TINY
    return DIGITS if setting.dataset == QUICK.dataset else PHOTOGRAPHS


def trained(setting: Setting) -> Setting:
    """Return the setting of the trainings: small networks from scratch, an early switch, frequent evaluations."""
    return setting.replace(
        switch_share=SWITCH,
        eval_every=max(1, setting.eval_every // 3),
        lr=setting.lr if setting.weights == "none" else QUICK.lr,
        weights="none",
        freeze_batchnorm=False,
        test_share=setting.test_share or QUICK.test_share,
    )


def trajectories(setting: Setting) -> Iterator[dict[int, RunSpec]]:
    """Yield the runs of each trajectory by their bits; the last of the held-out domains is held out."""
    own, axes = trained(setting), grid(setting)
    seeds = range(max(axes.seeds, setting.seeds))
    points = itertools.product(axes.models, axes.rates, axes.decays, axes.batches, seeds)
    for number, (model, rate, decay, batch, _) in enumerate(points):
        lr = rate * own.lr
        here = own.replace(model=model, lr=lr, scale_lr=lr / 5, weight_decay=decay, batch_size=batch)
        yield {bits: _run(here, bits, number) for bits in axes.bits}


def _run(setting: Setting, bits: int, number: int) -> RunSpec:
    """Return a network of a trajectory."""
    parts = METHODS["ERM" if bits == FULL else "QT-DoG"]
    own = setting if bits == FULL else setting.replace(bits=bits)
    seeds = {"seed": setting.seed + number, "trial_seed": setting.trial_seed + number}
    stop = StopSpec(loss=TARGET, after=setting.switch_step)
    return compose(parts, own, held_out=setting.held_out[-1], **seeds).replace(stop=stop)


def name_of(bits: int) -> str:
    """Return the name of the networks of a bit width."""
    return f"{bits} bits"


def labelled(setting: Setting) -> list[Labelled]:
    """Return each network with the name of its bits."""
    return [(name_of(bits), run) for each in trajectories(setting) for bits, run in each.items()]


def measurements(setting: Setting, run: RunSpec, reference: str) -> dict[str, MeasurementSpec]:
    """Return the measurements of a network, by name.

    Args:
        setting: of the reproduction.
        run: the network.
        reference: digest of the network whose rises determine the radii.
    """
    common = {"checkpoint": "last", "images": setting.images or IMAGES}
    directions = setting.num_samples or DIRECTIONS

    def sphere(radii: ByRise | ByNoise, normalisation: Normalisation = "none") -> SphereSpec:
        return SphereSpec.make(**common, num_samples=directions, radii=radii, normalisation=normalisation)

    risen = ByRise.make(rises=RISES, references=(reference,))
    plain = {bits: bits for bits in grid(setting).bits if bits != FULL}  # whose rounding noise is the unit
    widths = {run.quantizer.bits: None} if run.quantizer else plain
    return {
        "raw": sphere(risen),
        "filter": sphere(risen, "filter"),
        **{f"noise {bits}": sphere(ByNoise.make(multiples=MULTIPLES, bits=own)) for bits, own in widths.items()},
        "curvature": SpectrumSpec.make(**common, k=1, tol=0.05, rel_error=0.1, trace_budget=32, starts=1, steps=1),
        "others": GeneralisationSpec.make(**common),
    }


def planned(setting: Setting) -> list[tuple[int, RunSpec, dict[str, MeasurementSpec]]]:
    """Return each network with its bits and its measurements."""
    references: dict[str, str] = {}
    made: dict[tuple[str, int], dict[str, MeasurementSpec]] = {}  # once, not for each of thousands of networks
    found = []
    for each in trajectories(setting):
        reference = references.setdefault(each[FULL].model, each[FULL].digest)
        for bits, run in each.items():
            if (reference, bits) not in made:
                made[reference, bits] = measurements(setting, run, reference)
            found.append((bits, run, made[reference, bits]))
    return found
