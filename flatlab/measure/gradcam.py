"""GradCAM of a run on images of its held-out domain: maps and numbers, and the images themselves, for pictures.

The rows of the target's split are shuffled by the measurement's seed, and the first of each class is chosen before the
second of any; the choice does not depend on a network. Runs that share a split have the same images.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from flatlab import files
from flatlab.arguments import FloatArray, JobReport
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.loading import checkpoint
from flatlab.loading import data as loading_data
from flatlab.measure.units import UnitFiles
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.metrics.gradcam import ablation, explained_layer, gradcam, moved_agreement
from flatlab.quant.attach import bake
from flatlab.results.gradcam import ClassMaps, MeasuredMaps
from flatlab.seeds import derive
from flatlab.specs.measurements import GradCAMSpec
from flatlab.specs.rises import ByRise
from flatlab.specs.run import Place
from flatlab.store.radii import by_rise
from flatlab.store.runs import Measurement, Run, RunStore

INK = 0.25  # of full brightness: brighter pixels of digits are strokes
CHUNK = 8  # images at a time: their activations are kept for the gradient


def fill(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Measure maps and numbers; resumes an earlier call."""
    spec: GradCAMSpec = measurement.spec
    if spec.space != "baked":
        raise UserError(
            f"GradCAM needs the space baked, whose outputs are those of the quantized network, got {spec.space}: leave "
            "space out."
        )
    cams = _Cams(run, spec, place)
    names = ["maps", "curves", *(f"moved-{index:02d}" for index in range(spec.num_samples if spec.radii else 0))]
    acts = [cams.maps, cams.curves, *(lambda index=index: cams.moved(index) for index in range(len(names) - 2))]
    found = []
    for done, unit in enumerate(UnitFiles(measurement).units(list(zip(names, acts, strict=True))), 1):
        found.append(unit)
        if report:
            report(done, len(names), {})
    _write(measurement, cams, found)


class _Cams:
    """A run's network, the chosen images, and the computations on them."""

    def __init__(self, run: Run, spec: GradCAMSpec, place: Place) -> None:
        domains = loading_data.domains(run.spec, place)
        run.check_data(domains.data.fingerprint)
        domain = domains.data.domain(domains.target)
        split = domains.measured(spec.split)[domains.target]
        self.spec, self.target, self.radii = spec, domains.target, _radii(run, spec)
        self.rows = choose_images(split, domain.labels.numpy()[split], spec.images or len(split), seed=spec.seed)
        self.images = domain.images[torch.from_numpy(self.rows)]
        self.labels: list[int] = domain.labels[torch.from_numpy(self.rows)].tolist()
        self.inputs = domains.data.normalise(self.images).to(loading_data.device(place))
        self.model = checkpoint.network(run, spec.checkpoint, place)
        bake(self.model)
        self.layer = spec.layer or explained_layer(self.model, self.inputs[:1], self.labels[0])
        self.classes, self.inked = domains.data.classes, domains.data.name == "digits"

    def maps(self) -> FloatArray:
        """Return the maps (N, H, W) of the true classes."""
        return np.concatenate([self._of(*part).maps for part in self._parts()])

    def curves(self) -> FloatArray:
        """Return deletion and insertion (2, N, num_shares + 1)."""
        pairs = [ablation(self.model, x, self._of(x, y), num_shares=self.spec.num_shares) for x, y in self._parts()]
        return np.stack([np.concatenate(curves) for curves in zip(*pairs, strict=True)])

    def moved(self, index: int) -> FloatArray:
        """Return the agreement (R, N) of the maps with those at w + radius * direction, for one direction."""
        targets = torch.tensor(self.labels, device=self.inputs.device)
        landscape = Landscape(self.model, [(self.inputs, targets)], F.cross_entropy, params=self.spec.params)
        direction = draw_direction(landscape, self.spec.seed, index, normalisation="none")
        parts = [
            moved_agreement(landscape, x, self._of(x, y), direction=direction, radii=self.radii)
            for x, y in self._parts()
        ]
        return np.concatenate(parts, axis=1)

    def probabilities(self) -> FloatArray:
        """Return the network's probabilities (N, num_classes)."""
        with torch.no_grad():
            parts = [self.model(x).double().softmax(1).cpu().numpy() for x, _ in self._parts()]
        return np.concatenate(parts)

    def _of(self, inputs: Tensor, labels: list[int]) -> ClassMaps:
        return gradcam(self.model, inputs, labels, layer=self.layer, grid=self.spec.grid)

    def _parts(self) -> list[tuple[Tensor, list[int]]]:
        starts = range(0, len(self.labels), CHUNK)
        return [(self.inputs[start : start + CHUNK], self.labels[start : start + CHUNK]) for start in starts]


def _radii(run: Run, spec: GradCAMSpec) -> list[float]:
    found = by_rise(RunStore(run.path.parent), spec.radii, spec) if isinstance(spec.radii, ByRise) else spec.radii
    return [float(radius) for radius in found]


def choose_images(
    split: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], count: int, *, seed: int
) -> npt.NDArray[np.int64]:
    """Return row numbers, classes in turn: shuffled by the seed, first the first of each class, then the second.

    Args:
        split: (n,) rows to choose from.
        labels: (n,) their classes.
        count: maximum number of rows.
        seed: seed of the shuffling.
    """
    order = np.random.default_rng(derive("gradcam images", seed)).permutation(np.sort(split))
    classes = dict(zip(split.tolist(), labels.tolist(), strict=True))
    met: dict[int, int] = {}
    turns = []
    for row in order.tolist():
        turns.append(met.get(classes[row], 0))
        met[classes[row]] = turns[-1] + 1
    return order[np.argsort(turns, kind="stable")][:count]


def _write(measurement: Measurement, cams: _Cams, found: list[FloatArray]) -> None:
    """Write the assembled measurement, readable without torch."""
    maps, (deletion, insertion), *moved = found
    images = cams.images.numpy()
    whole = MeasuredMaps(
        maps=maps.astype(np.float32),
        deletion=deletion,
        insertion=insertion,
        images=images,
        rows=cams.rows,
        labels=np.array(cams.labels),
        probabilities=cams.probabilities(),
        moved=np.stack(moved) if moved else None,
        mask=(images.mean(axis=1) > INK * 255).astype(np.uint8) if cams.inked else None,
        layer=cams.layer,
        classes=tuple(cams.classes),
        radii=tuple(cams.radii),
        held_out=cams.target,
        seed=cams.spec.seed,
    )
    files.save_arrays(measurement.result, *whole.to_arrays())
