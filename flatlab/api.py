"""The doorway: every public name, grouped. `flatlab.NAME` is the same as `flatlab.api.NAME`.

No public name is that of a module: `flatlab.train` is the package, `flatlab.train_runs` the function.
"""

from flatlab.bars import counted
from flatlab.checkpoints import landscape as landscape_of
from flatlab.checkpoints import network as network_of
from flatlab.curvature.operators import Hessian
from flatlab.curvature.outer import GGN, Fisher
from flatlab.errors import UserError
from flatlab.export import Exported
from flatlab.export import export as export_run
from flatlab.exported import load_exported
from flatlab.landscape import Landscape
from flatlab.measure import measure as measure_run
from flatlab.methods import METHODS, Method, compose, replicates, vary
from flatlab.metrics.audit import ScaleAudit, scale_audit
from flatlab.metrics.barrier import Connection
from flatlab.metrics.compare import PairedDifference, compare_flatness, paired_difference
from flatlab.metrics.connectivity import connect
from flatlab.metrics.density import SpectralDensity, spectral_density
from flatlab.metrics.directions import (
    Directions,
    eigen_directions,
    given_directions,
    plane_through,
    random_directions,
    trajectory_directions,
)
from flatlab.metrics.gradcam import ClassMaps, ablation, explained_layer, gradcam
from flatlab.metrics.grids import Profile, Surface
from flatlab.metrics.lanczos import Spectrum, hessian_spectrum
from flatlab.metrics.noise import QuantizationNoise, quantization_noise
from flatlab.metrics.sharpness import (
    AverageSharpness,
    WorstSharpness,
    average_sharpness,
    normalised_logits,
    worst_sharpness,
)
from flatlab.metrics.sphere import SphereFlatness, sphere_flatness
from flatlab.metrics.surfaces import line, plane
from flatlab.metrics.symmetry import Symmetry
from flatlab.metrics.trace import DEFLATE, PILOT, Trace, hessian_trace
from flatlab.metrics.triangle import Triangle, triangle
from flatlab.metrics.typical import TypicalRise, typical_rise
from flatlab.metrics.worst import WorstRise, worst_rise
from flatlab.models import Ensemble, Network, build_network
from flatlab.points import Evaluation
from flatlab.probespecs import ProbeSpec, QuantNoiseSpec, RadiusSpec
from flatlab.quant.attach import attach, attach_activations, bake, clamp_scales
from flatlab.quant.calibration import second_moments
from flatlab.quant.inq import INQ
from flatlab.quant.lsq import LSQ
from flatlab.quant.obc import obc
from flatlab.quantspecs import INQSpec, NoiseSpec, OBCSpec, QuantSpec, RTNSpec
from flatlab.runs import Run, RunStore
from flatlab.settings import PAPER, QUICK, SMOKE, Setting, setting
from flatlab.specs import AverageSpec, MixSpec, Place, RunSpec, StepSpec
from flatlab.stability import Stability
from flatlab.stability import stability as accuracy_stability
from flatlab.train.loop import train as train_runs
from flatlab.train.replay import Replay
from flatlab.train.replay import replay as replay_averages

# What can last longer than two seconds shows a bar.
sphere_flatness = counted(sphere_flatness)
compare_flatness = counted(compare_flatness)
worst_rise = counted(worst_rise)
average_sharpness = counted(average_sharpness)
worst_sharpness = counted(worst_sharpness)
spectral_density = counted(spectral_density)
typical_rise = counted(typical_rise)
line = counted(line)
plane = counted(plane)
connect = counted(connect)
scale_audit = counted(scale_audit)
triangle = counted(triangle)
gradcam = counted(gradcam)
hessian_spectrum = counted(hessian_spectrum, products=lambda given: 3 * int(given.get("k", 10)))
hessian_trace = counted(hessian_trace, products=lambda given: DEFLATE + PILOT)

__all__ = [
    # landscapes and their measures
    "Landscape",
    "Evaluation",
    "sphere_flatness",
    "SphereFlatness",
    "compare_flatness",
    "worst_rise",
    "WorstRise",
    "average_sharpness",
    "AverageSharpness",
    "worst_sharpness",
    "WorstSharpness",
    "normalised_logits",
    "paired_difference",
    "PairedDifference",
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
    # quantization noise
    "quantization_noise",
    "QuantizationNoise",
    "Symmetry",
    "typical_rise",
    "TypicalRise",
    # out of domain
    "accuracy_stability",
    "Stability",
    "gradcam",
    "ClassMaps",
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
    # audits
    "scale_audit",
    "ScaleAudit",
    "triangle",
    "Triangle",
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
    "obc",
    "second_moments",
    "export_run",
    "load_exported",
    "Exported",
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
    "ProbeSpec",
    "QuantNoiseSpec",
    "RadiusSpec",
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
