"""The paper's methods as compositions: a method is a few fields of a run, not a class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

from flatlab.errors import choose
from flatlab.specs.quantizers import AnyQuantizer, BothSpec, INQSpec, LSQOptions, NoiseSpec, OBCSpec, QuantSpec, RTNSpec
from flatlab.specs.rises import ByRise
from flatlab.specs.run import FREEZING, AverageSpec, FreezeSpec, MixSpec, RunSpec, StepKind, StepSpec
from flatlab.specs.settings import PAPER, Setting, for_data

Labelled = tuple[str, RunSpec]  # a run with its method's name


@dataclass(frozen=True)
class Method:
    """The components of a method, which can be varied independently."""

    step: StepKind = "plain"
    average: Literal["last", "swa", "swad", "sma", "bma"] = "last"
    quantizer: Literal["none", "lsq", "lsq-both", "inq", "rtn", "obc"] = "none"
    frozen: bool = False  # convolutions stop training at the switch
    noise: Literal["none", "fresh", "kept"] = "none"  # uniform noise of the quantizer's norm, instead of quantizing
    objective: Literal["erm", "coral", "mms"] = "erm"
    mixing: Literal["none", "mixstyle", "mixstyle-across"] = "none"  # of images' feature statistics
    members: int = 0  # number of members of an ensemble, of consecutive seeds
    combine: Literal["logits", "probabilities"] = "logits"  # averaged by an ensemble
    note: str = ""

    @property
    def switched(self) -> bool:
        """Whether training changes at a switch step."""
        return self.quantizer in ("lsq", "lsq-both", "inq") or self.frozen or self.noise != "none"


METHODS = {
    "ERM": Method(note="empirical risk minimisation: the plain baseline"),
    "SAM": Method(step="sam", note="sharpness-aware minimisation, rho 0.05"),
    "SAGM": Method(step="sagm", note="sharpness-aware gradient matching (Wang et al. 2023), rho 0.05, alpha 0.001"),
    "SAQ": Method(
        step="saq", quantizer="lsq", note="SAM, from the switch on at the quantized weights (Liu et al. 2021), 7 bits"
    ),
    "SWA": Method(average="swa", note="mean of late iterates"),
    "SWAD": Method(average="swad", note="mean of the iterates inside the validation valley"),
    "SMA": Method(average="sma", note="running mean from early on, selected by validation"),
    "QT-DoG": Method(quantizer="lsq", note="ERM, then learned step size quantization: 7 bit, each channel"),
    "INQ": Method(quantizer="inq", note="ERM, then incremental quantization: the largest weights first"),
    "OBC": Method(quantizer="obc", note="ERM's checkpoint, quantized after training, row by row, on source images"),
    "RTN": Method(quantizer="rtn", note="ERM's checkpoint, each weight rounded to the nearest level, as OBC's grid"),
    "freeze": Method(frozen=True, note="control: full precision, convolutions frozen at the switch"),
    "release-parity": Method(
        quantizer="lsq", frozen=True, note="control: what QT-DoG's released code (e9d55eb) trains, only norms and head"
    ),
    "noise": Method(noise="fresh", note="control: uniform noise of the quantizer's norm in each step's gradient"),
    "noise-kept": Method(noise="kept", note="control: noise added at each step and not removed; the sum has that norm"),
    "CORAL": Method(objective="coral", note="correlation alignment of the domains' feature means and covariances"),
    "CORAL+QT-DoG": Method(objective="coral", quantizer="lsq", note="CORAL, quantized as QT-DoG"),
    "MixStyle": Method(mixing="mixstyle", note="feature statistics mixed between images, in training"),
    "MixStyle+QT-DoG": Method(mixing="mixstyle", quantizer="lsq", note="MixStyle, quantized as QT-DoG"),
    "CLIPood": Method(
        objective="mms", average="bma", note="margin metric softmax, Beta moving average (Shu et al. 2023), margin 0.3"
    ),
    "CLIPood+QT-DoG": Method(objective="mms", average="bma", quantizer="lsq", note="CLIPood, quantized as QT-DoG"),
    "LSQ": Method(quantizer="lsq-both", note="ERM, weights and layers' inputs quantized from the first step, 4/4 bits"),
    "LSQ+SAM": Method(step="sam", quantizer="lsq-both", note="SAM, quantized as LSQ"),
    "LSQ+SAGM": Method(step="sagm", quantizer="lsq-both", note="SAGM, quantized as LSQ"),
    "LSQ+SAQ": Method(step="saq", quantizer="lsq-both", note="SAM at the quantized weights (SAQ), quantized as LSQ"),
    "GAQAT": Method(
        step="gaqat",
        quantizer="lsq-both",
        note="GAQAT (our reading of arXiv 2412.05551): LSQ+SAGM, step sizes of low disorder get no task gradient",
    ),
    "FQAT": Method(
        step="fqat",
        quantizer="lsq-both",
        note="FQAT (our reading of arXiv 2509.00859): LSQ+SAGM, layers of high disorder get no task gradient",
    ),
    "ERM-ensemble": Method(members=6, note="ERM networks of several seeds, logits averaged"),
    "EoA": Method(average="sma", members=6, note="ensemble of averages: SMA networks"),
    "EoQ": Method(quantizer="lsq", members=5, note="ensemble of quantized networks: QT-DoG's (Eq. 6)"),
}


RELEASED = (
    "release-parity trains what QT-DoG's released code does (saqibjaved1/QT-DoG on GitHub, commit e9d55eb): after "
    "the switch neither convolutions nor step sizes, since its optimizer holds neither. Whether the paper's "
    "numbers come from that code is not known. Not modelled: with torch before 2.0 Adam's momentum goes on moving "
    "the convolutions for some hundred steps after the switch. Two more differences from the paper are options: it "
    "also selects among the checkpoints before the switch (--select all), and it averages by SWAD (--average swad "
    "--swad-rule released)."
)


def method(name: str) -> tuple[str, Method]:
    """Return the canonical name of a method and its composition.

    Args:
        name: a key of `METHODS`, ignoring case.

    Raises:
        UserError: if there is no such method; lists them and suggests the nearest.
    """
    proper = choose("method", name, METHODS)
    return proper, METHODS[proper]


def parts_of(spec: RunSpec) -> Method:
    """Return the composition of a run, without the members of an ensemble and its note."""
    mixed = "none" if spec.mixing is None else "mixstyle-across" if spec.mixing.across else "mixstyle"
    return Method(
        step=spec.step.kind,
        average=spec.average.kind,
        quantizer=spec.quantizer.kind if spec.quantizer else "none",
        frozen=spec.frozen,
        noise="none" if spec.noise is None else "kept" if spec.noise.persistent else "fresh",
        objective=spec.objective,
        mixing=mixed,  # type: ignore[arg-type]
        combine=spec.combine,
    )


def name_of(spec: RunSpec) -> str:
    """Return the name of a run's method ("QT-DoG"), or the label of a composition that is no method ("sam-swad")."""
    if spec.members or spec.source:
        return spec.label
    parts = parts_of(spec)
    own = (name for name, each in METHODS.items() if not each.members and replace(each, note="") == parts)
    return next(own, spec.label)


PARTS = ("objective", "mixing", "step", "average", "quantizer", "combine")  # that an option replaces
OWN = {"held_out", "seed", "trial_seed", "switch", "members"}  # fields of a run that `compose` determines
KNOWN: dict[str, tuple[str, ...]] = {part: get_args(get_type_hints(Method)[part]) for part in PARTS}


def vary(parts: Method, changes: Mapping[str, str]) -> Method:
    """Return a composition with some components replaced, each by a known name."""
    return replace(parts, **{part: choose(part, name, KNOWN[part]) for part, name in changes.items()})  # type: ignore[arg-type]


def compose(parts: Method, setting: Setting, *, held_out: str, seed: int, trial_seed: int) -> RunSpec:
    """Return the run of a composition in a setting; the members of an ensemble have consecutive seeds from these."""
    if parts.members:
        alone = replace(parts, members=0)
        members = [
            compose(alone, setting, held_out=held_out, seed=seed + i, trial_seed=trial_seed + i)
            for i in range(setting.members or parts.members)
        ]
        return members[0].replace(members=tuple(members), combine=parts.combine)
    setting = setting.in_steps(held_out)
    unused = {"momentum"} if setting.optimizer != "sgd" else set()
    unused |= {"margin"} if parts.objective != "mms" else set()
    return RunSpec.make(
        **setting.model_dump(include={*RunSpec.model_fields} - OWN - unused),
        held_out=held_out,
        seed=seed,
        trial_seed=trial_seed,
        objective=parts.objective,
        mixing=None if parts.mixing == "none" else MixSpec(across=parts.mixing == "mixstyle-across"),
        step=_step(parts.step, setting),
        average=_average(parts.average, setting),
        quantizer=_quantizer(parts.quantizer, setting),
        noise=_noise(parts.noise, setting),
        frozen=parts.frozen,
        switch=switch_of(parts, setting),
    )


def switch_of(parts: Method, setting: Setting) -> int | None:
    """Return the step at which training changes: that of the setting, by default 0 for `lsq-both`; None without one."""
    if not parts.switched:
        return None
    return 0 if parts.quantizer == "lsq-both" and setting.switch is None else setting.switch_step


def _step(kind: StepKind, setting: Setting) -> StepSpec:
    if kind == "plain":
        return StepSpec()
    own: dict[str, Any] = {"alpha": setting.sagm_alpha} if kind in ("sagm", *FREEZING) else {}
    if kind in FREEZING:
        own["freezing"] = FreezeSpec.make(**FREEZING[kind] | setting.freezing)
    return StepSpec.make(kind=kind, rho=setting.sam_rho, perturb=setting.perturb, **own)


def _quantizer(kind: str, setting: Setting) -> AnyQuantizer | None:
    grid = {"bits": setting.bits, "granularity": setting.granularity}
    match kind:
        case "lsq":
            own = {field: getattr(setting, field) for field in LSQOptions.model_fields}
            return QuantSpec.make(**grid, scale_lr=setting.scale_lr, **own)
        case "lsq-both":
            return BothSpec.make(
                bits=setting.qat_bits,
                activation_bits=setting.qat_bits,
                granularity=setting.granularity,
                scale_lr=setting.lr,
            )
        case "inq":
            return INQSpec.make(**grid, grid=setting.inq_grid, every=setting.inq_every)
        case "rtn":
            return RTNSpec.make(**grid)
        case "obc":
            return OBCSpec.make(**grid)
        case _:
            return None


def _noise(kind: str, setting: Setting) -> NoiseSpec | None:
    if kind == "none":
        return None
    size: dict[str, Any] = {"bits": setting.bits, "granularity": setting.granularity}
    if setting.noise_amplitude is not None:
        size = {"amplitude": setting.noise_amplitude}
    elif setting.noise_lr is not None:
        size = {"amplitude": setting.noise_lr * setting.lr}
    return NoiseSpec.make(**size, persistent=kind == "kept")


def _average(kind: Literal["last", "swa", "swad", "sma", "bma"], setting: Setting) -> AverageSpec:
    match kind:
        case "swa":
            start, every, refresh = setting.swa_start, setting.swa_every, setting.refresh_batches
            return AverageSpec(kind=kind, start=start, every=every, refresh_batches=refresh)
        case "swad":
            return AverageSpec(
                kind=kind,
                every=setting.swad_every,
                ratio=setting.swad_ratio,
                refresh_batches=setting.refresh_batches,
                rule=setting.swad_rule,
            )
        case "sma":
            return AverageSpec(kind=kind, start=setting.sma_start)
        case "bma":
            return AverageSpec(kind=kind, refresh_batches=setting.refresh_batches)
        case _:
            return AverageSpec()


def averages(setting: Setting) -> dict[str, AverageSpec]:
    """Return the weight averages of a setting by method: SWA, SWAD, SMA."""
    return {name: _average(METHODS[name].average, setting) for name in ("SWA", "SMA", "SWAD")}


def replicates(parts: Method, setting: Setting) -> list[RunSpec]:
    """Return a run for each held-out domain and seed; replicate i adds i to the seeds of the split and of training.

    An ensemble has one replicate for each domain, since its members use the seeds.
    """
    return [
        compose(parts, setting, held_out=target, seed=setting.seed + i, trial_seed=setting.trial_seed + i)
        for target in setting.held_out
        for i in range(1 if parts.members else setting.seeds)
    ]


def is_papers(parts: Method, ours: Setting, changes: Mapping[str, Any] | None = None) -> bool:
    """Return whether a composition equals the paper's: the specs agree, except for seeds and held-out domains.

    Args:
        parts: the composition.
        ours: the setting; its data set selects the paper's.
        changes: fields that are replaced in both settings for this row of a table.
    """
    at: dict[str, Any] = {"held_out": ours.held_out[0], "seed": 0, "trial_seed": 0}
    mine, theirs = (each.replace(**(changes or {})) for each in (ours, for_data(PAPER, ours.dataset)))
    return compose(parts, mine, **at) == compose(parts, theirs, **at)


def radii_by_rise(setting: Setting, rises: Sequence[float]) -> ByRise:
    """Return radii at which the loss of ERM (all runs in a setting) rises by these amounts (nats), for all methods."""
    references = sorted(run.digest for run in replicates(METHODS["ERM"], setting))
    return ByRise.make(rises=tuple(rises), references=tuple(references))
