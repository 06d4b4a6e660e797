"""The options that commands share, each defined once; bounds, choices, help and default are those of a spec's field."""

import operator
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from flatlab.errors import UserError, choose
from flatlab.specs.base import LARGEST_INT, Spec
from flatlab.specs.engine import Engine
from flatlab.specs.methods import KNOWN
from flatlab.specs.optimizing import Optimizing
from flatlab.specs.quantizers import LSQOptions
from flatlab.specs.run import FreezeSpec
from flatlab.specs.settings import PAPER, QUICK, SETTINGS, TEXT, Setting

_RUN = "the name of a method (QT-DoG) or composition (sam-swad), with --held-out and --seed, or the start of a digest"
Runs = Annotated[list[str], typer.Argument(help=f"Runs: each {_RUN} (`flatlab runs list`).")]
OneRun = Annotated[str, typer.Argument(help=f"Run: {_RUN} (`flatlab runs list`).")]

DATA, COMPOSITION, SCHEDULE, PLACE, OUTPUT = "Data", "Composition", "Schedule and seeds", "Place", "Output"
CLUSTER = "Slurm and Ray"
MODELS = {  # -> channels; None: any number; 0: sentences
    **dict.fromkeys(("digits-cnn", "digits-vit", "digits-resnext", "digits-densenet", "digits-clip")),
    **dict.fromkeys(("resnet18", "resnet50", "resnext50_32x4d", "densenet121", "mobilenet_v2", "vit_b_16"), 3),
    "sentences-transformer": 0,
    **dict.fromkeys(("cnn-10x2", "cnn-10x3", "cnn-16x2", "cnn-16x3")),  # cnn-WxD: W channels at first, D convolutions
    **dict.fromkeys(("cnn-16x4", "cnn-16x5", "cnn-32x4", "cnn-32x5", "cnn-64x4", "cnn-64x5")),
}
PREFIXED = {"hf": 0, "clip": 3, "timm": 3}  # hf:PATH, clip:PATH and timm:NAME, their channels as above
SIDES = {"digits-vit": 16, "digits-clip": 16, "vit_b_16": 224}  # of images, which their positions fix
DEVICES = ("auto", "cpu", "cuda")
FOLDERS = ("store", "out", "cache", "tensorboard", "data_dir", "model_dir")
BY_DATA = ("image_size", "model", "freeze_batchnorm")  # options whose default depends on the data


def channels(model: str) -> int | None:
    """Return the channels of the images that a network takes; None: any number; 0: it takes sentences."""
    kind, _, own = model.partition(":")
    return PREFIXED[kind] if own else MODELS[model]


def flag(name: str) -> str:
    """Return an option as written on the command line."""
    return f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"


SIGNS = {"ge": (">=", operator.ge), "gt": (">", operator.gt), "le": ("<=", operator.le), "lt": ("<", operator.lt)}
TECHNICAL = 1000  # larger bounds only catch typing errors, and are not shown


@dataclass(frozen=True)
class Rule:
    """The valid values of an option: one of a few names, a number within bounds, or text that validators accept."""

    choices: tuple[str, ...] = ()
    bounds: tuple[tuple[str, float], ...] = ()  # "ge", "gt", "le" or "lt", and the limit
    readers: tuple[Callable[..., Any], ...] = ()  # of text; a ValueError states what it must be

    @classmethod
    def of(cls, info: FieldInfo) -> "Rule":
        """Return the rule of a spec's field."""
        kinds = (info.annotation, *get_args(info.annotation))  # such as Literal["a", "b"] | None
        choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
        return cls(
            choices,
            tuple((word, getattr(each, word)) for each in info.metadata for word in SIGNS if hasattr(each, word)),
            tuple(each.func for each in info.metadata if isinstance(each, AfterValidator)),
        )

    def checked(self, name: str, value: Any) -> Any:
        """Return a value, a name in its canonical spelling.

        Args:
            name: of the option.
            value: as given; None if it is not.

        Raises:
            UserError: if it breaks the rule.
        """
        if value is not None and self.choices:
            return choose(name.replace("_", "-"), value, self.choices)
        for word, limit in self.bounds if value is not None else ():
            sign, holds = SIGNS[word]
            if not holds(value, limit):
                kind = "an integer" if isinstance(value, int) else "a number"
                raise UserError(f"{flag(name)} must be {kind} {sign} {limit}, got {value}.")
        for read in self.readers if isinstance(value, str) else ():
            try:
                value = read(value)
            except ValueError as error:
                raise UserError(f"{flag(name)} {error}, got {value}.") from None
        return value

    def help(self, text: str) -> str:
        """Return a help text with the bounds, or with the names unless it contains them."""
        limits = tuple(f"{SIGNS[word][0]} {limit:g}" for word, limit in self.bounds if limit < TECHNICAL)
        shown = () if self.choices and all(each in text for each in self.choices) else self.choices or limits
        return f"{text} [{', '.join(shown)}]" if shown else text


def _option(panel: str, text: str, *names: str, default: Any = None, rule: Rule | None = None, **more: Any) -> Any:
    """Return the field of an option that is not a field of a spec."""
    rule = rule or Rule()
    info = typer.Option(*names, help=rule.help(text), rich_help_panel=panel, **more)
    return field(default=default, metadata={"option": info, "rule": rule})


def _switch(panel: str, text: str, name: str) -> Any:
    return _option(panel, text, name, default=False, show_default=False)


def _part(part: str, what: str) -> Any:
    return _option(COMPOSITION, f"{what}, instead of the method's own.", rule=Rule(KNOWN[part]))


def _of_setting(panel: str, name: str, *names: str, default: Any = None) -> Any:
    """Return the field of an option that is a field of `Setting`, whose value it has if not given."""
    info, rule = Setting.model_fields[name], Rule.of(Setting.model_fields[name])
    text = f"{rule.help(info.description or '')}{'' if default is False else _usual(name)}"
    option = typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)
    return field(default=default, metadata={"option": option, "rule": rule, "setting": name})


def _of_engine(name: str, *, used_by: str, default: Any = None) -> Any:
    """Return the field of an option that is a field of `Engine`, whose value it has if not given."""
    info = Engine.model_fields[name]
    usual = f" (default: {info.default})" if info.default else ""
    text = f"{info.description}{usual} Only with --executor {used_by}."
    return _option(CLUSTER, text, default=default, rule=Rule.of(info), show_default=False)


def _usual(name: str) -> str:
    """Return the default of a setting's field, as text for a help page."""
    if name in BY_DATA:
        kinds = {"digits": QUICK, "photographs": PAPER, "sentences": TEXT}
        return f" (default: {', '.join(f'{_word(getattr(each, name))} for {kind}' for kind, each in kinds.items())})"
    values = {size: getattr(setting, name) for size, setting in SETTINGS.items()}
    if len(set(values.values())) > 1:
        return f" (default: {', '.join(f'{size} {value}' for size, value in values.items())})"
    (value,) = set(values.values())
    return "" if value is None else f" (default: {value})"


def _word(value: object) -> str:
    return {True: "frozen", False: "updated"}[value] if isinstance(value, bool) else str(value)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every shared option; it has the same meaning in each command that has it."""

    dataset: str | None = _option(
        DATA,
        "Data set: digits (embedded; the default), PACS (the default of --setting paper), VLCS, ... (`flatlab data "
        "list`), folder:PATH with images in DOMAIN/CLASS, or folder-text:PATH with sentences in DOMAIN.tsv.",
    )
    datasets: str | None = _option(
        DATA, "Several data sets of a table, such as PACS,VLCS; --data-dir must contain all of them."
    )
    data_dir: Path | None = _option(DATA, "Folder that contains the data set; not for digits and folder:PATH.")
    model_dir: Path | None = _option(
        DATA,
        "Folder of the network of runs that were trained with --model hf:PATH or clip:PATH, if it was moved.",
    )
    held_out: str = _option(
        DATA, "Held-out domains, one run for each: names or indices, such as sketch,photo, or all.", default="all"
    )
    corruption: str | None = _of_setting(DATA, "corruption")
    image_size: int | None = _of_setting(DATA, "image_size")
    test_share: float | None = _of_setting(DATA, "test_share")

    method: str = _option(
        COMPOSITION, "Method: erm, sam, swa, swad, sma, qt-dog, ... (`flatlab methods`).", default="ERM"
    )
    objective: str | None = _part("objective", "Objective")
    mixing: str | None = _part("mixing", "Mixing of feature statistics between images")
    step: str | None = _part("step", "Update rule")
    average: str | None = _part("average", "Average of the iterates")
    quantizer: str | None = _part("quantizer", "Quantizer of the weights")
    combine: str | None = _part("combine", "What an ensemble averages")
    bits: int | None = _of_setting(COMPOSITION, "bits")
    qat_bits: int | None = _of_setting(COMPOSITION, "qat_bits")
    granularity: str | None = _of_setting(COMPOSITION, "granularity")
    inq_grid: str | None = _of_setting(COMPOSITION, "inq_grid")
    unsigned: bool = _switch(
        COMPOSITION, "Quantize weights with LSQ to codes >= 0; negative weights become 0.", "--unsigned"
    )
    log_scale: bool = _of_setting(COMPOSITION, "log_scale", "--log-scale", default=False)
    activations: str | None = _of_setting(COMPOSITION, "activations")
    activation_bits: int | None = _of_setting(COMPOSITION, "activation_bits")
    embeddings: bool = _of_setting(COMPOSITION, "embeddings", "--embeddings", default=False)
    skip_first: bool = _of_setting(COMPOSITION, "skip_first", "--skip-first", default=False)
    head: bool = _of_setting(COMPOSITION, "head", "--head", default=False)
    noise_amplitude: float | None = _of_setting(COMPOSITION, "noise_amplitude")
    quantize_at: int | None = _of_setting(COMPOSITION, "switch")
    sam_rho: float | None = _of_setting(COMPOSITION, "sam_rho")
    sagm_alpha: float | None = _of_setting(COMPOSITION, "sagm_alpha")
    perturb: str | None = _of_setting(COMPOSITION, "perturb")
    freeze_every: int | None = _of_setting(COMPOSITION, "freeze_every")
    freeze_threshold: float | None = _of_setting(COMPOSITION, "freeze_threshold")
    freeze_direction: str | None = _of_setting(COMPOSITION, "freeze_direction")
    freeze_top: float | None = _of_setting(COMPOSITION, "freeze_top")
    freeze_trigger: str | None = _of_setting(COMPOSITION, "freeze_trigger")
    freeze_gradient: str | None = _of_setting(COMPOSITION, "freeze_gradient")
    freeze_unit: str | None = _of_setting(COMPOSITION, "freeze_unit")
    freeze_when: str | None = _of_setting(COMPOSITION, "freeze_when")
    freeze_what: str | None = _of_setting(COMPOSITION, "freeze_what")
    freeze_forever: bool = _of_setting(COMPOSITION, "freeze_forever", "--freeze-forever", default=False)
    freeze_alternate: bool = _of_setting(COMPOSITION, "freeze_alternate", "--freeze-alternate", default=False)
    freeze_rescale: bool = _of_setting(COMPOSITION, "freeze_rescale", "--freeze-rescale", default=False)
    swad_rule: str | None = _of_setting(COMPOSITION, "swad_rule")
    swad_every: int | None = _of_setting(COMPOSITION, "swad_every")
    model: str | None = _option(
        COMPOSITION,
        f"Network. [{', '.join(MODELS)}, timm:NAME, hf:PATH, clip:PATH; PATH is a folder in which "
        f"transformers saved a sequence classifier, its encoder, or CLIP]{_usual('model')}",
    )
    weights: str | None = _option(
        COMPOSITION,
        "Initial weights: none, imagenet (downloaded by torchvision), a .safetensors or .pth file, or a folder of "
        "transformers (default: none for digits and sentences, imagenet for photographs, PATH for hf:PATH and "
        "clip:PATH). With none, photographs are trained with the setting's own --lr.",
    )
    freeze_batchnorm: bool | None = _of_setting(COMPOSITION, "freeze_batchnorm", "--freeze-batchnorm/--train-batchnorm")
    margin: float | None = _of_setting(COMPOSITION, "margin")
    controls: bool = _of_setting(COMPOSITION, "controls", "--controls", default=False)
    leave_out: str | None = _option(
        COMPOSITION, "Methods of the study to leave out, such as noise,SAM; its page names them."
    )
    rows: Path | None = _option(
        COMPOSITION, "Rows of single runs (runs.csv) of an earlier store, of methods that --leave-out names."
    )

    setting: str = _option(
        SCHEDULE,
        "Size of the experiment: smoke (seconds), quick (minutes) or paper (the paper's, days).",
        default="quick",
    )
    steps: int | None = _of_setting(SCHEDULE, "steps")
    eval_every: int | None = _of_setting(SCHEDULE, "eval_every")
    batch_size: int | None = _of_setting(SCHEDULE, "batch_size")
    lr: float | None = _of_setting(SCHEDULE, "lr")
    epochs: int | None = _of_setting(SCHEDULE, "epochs")
    optimizer: str | None = _of_setting(SCHEDULE, "optimizer")
    momentum: float | None = _of_setting(SCHEDULE, "momentum")
    weight_decay: float | None = _of_setting(SCHEDULE, "weight_decay")
    decayed: str | None = _of_setting(SCHEDULE, "decayed")
    schedule: str | None = _of_setting(SCHEDULE, "schedule")
    warmup: int | None = _of_setting(SCHEDULE, "warmup")
    clip_norm: float | None = _of_setting(SCHEDULE, "clip_norm")
    class_percentile: float | None = _of_setting(SCHEDULE, "class_percentile")
    precision: str | None = _of_setting(SCHEDULE, "precision")
    seed: int | None = _of_setting(SCHEDULE, "seed")
    trial_seed: int | None = _of_setting(SCHEDULE, "trial_seed")
    seeds: int | None = _of_setting(SCHEDULE, "seeds")
    no_target: bool = _switch(
        SCHEDULE, "Neither evaluate nor log the held-out domain, as tuning requires.", "--no-target"
    )

    device: str = _option(PLACE, "Device: auto (the fastest available), cpu, cuda or cuda:N.", default="auto")
    workers: int | None = _option(
        PLACE,
        "Number of worker processes (default: one per core; one on an accelerator).",
        rule=Rule.of(Engine.model_fields["workers"]),
    )
    executor: str = _option(
        CLUSTER,
        Engine.model_fields["executor"].description or "",
        default="local",
        rule=Rule.of(Engine.model_fields["executor"]),
    )
    max_workers: int | None = _option(
        CLUSTER,
        "Number of workers on the cluster (default: one per job, at most 16). Only with --executor slurm or ray.",
        rule=Rule.of(Engine.model_fields["workers"]),
    )
    gpus: int | None = _of_engine("gpus", used_by="slurm or ray")
    cpus: int | None = _of_engine("cpus", used_by="slurm or ray")
    memory: int | None = _of_engine("memory", used_by="slurm or ray")
    time: int | None = _of_engine("time", used_by="slurm")
    partition: str | None = _of_engine("partition", used_by="slurm")
    slurm_arg: list[str] | None = _of_engine("slurm_arg", used_by="slurm")
    ray_address: str | None = _of_engine("ray_address", used_by="ray")

    cache: Path | None = _option(
        PLACE, "Folder of decoded images (default: flatlab's in the platform's cache folder).", envvar="FLATLAB_CACHE"
    )
    store: Path | None = _option(PLACE, "Folder of the runs (default: ./runs).", envvar="FLATLAB_STORE")

    out: Path = _option(
        OUTPUT, "Folder of tables and pictures; data other than digits have a folder in it.", default=Path("figures")
    )
    select: str | None = _option(
        OUTPUT,
        "Checkpoints that are compared: settled (from the switch on; the default), or all, which also reports "
        "selection among all checkpoints, as in QT-DoG's released code, where the network may not be quantized yet.",
        rule=Rule(("settled", "all")),
    )
    keep_every: int | None = _option(
        OUTPUT,
        "Keep the weights every N steps for `flatlab replay`; the run itself does not change.",
        rule=Rule(bounds=(("ge", 1), ("le", LARGEST_INT))),
    )
    tensorboard: Path | None = _option(OUTPUT, "Folder to write the training curves to as TensorBoard events.")
    dry_run: bool = _switch(OUTPUT, "Print the planned work and its cost, and do nothing.", "--dry-run")
    json: bool = _switch(OUTPUT, "Print the result as JSON.", "--json")
    debug: bool = _switch(OUTPUT, "Show the traceback of an error.", "--debug")


WORDS = {each.name: each for each in fields(Options)}
TYPES = get_type_hints(Options)
OF_SETTING = {name: each.metadata["setting"] for name, each in WORDS.items() if "setting" in each.metadata}

NAMED = ("held_out", "seed")  # select among the runs of a method, in commands that take runs
SELECTING = {
    "held_out": "Select the runs of a method by their held-out domains: names or indices (sketch,photo), or all.",
    "seed": "Select the runs of a method by their seed (default: the smallest).",
}
WHERE = ("data_dir", "model_dir")  # where what a run was trained from lies now
CLUSTERS = {  # the options that only some executors take
    **dict.fromkeys(("max_workers", "gpus", "cpus", "memory"), ("slurm", "ray")),
    **dict.fromkeys(("time", "partition", "slurm_arg"), ("slurm",)),
    "ray_address": ("ray",),
}
RUNNING = ("device", "workers", "executor", *CLUSTERS, "cache", "store", "dry_run", "json", "debug")
LSQ = tuple("unsigned" if name == "signed" else name for name in LSQOptions.model_fields)
QUANTIZER = ("granularity", "inq_grid", "noise_amplitude", *LSQ)
FREEZE = tuple(f"freeze_{name}" for name in FreezeSpec.model_fields)
STEP = ("sagm_alpha", "perturb", "qat_bits", *FREEZE)
DATASET = ("dataset", "data_dir", "held_out", "corruption", "image_size")
TRAINING: tuple[str, ...] = (
    "test_share",
    "swad_rule",
    "swad_every",
    "sam_rho",
    "bits",
    "quantize_at",
    "model",
    "margin",
)
TRAINING += ("weights", "freeze_batchnorm", "epochs", *Optimizing.model_fields)
TRAINING += ("setting", "steps", "eval_every", "batch_size", "lr", "precision", "seed", "trial_seed", "seeds")


def asked(spec: type[Spec], *same: str, **renamed: str) -> dict[str, tuple[str, FieldInfo]]:
    """Return options of a measurement: by their names, each with the spec's field that it sets.

    Args:
        spec: the class of the spec.
        same: fields whose options have the same name.
        renamed: other options, with their fields.
    """
    return {
        name: (each, spec.model_fields[each])
        for name, each in {**dict(zip(same, same, strict=True)), **renamed}.items()
    }


@dataclass(frozen=True)
class Option:
    """A parameter of a command: its annotation for typer, its default and its rule."""

    annotation: Any
    default: Any
    rule: Rule


def field_option(name: str, info: FieldInfo) -> Option:
    """Return the option that sets a field of a spec."""
    rule = Rule.of(info)
    names = (flag(name),) if len(name) == 1 else ()
    option = typer.Option(*names, help=rule.help(info.description or ""))
    return Option(Annotated[str if rule.choices else info.annotation, option], info.default, rule)


def shared_option(word: str, *, selecting: bool = False) -> Option:
    """Return a shared option.

    Args:
        word: its name in `Options`.
        selecting: whether the command takes runs, among which `NAMED` select.
    """
    info, rule = WORDS[word].metadata["option"], WORDS[word].metadata["rule"]
    if selecting and word in SELECTING:
        info = copy(info)
        info.help = rule.help(SELECTING[word])
    return Option(Annotated[TYPES[word], info], WORDS[word].default, rule)
