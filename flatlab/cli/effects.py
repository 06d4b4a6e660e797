"""Options that would have no effect are refused, since they are probably mistakes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flatlab.cli.choices import Choices
from flatlab.cli.options import FREEZE, LSQ, OF_SETTING, Rule, flag
from flatlab.errors import UserError
from flatlab.specs.run import FREEZING, RunSpec

if TYPE_CHECKING:
    from flatlab.specs.methods import Method
    from flatlab.specs.settings import Setting

FIELDS = {**OF_SETTING, "held_out": "held_out", "unsigned": "signed", "no_target": "target_logged"}  # of the setting
EFFECTIVE = {*FIELDS, "model", "weights", "leave_out"}  # change what is planned
Needs = tuple[Callable[["Method"], bool], str, str]
_GRID: Needs = (lambda m: m.quantizer != "none" or m.noise != "none", "a quantizer", "add --quantizer lsq")
_LSQ: Needs = (lambda m: m.quantizer == "lsq", "LSQ", "add --quantizer lsq")
_SWAD: Needs = (lambda m: m.average == "swad", "SWAD", "add --average swad")
_FLOATS = (None, "none")  # values of --activations that leave them in floats
_DECIDED = ("threshold", "direction", "top", "trigger", "gradient", "when", "forever")
IDLE_BESIDE = [  # an option, another that takes its effect away, and why
    *((f"freeze_{name}", "freeze_alternate", "which makes no decisions") for name in _DECIDED),
    ("freeze_threshold", "freeze_top", "which replaces it"),
]
NEEDS: dict[str, Needs] = {  # option -> whether a composition uses it; what it needs; the remedy
    "bits": _GRID,
    "granularity": _GRID,
    "inq_grid": (lambda m: m.quantizer == "inq", "INQ", "add --quantizer inq"),
    **dict.fromkeys(LSQ, _LSQ),
    "noise_amplitude": (lambda m: m.noise != "none", "noise on the weights", "use --method noise"),
    "quantize_at": (lambda m: m.switched, "a quantizer that trains", "add --quantizer lsq"),
    "swad_rule": _SWAD,
    "swad_every": _SWAD,
    **dict.fromkeys(("sam_rho", "perturb"), (lambda m: m.step != "plain", "SAM", "add --step sam")),
    "sagm_alpha": (lambda m: m.step in ("sagm", *FREEZING), "SAGM", "add --step sagm"),
    "qat_bits": (lambda m: m.quantizer == "lsq-both", "the quantizer lsq-both", "add --quantizer lsq-both"),
    **dict.fromkeys(FREEZE, (lambda m: m.step in FREEZING, "GAQAT or FQAT", "use --method gaqat")),
    "margin": (lambda m: m.objective == "mms", "the margin metric softmax", "add --objective mms"),
    "select": (lambda m: m.switched, "a switch", "add --quantizer lsq"),
    "combine": (lambda m: m.members > 0, "an ensemble", "use --method eoq"),
}


def refuse_idle(chosen: Choices, parts: "Method") -> None:
    """Refuse options that the composition does not use, and name the option that would use them."""
    sized = chosen.noise_amplitude is not None and parts.quantizer == "none"
    if sized and (chosen.bits or chosen.granularity):
        raise UserError("--noise-amplitude sets the size of the noise; leave --bits and --granularity out.")
    if chosen.bits is not None and parts.quantizer == "lsq-both":
        raise UserError(f"--bits is of weights alone, lsq-both also quantizes inputs; write --qat-bits {chosen.bits}.")
    for word, (used, needed, remedy) in NEEDS.items():
        value = getattr(chosen, word)
        if value is not None and value is not False and not used(parts):
            if parts.quantizer == "lsq-both" and word in LSQ:
                own = f"write --qat-bits {value}" if word == "activation_bits" else "leave it out"
                raise UserError(f"{flag(word)} is of the quantizer lsq; lsq-both has its own way with inputs: {own}.")
            written = flag(word) + f" {value}" * (value is not True)
            raise UserError(f"{written} does nothing without {needed}; {remedy}, or leave it out.")
    for word, other, why in IDLE_BESIDE:
        if getattr(chosen, word) not in (None, False) and getattr(chosen, other) not in (None, False):
            raise UserError(f"{flag(word)} does nothing beside {flag(other)}, {why}; leave one of them out.")
    if chosen.freeze_gradient == "both" and chosen.freeze_rescale:
        raise UserError("--freeze-rescale does nothing beside --freeze-gradient both, which leaves no gradient.")
    if chosen.perturb == "all" and parts.step == "saq" and parts.quantizer == "lsq" and chosen.activations in _FLOATS:
        raise UserError(
            "--perturb all adds to SAQ the step sizes of inputs, of which there are none; add --activations unsigned "
            "(or signed), or leave it out."
        )
    if chosen.perturb == "all" and not parts.quantizer.startswith("lsq"):
        raise UserError("--perturb all adds step sizes, of which there are none without LSQ; leave it out.")
    if chosen.activation_bits is not None and chosen.activations in _FLOATS:
        raise UserError(
            f"--activation-bits {chosen.activation_bits} does nothing without quantized activations; add "
            "--activations unsigned (or signed), or leave it out."
        )


def refuse_too_long(chosen: Choices, wanted: Sequence[RunSpec]) -> None:
    """Refuse intervals longer than the training, in which nothing would be kept or frozen.

    Args:
        chosen: the chosen options.
        wanted: the runs.
    """
    shortest = min(spec.steps for spec in wanted)
    if chosen.keep_every and chosen.keep_every > shortest:
        raise UserError(f"--keep-every must be at most --steps, got {chosen.keep_every} > {shortest}.")
    for spec in wanted:
        windows, left = spec.step.freezing, spec.steps - (spec.switch or 0)
        if windows and windows.when == "window" and not windows.alternate and windows.every > left:
            since = " after the switch" if spec.switch else ""
            raise UserError(
                f"--freeze-every must be at most the {left} steps{since}, got {windows.every}: no step would "
                "follow the first window, so that nothing would be frozen."
            )


def refuse_without_effect(chosen: Choices, plan: "Callable[[Setting], Any]", what: str) -> None:
    """Refuse given options that change the setting, but at no value anything that is trained or measured.

    An option at its default value is accepted if another value would change the plan.

    Args:
        chosen: the chosen options.
        plan: from a setting to what is trained and measured.
        what: the name of what is planned, for the message.

    Raises:
        UserError: names the first of them.
    """
    setting, given = chosen.make_setting(), sorted(chosen.written & EFFECTIVE)
    planned = plan(setting) if given else None  # seconds for thousands of runs
    for name in given:
        others = [chosen.without(name).make_setting(), *_varied(setting, FIELDS.get(name, ""))]
        if others[0] != setting and all(_planned(plan, other) == planned for other in others):
            raise UserError(f"{flag(name)} does nothing for {what}; leave it out.")


def _varied(setting: "Setting", field: str) -> "list[Setting]":
    """Return the setting with other values of a field; none if the field has no other values in general."""
    value, info = getattr(setting, field, None), type(setting).model_fields.get(field)
    values: tuple[Any, ...] = Rule.of(info).choices if info else ()
    if field == "held_out":
        values = tuple((name,) for name in setting.domains)
    elif isinstance(value, bool):
        values = (not value,)
    elif isinstance(value, int):
        values = (value + 1 if value <= 2 else value - 1,)
    elif isinstance(value, float):
        values = (value / 2 or 0.5,)
    return [setting.replace(**{field: each}) for each in values]


def _planned(plan: "Callable[[Setting], Any]", setting: "Setting") -> Any:
    """Return the plan; None if it is invalid."""
    try:
        return plan(setting)
    except UserError:  # without the option the plan is invalid: it has an effect
        return None
