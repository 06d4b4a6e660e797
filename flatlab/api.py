"""The public interface: every public name, grouped. `flatlab.NAME` is the same as `flatlab.api.NAME`.

No public name equals that of a module: `flatlab.train` is the package, `flatlab.train_runs` the function.
"""

from flatlab.derivatives.operators import Hessian
from flatlab.derivatives.outer import GGN, Fisher
from flatlab.errors import UserError
from flatlab.landscape.evaluation import Evaluation
from flatlab.landscape.landscape import Landscape
from flatlab.landscape.own_loss import loss_of
from flatlab.loading.checkpoint import network as network_of
from flatlab.loading.export import Exported, load_exported
from flatlab.loading.export import export as export_run
from flatlab.measure.inputs import landscape as landscape_of
from flatlab.measure.runner import measure as measure_run
from flatlab.metrics.curvature.density import spectral_density
from flatlab.metrics.curvature.eigenvalues import hessian_spectrum
from flatlab.metrics.curvature.trace import DEFLATE, hessian_trace
from flatlab.metrics.flatness.codes import code_flatness
from flatlab.metrics.flatness.compare import compare_flatness, paired_difference
from flatlab.metrics.flatness.norm_matched import typical_rise
from flatlab.metrics.flatness.pilot import radii_at_rises
from flatlab.metrics.flatness.sharpness import average_sharpness, normalised_logits, worst_sharpness
from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.metrics.flatness.worst import worst_rise
from flatlab.metrics.gradcam import ablation, explained_layer, gradcam
from flatlab.metrics.progress import counted
from flatlab.metrics.quantization_noise import quantization_noise
from flatlab.metrics.receiving import of_landscapes
from flatlab.metrics.scale_audit import scale_audit
from flatlab.metrics.surfaces.connectivity import connect
from flatlab.metrics.surfaces.directions import (
    Directions,
    eigen_directions,
    given_directions,
    plane_through,
    random_directions,
    trajectory_directions,
)
from flatlab.metrics.surfaces.planes import line, plane
from flatlab.metrics.trace_check import trace_check
from flatlab.models.networks import Ensemble, Network, build_network
from flatlab.quant.attach import attach, attach_activations, bake, clamp_scales
from flatlab.quant.calibration import second_moments
from flatlab.quant.codes import code_neighbours
from flatlab.quant.inq import INQ
from flatlab.quant.libraries import plain_network
from flatlab.quant.lsq import LSQ
from flatlab.quant.obc import obc
from flatlab.results.connectivity import Connection, Connections
from flatlab.results.gradcam import ClassMaps, MeasuredMaps
from flatlab.results.quantization_noise import LayerNoise, NetworkNoise, QuantizationNoise, Symmetry
from flatlab.results.rounding import RoundingRise, RoundingRises
from flatlab.results.scale_audit import ScaleAudit
from flatlab.results.sharpness import AverageSharpness, Generalisation, WorstRise, WorstSharpness
from flatlab.results.size import FileSize, Latency
from flatlab.results.spectrum import PILOT, MeasuredSpectrum, SpectralDensity, Spectrum, Trace
from flatlab.results.sphere import PairedDifference, Reach, SphereFlatness
from flatlab.results.stability import Stability
from flatlab.results.stability import stability as accuracy_stability
from flatlab.results.surface import Profile, Surface
from flatlab.results.trace_check import TraceCheck
from flatlab.saving import load
from flatlab.specs.measurements import QuantizationNoiseSpec, RoundingSpec, SphereSpec
from flatlab.specs.methods import METHODS, Method, compose, replicates, vary
from flatlab.specs.quantizers import INQSpec, NoiseSpec, OBCSpec, QuantSpec, RTNSpec
from flatlab.specs.run import AverageSpec, MixSpec, Place, RunSpec, StepSpec
from flatlab.specs.settings import PAPER, QUICK, SMOKE, Setting, setting
from flatlab.store.runs import Run, RunStore
from flatlab.train.loop import train as train_runs
from flatlab.train.replay import Replay
from flatlab.train.replay import replay as replay_averages

# Functions that can take longer than two seconds show a progress bar.
sphere_flatness = counted(sphere_flatness)
compare_flatness = counted(compare_flatness)
code_flatness = counted(code_flatness)
worst_rise = counted(worst_rise)
average_sharpness = counted(average_sharpness)
worst_sharpness = counted(worst_sharpness)
spectral_density = counted(spectral_density)
typical_rise = counted(typical_rise)
line = counted(line)
plane = counted(plane)
connect = counted(connect)
scale_audit = counted(scale_audit)
radii_at_rises = counted(radii_at_rises)
trace_check = counted(trace_check)
gradcam = counted(gradcam)
hessian_spectrum = counted(hessian_spectrum, products=lambda given: 3 * int(given.get("k", 10)))
hessian_trace = counted(hessian_trace, products=lambda given: DEFLATE + PILOT)
random_directions = of_landscapes(random_directions)
eigen_directions = of_landscapes(eigen_directions)
given_directions = of_landscapes(given_directions)
plane_through = of_landscapes(plane_through)
trajectory_directions = of_landscapes(trajectory_directions)

__all__ = [
    # landscapes and their measures
    "load",
    "Landscape",
    "loss_of",
    "Evaluation",
    "sphere_flatness",
    "SphereFlatness",
    "compare_flatness",
    "code_flatness",
    "worst_rise",
    "WorstRise",
    "average_sharpness",
    "AverageSharpness",
    "worst_sharpness",
    "WorstSharpness",
    "normalised_logits",
    "paired_difference",
    "PairedDifference",
    "radii_at_rises",
    "Reach",
    # curvature
    "Hessian",
    "GGN",
    "Fisher",
    "hessian_spectrum",
    "Spectrum",
    "spectral_density",
    "SpectralDensity",
    "hessian_trace",
    "Trace",
    "MeasuredSpectrum",
    # quantization noise
    "quantization_noise",
    "QuantizationNoise",
    "LayerNoise",
    "NetworkNoise",
    "Symmetry",
    "typical_rise",
    "RoundingRise",
    "RoundingRises",
    # out of domain
    "accuracy_stability",
    "Stability",
    "gradcam",
    "ClassMaps",
    "MeasuredMaps",
    "explained_layer",
    "ablation",
    # lines and planes
    "line",
    "Profile",
    "plane",
    "Surface",
    "Directions",
    "random_directions",
    "eigen_directions",
    "given_directions",
    "plane_through",
    "trajectory_directions",
    "connect",
    "Connection",
    "Connections",
    # audits
    "scale_audit",
    "ScaleAudit",
    "trace_check",
    "TraceCheck",
    # networks and quantizers
    "Network",
    "Ensemble",
    "build_network",
    "LSQ",
    "INQ",
    "attach",
    "attach_activations",
    "bake",
    "clamp_scales",
    "plain_network",
    "code_neighbours",
    "obc",
    "second_moments",
    "export_run",
    "load_exported",
    "Exported",
    "FileSize",
    "Latency",
    "Generalisation",
    # methods, settings, specs
    "METHODS",
    "Method",
    "compose",
    "replicates",
    "vary",
    "SMOKE",
    "QUICK",
    "PAPER",
    "Setting",
    "setting",
    "RunSpec",
    "SphereSpec",
    "QuantizationNoiseSpec",
    "RoundingSpec",
    "QuantSpec",
    "INQSpec",
    "RTNSpec",
    "OBCSpec",
    "NoiseSpec",
    "StepSpec",
    "AverageSpec",
    "MixSpec",
    "Place",
    # training and measuring runs
    "replay_averages",
    "Replay",
    "RunStore",
    "Run",
    "train_runs",
    "measure_run",
    "network_of",
    "landscape_of",
    "UserError",
]
