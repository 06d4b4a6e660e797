"""One frozen spec for each kind of measurement of a checkpoint, registered by its `metric`."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny

from flatlab.errors import UserError, choose
from flatlab.specs.base import LARGEST_INT
from flatlab.specs.generalisation import GeneralisationSpec
from flatlab.specs.measurement import FORESEEN, PILOT, PRODUCT, MeasurementSpec, Sizes
from flatlab.specs.methods import name_of
from flatlab.specs.quantizers import Bits, Granularity
from flatlab.specs.rises import ByRise, Normalisation, Radii, ReachSpec, count_above_zero, pilots_of
from flatlab.specs.run import RunSpec

Recompute = Annotated[
    int | None,
    Field(
        ge=2,
        le=LARGEST_INT,
        description="Recompute BatchNorm's statistics at each grid point from this many training images of each source "
        "domain.",
    ),
]


def _none_if_zero(tolerance: float | None) -> float | None:
    return tolerance or None


class SurfaceSpec(MeasurementSpec):
    """Loss and accuracy of each domain on a plane through the checkpoint."""

    later = (*MeasurementSpec.later, "every", "recompute")

    metric: Literal["surface"] = "surface"
    space: Literal["baked", "latent"] = "baked"
    axes: Literal["random", "hessian", "runs", "trajectory"] = Field(
        "random",
        description="Axes of the plane. random: filter-normalised directions; hessian: the two top eigenvectors; runs: "
        "the plane through three runs, or with more their first two principal components, centred on the last; "
        "trajectory: those of the run's own checkpoints (`train --keep-every`)",
    )
    through: tuple[str, ...] = ()  # digests: two others that span the plane, or a trajectory of four and more
    every: int | None = Field(
        None,
        ge=1,
        le=LARGEST_INT,
        description="Steps between the checkpoints of a trajectory; all that were kept if not given.",
    )
    grid: int = Field(33, ge=2, le=1000, description="Grid points along each axis; 33 and 49 refine best.")
    extent: float = Field(  # not used if checkpoints span the plane
        1.0, gt=0, le=1e9, description="Half the length of each axis; set by the runs if they span the plane."
    )
    refine: Annotated[float | None, AfterValidator(_none_if_zero)] = Field(
        0.05,
        ge=0,
        le=1,
        description="Interpolation tolerance as a fraction of the loss range; 0 evaluates the full grid.",
    )
    recompute: Recompute = None

    @property
    def spanned(self) -> bool:
        """Whether checkpoints span the plane: the grid then lies around them."""
        return self.axes in ("runs", "trajectory")

    def passes(self, sizes: Sizes) -> float:
        """Return an upper bound of the number of images forwarded; refinement needs fewer."""
        return _images_per_point(self, sizes, self.recompute) * self.grid**2


class ConnectionSpec(MeasurementSpec):
    """The straight line from the checkpoint to another run's, over the source domains and the held-out domain."""

    metric: Literal["connectivity"] = "connectivity"
    space: Literal["baked"] = "baked"  # both ends are networks as they compute
    to: str  # digest
    grid: int = Field(33, ge=3)
    recompute: Recompute = None

    def passes(self, sizes: Sizes) -> float:
        """Return the number of images forwarded; with statistics for the source and the held-out domains."""
        return _images_per_point(self, sizes, 2 * (self.recompute or 0)) * self.grid


def _images_per_point(spec: MeasurementSpec, sizes: Sizes, recompute: int | None) -> float:
    """Return the number of images per point: those evaluated, and those of the source domains for statistics."""
    return float(spec.count(sizes) + (recompute or 0) * (len(sizes) - 1))


class TraceCheckSpec(MeasurementSpec):
    """Three independent estimates of the trace of the Hessian."""

    metric: Literal["trace_check"] = "trace_check"
    space: Literal["baked"] = "baked"  # the loss has no curvature in weights that are rounded
    rel_error: float = Field(
        0.05, gt=0, le=1, description="Relative standard error at which sampling of the trace stops."
    )

    def passes(self, sizes: Sizes) -> float:
        """Return the estimated number of images forwarded: products for trace and density, and seven spheres."""
        return float(self.count(sizes) * PRODUCT * (20 + PILOT + 96) + 7 * FORESEEN / self.rel_error**2)


class ScaleAuditSpec(MeasurementSpec):
    """How measures of flatness change under rescalings that leave the function unchanged."""

    metric: Literal["scale_audit"] = "scale_audit"
    space: Literal["baked"] = "baked"
    most: float = Field(4.0, gt=1, le=1e6, description="Largest factor by which a layer or channel is rescaled.")
    num_samples: int = Field(20, ge=2, le=10**6, description="Number of directions of each sphere, on all images.")

    def passes(self, sizes: Sizes) -> float:
        """Return the estimated number of images forwarded: four spheres, a trace, an eigenvalue for three networks."""
        return float(3 * self.count(sizes) * (4 * self.num_samples + PRODUCT * (20 + PILOT + 10)))


LEAST = 5_900  # images of a radius at 10 %: two looks, 162 pairs on blocks of 16, and the losses at w (measured)
BUDGET = 100  # maximum passes for each radius
AUTO_RADII = 6
PYHESSIAN = 18  # its products for an eigenvalue, by its defaults: 177 for ten on a ResNet-20
PYHESSIAN_TRACE = 100  # its maximum number of vectors


class SphereSpec(MeasurementSpec):
    """Flatness on spheres (QT-DoG Eq. 5)."""

    metric: Literal["sphere"] = "sphere"
    radii: Radii  # absolute L2, or the share of each filter's norm
    num_samples: int | None = Field(  # None: as many as the accuracy requires
        None,
        ge=2,
        le=10**6,
        description="Fixed number of directions, each on all images (SWAD's procedure), instead of an accuracy target.",
    )
    rel_error: float = Field(0.02, ge=0, le=1, description="Relative standard error (of |F|) at which sampling stops.")
    abs_error: float = Field(
        1e-4, ge=0, le=1e30, description="Absolute standard error (nats) at which sampling also stops."
    )
    budget: int | None = Field(
        None, ge=1, le=10**15, description="Maximum number of forwarded images; 100 passes a radius if not given."
    )
    block_size: int | None = Field(
        None,
        ge=1,
        le=LARGEST_INT,
        description="Images on which a direction is evaluated; chosen by a pilot if not given.",
    )
    normalisation: Normalisation = Field(
        "none",
        description="Unit of the radii: none (L2 distance), or a share of the norm of each filter, layer or parameter.",
    )

    @property
    def piloted(self) -> bool:
        """Whether a pilot chooses the sampling plan."""
        return self.num_samples is None and self.block_size is None and self.space != "codes"

    @property
    def effort(self) -> str:
        """The sampling effort, as text for a caption: the error is that of the mean over all domains at a radius."""
        if self.num_samples:
            return f"{self.num_samples} directions"
        return f"directions for {self.rel_error:.0%} error of F over all domains"

    @property
    def pilots(self) -> tuple[tuple[str, MeasurementSpec], ...]:
        """The measurements of reference runs that determine the radii."""
        return pilots_of(self, self.radii, normalisation=self.normalisation)

    def passes(self, sizes: Sizes) -> float:
        """Return the number of images forwarded; for an accuracy target a rule of thumb, since no pilot has run yet."""
        images = self.count(sizes)
        count = AUTO_RADII if isinstance(self.radii, str) else count_above_zero(self.radii)
        foreseen = max(LEAST, FORESEEN / max(self.rel_error, 1e-3) ** 2)
        each = images * self.num_samples if self.num_samples else min(foreseen, BUDGET * images)
        return float(each * count)


class SpectrumSpec(MeasurementSpec):
    """Curvature of the mean loss over some domains, weighted equally: extreme eigenvalues, trace, density."""

    later = (*MeasurementSpec.later, "unrounded")

    metric: Literal["spectrum"] = "spectrum"
    space: Literal["baked"] = "baked"  # the loss has no curvature in weights that are rounded
    domains: str = "source"  # "source", "target" (the held-out domain), or names separated by commas
    engine: Literal["flatlab", "pyhessian"] = Field(
        "flatlab", description="Implementation; pyhessian adds the results of PyHessian to those of flatlab."
    )
    k: int = Field(10, ge=1, le=10**4, description="Number of eigenvalues.")
    which: Literal["LA", "SA", "BE"] = Field(
        "LA", description="Eigenvalues: LA (largest), SA (most negative) or BE (from both ends)."
    )
    tol: float = Field(1e-3, gt=0, le=1, description="Tolerance: residual relative to the eigenvalue.")
    rel_error: float = Field(
        0.02, ge=0, le=1, description="Relative standard error of the trace at which sampling stops."
    )
    trace_budget: int = Field(  # beyond those of the eigenvalues
        500, ge=32, le=LARGEST_INT, description="Maximum number of Hessian-vector products for the trace."
    )
    starts: int = Field(5, ge=1, le=10**4, description="Number of random starting vectors of the density.")
    steps: int = Field(60, ge=1, le=10**4, description="Lanczos steps from each starting vector.")
    unrounded: bool = Field(
        False,
        description="Clip the inputs of layers to the range of their codes without rounding them, where a run rounds "
        "them: behind rounded inputs the loss has no curvature.",
    )

    @property
    def panel(self) -> str:
        """The domains, and the corruption of their images, as text."""
        return f"{self.domains}{self.under}"

    @property
    def foreseen(self) -> int:
        """Estimated products: for the eigenvalues, a pilot of the trace, and the density (not with PyHessian)."""
        if self.engine == "pyhessian":
            return PYHESSIAN * self.k + PYHESSIAN_TRACE
        return 3 * self.k + min(self.trace_budget, PILOT) + self.starts * self.steps

    def passes(self, sizes: Sizes) -> float:
        """Return the number of images forwarded, a product counting as ten passes."""
        share = {"source": len(sizes) - 1, "target": 1}.get(self.domains, self.domains.count(",") + 1) / len(sizes)
        return float(self.count(sizes) * share * PRODUCT * self.foreseen)


class GradCAMSpec(MeasurementSpec):
    """GradCAM of images of the held-out domain, each for its true class, with quantitative measures of the maps."""

    metric: Literal["gradcam"] = "gradcam"
    images: int | None = Field(24, ge=1)  # of the held-out domain alone
    corruption: None = None
    layer: str | None = None  # name of a module; None: chosen automatically
    grid: tuple[int, int] | None = None  # of tokens, if it cannot be inferred
    num_shares: int = Field(10, ge=1)  # steps of the deletion and insertion curves
    radii: tuple[float, ...] | ByRise = ()  # absolute L2, at which the maps are computed again
    num_samples: int = Field(5, ge=1)  # directions

    @property
    def pilots(self) -> tuple[tuple[str, MeasurementSpec], ...]:
        """The measurements of reference runs that determine the radii: on all their source images."""
        return pilots_of(self, self.radii, images=None)

    def count(self, sizes: Sizes) -> int:
        """Return the number of images evaluated: those of one domain."""
        return min(max(sizes.values()), self.images or max(sizes.values()))

    def passes(self, sizes: Sizes) -> float:
        """Return the number of images forwarded; a map costs a forward and a backward pass."""
        maps = 1 + count_above_zero(self.radii) * self.num_samples
        return float(self.count(sizes) * (3 * maps + 2 * (self.num_shares + 1)))


class _OfWeights(MeasurementSpec):
    """A measurement of the weights alone: no image is evaluated, so that these fields are fixed."""

    split: Literal["in"] = "in"
    images: None = None
    space: Literal["baked"] = "baked"
    params: None = None
    corruption: None = None

    def passes(self, sizes: Sizes) -> float:
        """Return 1, whatever the sizes of the domains."""
        del sizes
        return 1.0


class QuantizationNoiseSpec(_OfWeights):
    """Uniformity and symmetry of the quantization noise of each layer of a quantized run (QT-DoG sec. 3.2, App. L)."""

    metric: Literal["quantization_noise"] = "quantization_noise"
    bins: int = Field(100, ge=2)  # of the histograms; the paper gives none

    @staticmethod
    def check(run: RunSpec) -> None:
        """Refuse a run that is not quantized.

        Args:
            run: the run to be measured.

        Raises:
            UserError: if the run is not quantized on a uniform grid; suggests an alternative.
        """
        if getattr(run.quantizer, "grid", "uniform") != "uniform":
            raise UserError(
                f"Run {run.digest} ({name_of(run)}) is quantized to powers of two, which have no step over which its "
                "noise could be uniform: name a run with a uniform grid."
            )
        if run.quantizer is None:
            raise UserError(
                f"Run {run.digest} ({name_of(run)}) is not quantized, so it has no quantization noise: name a "
                "quantized run (`flatlab train --quantizer lsq`), or measure the effect of rounding this one "
                "(`flatlab noise RUN --radius`)."
            )


class RoundingSpec(MeasurementSpec):
    """The rise of the loss under rounding to some bit widths, and under random perturbations of the same norm.

    The base point is the latent weights, in full precision; the weights that the quantizer quantizes are perturbed.
    """

    metric: Literal["rounding"] = "rounding"
    space: Literal["baked"] = "baked"  # not used here, see above
    bits: tuple[Bits, ...] = (8, 7, 6, 5, 4, 3, 2)
    layer_bits: tuple[Bits, ...] = ()  # at which each layer is also rounded alone
    granularity: Granularity = "channel"  # of the step sizes, which are the initial ones of LSQ
    num_samples: int = Field(  # each on all images
        100, ge=2, le=10**6, description="Number of random directions of each bit width, with --radius."
    )

    def passes(self, sizes: Sizes) -> float:
        """Return the estimated number of images forwarded, assuming a few layers: their number is not known here."""
        few = 4
        return float(self.count(sizes) * 2 * self.num_samples * (len(self.bits) + 1 + few * len(self.layer_bits)))


class SizeSpec(_OfWeights):
    """The size in bytes of a run's network as a file, its quantized weights packed (export.py)."""

    metric: Literal["size"] = "size"


class LatencySpec(_OfWeights):
    """The time of a run's network on the processor that measures, by engine, with the accuracy of each engine."""

    metric: Literal["latency"] = "latency"
    rounds: int = Field(30, ge=6, le=10**6, description="Rounds, in each of which every engine is called once.")

    def passes(self, sizes: Sizes) -> float:
        """Return the estimated number of images forwarded: four engines, each for 33 images and one or all threads."""
        return float(4 * 2 * 33 * self.rounds + 4 * max(sizes.values()))


KINDS: dict[str, type[MeasurementSpec]] = {
    "sphere": SphereSpec,
    "reach": ReachSpec,
    "spectrum": SpectrumSpec,
    "surface": SurfaceSpec,
    "connectivity": ConnectionSpec,
    "trace_check": TraceCheckSpec,
    "scale_audit": ScaleAuditSpec,
    "gradcam": GradCAMSpec,
    "quantization_noise": QuantizationNoiseSpec,
    "rounding": RoundingSpec,
    "size": SizeSpec,
    "latency": LatencySpec,
    "generalisation": GeneralisationSpec,
}


def parse_measurement(text: str) -> MeasurementSpec:
    """Read the spec of a measurement of any kind from its JSON.

    Args:
        text: JSON as `canonical` writes it.

    Raises:
        UserError: if the metric is unknown, or a field is wrong.
    """
    metric = json.loads(text).get("metric")
    if not isinstance(metric, str):
        raise UserError("The spec of a measurement must name its metric.")
    return KINDS[choose("metric", metric, KINDS)].parse(text)


def _of_its_kind(value: Any) -> Any:
    return parse_measurement(json.dumps(value)) if isinstance(value, dict) else value


AnyMeasurement = Annotated[SerializeAsAny[MeasurementSpec], BeforeValidator(_of_its_kind)]
"""A measurement of any kind, as a field of another spec."""
