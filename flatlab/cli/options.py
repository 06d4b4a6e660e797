"""The words of the command line: each option is written once, here, and means the same thing in every command."""

from pathlib import Path
from typing import Annotated, Any

import typer

_RUN = "a method (QT-DoG) or composition (sam-swad), with --held-out and --seed, or a digest's beginning"
Runs = Annotated[list[str], typer.Argument(help=f"Runs: each {_RUN} (`flatlab runs list`).")]
OneRun = Annotated[str, typer.Argument(help=f"A run: {_RUN} (`flatlab runs list`).")]

_DATA, _COMPOSITION, _SCHEDULE, _PLACE, _OUTPUT = "Data", "Composition", "Schedule and seeds", "Place", "Output"
_PARTS = "; instead of the method's own."

MODELS = {"digits-cnn": None, "resnet18": 3, "resnet50": 3, "mobilenet_v2": 3}  # -> channels; None: any number
PRECISIONS = ("fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")
KNOWN = {  # words of the command line that name one of a few
    "precision": PRECISIONS,
    "granularity": ("channel", "tensor"),
    "inq_grid": ("uniform", "power-of-two"),
    "activations": ("none", "signed", "unsigned"),
    "swad_rule": ("paper", "released"),
}

MOST = 10**9
LIMITS: dict[str, tuple[int, int | None]] = {  # the integers, wherever they are asked for: least, most
    "image_size": (1, 4096),
    "bits": (2, 16),
    "activation_bits": (2, 16),
    "quantize_at": (0, MOST),
    "swad_every": (1, MOST),
    "steps": (1, MOST),
    "eval_every": (1, MOST),
    "batch_size": (1, 10**6),
    "seed": (0, 2**31 - 1),
    "trial_seed": (0, 2**31 - 1),
    "seeds": (1, 1000),
    "workers": (1, 1024),
    "keep_every": (1, MOST),
    "samples": (2, 10**6),  # one direction has no interval
    "images": (1, MOST),
    "budget": (1, 10**15),
    "block_size": (1, MOST),
    "direction_seed": (0, 2**31 - 1),
    "start_seed": (0, 2**31 - 1),
    "since": (0, MOST),
    "k": (1, 10**4),
    "trace_budget": (2, MOST),
    "starts": (1, 10**4),
    "lanczos_steps": (1, 10**4),
    "grid": (2, 1000),
    "recompute": (2, MOST),
    "every": (1, MOST),
}
NUMBERS: dict[str, tuple[str, float, float]] = {  # the others: how the least binds, least, most
    "lr": (">", 0, 1e30),
    "test_share": (">=", 0, 0.9),
    "noise_amplitude": (">", 0, 1e30),
    "sam_rho": (">=", 0, 1e30),
    "rel_error": (">=", 0, 1),
    "abs_error": (">=", 0, 1e30),
    "tol": (">", 0, 1),
    "extent": (">", 0, 1e9),
    "refine": (">=", 0, 1),
    "most": (">", 1, 1e6),
}
FOLDERS = ("store", "out", "cache", "tensorboard", "data_dir")


def flag(name: str) -> str:
    """Return an option as it is written."""
    return f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"


def _option(panel: str, help: str, *names: str, default: bool = True, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=default, **more)


WORDS: dict[str, tuple[Any, Any, Any]] = {  # name -> type, default, option
    "dataset": (
        str,
        None,
        _option(
            _DATA,
            "digits (embedded: the default), PACS (that of --setting paper), VLCS, ... (`flatlab data list`), "
            "or folder:PATH with domain/class/image.",
        ),
    ),
    "datasets": (str, None, _option(_DATA, "Of a table: several data sets, as PACS,VLCS; --data-dir holds them all.")),
    "data_dir": (Path, None, _option(_DATA, "The folder that holds the data set; not for digits and folder:PATH.")),
    "held_out": (
        str,
        "all",
        _option(_DATA, "Domains held out, a run for each: names or indices, as sketch,photo, or all."),
    ),
    "image_size": (int, None, _option(_DATA, "Height and width of the images, in pixels (digits 16, else 224).")),
    "method": (str, "ERM", _option(_COMPOSITION, "erm, sam, swa, swad, sma, qt-dog, ... (`flatlab methods`).")),
    "objective": (str, None, _option(_COMPOSITION, f"erm or coral{_PARTS}")),
    "mixing": (str, None, _option(_COMPOSITION, f"none, mixstyle or mixstyle-across (domains){_PARTS}")),
    "step": (str, None, _option(_COMPOSITION, f"plain or sam{_PARTS}")),
    "average": (str, None, _option(_COMPOSITION, f"last, swa, swad or sma{_PARTS}")),
    "quantizer": (str, None, _option(_COMPOSITION, f"none, lsq, inq, obc or rtn{_PARTS}")),
    "combine": (str, None, _option(_COMPOSITION, "What an ensemble averages: logits or probabilities (logits).")),
    "bits": (int, None, _option(_COMPOSITION, "Bits of a quantized weight, 2 to 16 (7).")),
    "granularity": (
        str,
        None,
        _option(
            _COMPOSITION,
            "How many weights share a step size, or the size of the noise: those of an output channel, or the whole "
            "tensor (channel).",
        ),
    ),
    "inq_grid": (
        str,
        None,
        _option(
            _COMPOSITION,
            "Levels of INQ: uniform, or power-of-two, as Zhou et al. have them, for which shifts replace products; "
            "at most 8 bits (uniform).",
        ),
    ),
    "unsigned": (
        bool,
        False,
        _option(_COMPOSITION, "LSQ of codes from 0 on: negative weights become 0.", "--unsigned", default=False),
    ),
    "log_scale": (
        bool,
        False,
        _option(
            _COMPOSITION,
            "LSQ learns the logarithm of a step size: it stays positive, and its updates are relative.",
            "--log-scale",
            default=False,
        ),
    ),
    "activations": (
        str,
        None,
        _option(
            _COMPOSITION,
            "LSQ of the layers' inputs too: none, unsigned (inputs that follow a ReLU) or signed (any). QT-DoG: none.",
        ),
    ),
    "activation_bits": (int, None, _option(_COMPOSITION, "Bits of a quantized input, 2 to 16 (8).")),
    "noise_amplitude": (
        float,
        None,
        _option(
            _COMPOSITION,
            "Weight noise is uniform on (-a, a) for this a, at each step; not given, it has the norm that rounding "
            "to --bits has.",
        ),
    ),
    "sam_rho": (float, None, _option(_COMPOSITION, "Radius of SAM's ascent, absolute L2 (0.05).")),
    "swad_every": (
        int,
        None,
        _option(_COMPOSITION, "Steps between two of SWAD's validations (smoke 2, quick 10, else 100)."),
    ),
    "quantize_at": (
        int,
        None,
        _option(_COMPOSITION, "Step at which quantization or freezing sets in (40 % of the steps)."),
    ),
    "swad_rule": (
        str,
        None,
        _option(_COMPOSITION, "Where SWAD's valley lies: paper (its Algorithm 1) or released (its code) (paper)."),
    ),
    "select": (
        str,
        None,
        _option(
            _OUTPUT,
            "settled: selects among the checkpoints from the switch on; all: says beside that what selecting among all "
            "would give, as QT-DoG's released code does, though that network may not be quantized (settled).",
        ),
    ),
    "model": (str, None, _option(_COMPOSITION, f"{', '.join(MODELS)} (digits: digits-cnn; photographs: resnet50).")),
    "weights": (
        str,
        None,
        _option(
            _COMPOSITION,
            "What training starts from: none, imagenet (torchvision downloads them), or a .safetensors or .pth file "
            "(digits: none; photographs: imagenet). From none, photographs take the setting's own --lr.",
        ),
    ),
    "freeze_batchnorm": (
        bool,
        None,
        _option(
            _COMPOSITION,
            "Keep BatchNorm's statistics (as the paper; with weights) or update them (without).",
            "--freeze-batchnorm/--train-batchnorm",
        ),
    ),
    "test_share": (
        float,
        None,
        _option(
            _DATA,
            "Share of each source domain that neither trains nor selects, for a test (0.2; paper 0: then "
            "they are of the images that select).",
        ),
    ),
    "setting": (str, "quick", _option(_SCHEDULE, "smoke (seconds), quick (minutes) or paper (its own, days).")),
    "steps": (int, None, _option(_SCHEDULE, "Updates of a training (smoke 10, quick 300, paper 5000).")),
    "eval_every": (int, None, _option(_SCHEDULE, "Steps between two evaluations (smoke 3, quick 30, paper 300).")),
    "batch_size": (int, None, _option(_SCHEDULE, "Images of each source domain in a batch (32; smoke 8).")),
    "lr": (
        float,
        None,
        _option(_SCHEDULE, "Learning rate of Adam (smoke 0.003, quick 0.001; paper, and from weights, 5e-05)."),
    ),
    "precision": (
        str,
        None,
        _option(_SCHEDULE, "fp32, or bf16 for the forward passes of training (fp32); measurements are fp32."),
    ),
    "seed": (
        int,
        None,
        _option(_SCHEDULE, "Seed of initialisation and batches; of several the first (0)."),
    ),
    "trial_seed": (int, None, _option(_SCHEDULE, "First seed of the split (0).")),
    "seeds": (
        int,
        None,
        _option(_SCHEDULE, "How many seeds; each moves both split and training (smoke 2, else 3; `train`: 1)."),
    ),
    "controls": (
        bool,
        False,
        _option(_COMPOSITION, "Add runs that part quantizing from freezing (fig4).", "--controls", default=False),
    ),
    "device": (str, "auto", _option(_PLACE, "auto (the best there is), cpu, cuda or mps.")),
    "workers": (int, None, _option(_PLACE, "Processes that share the jobs (one per core; one on an accelerator).")),
    "cache": (
        Path,
        None,
        _option(_PLACE, "Folder of decoded images (flatlab's, where the platform caches).", envvar="FLATLAB_CACHE"),
    ),
    "store": (Path, None, _option(_PLACE, "Folder of the runs (./runs).", envvar="FLATLAB_STORE")),
    "out": (
        Path,
        Path("figures"),
        _option(_OUTPUT, "Folder of the pictures; data other than digits have their own in it."),
    ),
    "no_target": (
        bool,
        False,
        _option(
            _SCHEDULE,
            "Neither evaluate nor log the held-out domain: for tuning, which must not look at it.",
            "--no-target",
            default=False,
        ),
    ),
    "keep_every": (
        int,
        None,
        _option(
            _OUTPUT,
            "Keep the weights each so many steps, for `flatlab replay` (none); the run is the same with and without.",
        ),
    ),
    "tensorboard": (Path, None, _option(_OUTPUT, "Write the training's curves as TensorBoard events here (none).")),
    "dry_run": (
        bool,
        False,
        _option(_OUTPUT, "Only say what would be done, and what it would cost.", "--dry-run", default=False),
    ),
    "json": (bool, False, _option(_OUTPUT, "Print the result as JSON.", "--json", default=False)),
    "debug": (bool, False, _option(_OUTPUT, "Show the traceback of an error.", "--debug", default=False)),
}
NAMED = ("held_out", "seed")  # narrow down which runs a method's name means
RUNNING = ("device", "workers", "cache", "store", "dry_run", "json", "debug")
PARTS = ("objective", "mixing", "step", "average", "quantizer", "combine")  # of a method
QUANTIZER = ("granularity", "inq_grid", "unsigned", "log_scale", "activations", "activation_bits", "noise_amplitude")
DATA = ("dataset", "data_dir", "held_out", "image_size")
TRAINING: tuple[str, ...] = (
    "test_share",
    "swad_rule",
    "swad_every",
    "sam_rho",
    "bits",
    "quantize_at",
    "model",
    "weights",
    "freeze_batchnorm",
)
TRAINING += ("setting", "steps", "eval_every", "batch_size", "lr", "precision", "seed", "trial_seed")
TRAINING += ("seeds",)
