"""Options that would have no effect are refused, since they are probably mistakes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatlab.cli.choices import Choices
from flatlab.cli.options import FREEZE, LSQ, OF_SETTING, flag
from flatlab.errors import UserError
from flatlab.specs.run import FREEZING

if TYPE_CHECKING:
    from flatlab.specs.methods import Method
    from flatlab.specs.settings import Setting

EFFECTIVE = {*OF_SETTING, "held_out", "model", "weights", "unsigned", "no_target"}  # change what is planned
Needs = tuple[Callable[["Method"], bool], str, str]
_GRID: Needs = (lambda m: m.quantizer != "none" or m.noise != "none", "a quantizer", "add --quantizer lsq")
_LSQ: Needs = (lambda m: m.quantizer == "lsq", "LSQ", "add --quantizer lsq")
_SWAD: Needs = (lambda m: m.average == "swad", "SWAD", "add --average swad")
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
    "select": (lambda m: m.switched, "a switch", "add --quantizer lsq"),
    "combine": (lambda m: m.members > 0, "an ensemble", "use --method eoq"),
}


def refuse_idle(chosen: Choices, parts: "Method") -> None:
    """Refuse options that the composition does not use, and name the option that would use them."""
    sized = chosen.noise_amplitude is not None and parts.quantizer == "none"
    if sized and (chosen.bits or chosen.granularity):
        raise UserError("--noise-amplitude sets the size of the noise; leave --bits and --granularity out.")
    if chosen.bits is not None and parts.quantizer == "lsq-both":
        raise UserError(f"--bits is of weights alone, lsq-both quantizes inputs, too; write --qat-bits {chosen.bits}.")
    for word, (used, needed, remedy) in NEEDS.items():
        value = getattr(chosen, word)
        if value is not None and value is not False and not used(parts):
            written = flag(word) + f" {value}" * (value is not True)
            raise UserError(f"{written} does nothing without {needed}; {remedy}, or leave it out.")
    if chosen.activation_bits is not None and chosen.activations in (None, "none"):
        raise UserError(
            f"--activation-bits {chosen.activation_bits} does nothing without quantized activations; add "
            "--activations unsigned (or signed), or leave it out."
        )


def refuse_without_effect(chosen: Choices, plan: "Callable[[Setting], Any]", what: str) -> None:
    """Refuse written options that change the setting, but nothing that is trained or measured.

    Args:
        chosen: what the user chose.
        plan: what is trained and measured in a setting.
        what: is planned, for the message.

    Raises:
        UserError: names the first of them.
    """
    setting = chosen.make_setting()
    planned = plan(setting)
    for name in sorted(chosen.written & EFFECTIVE):
        other = chosen.without(name).make_setting()
        if other != setting and _planned(plan, other) == planned:
            raise UserError(f"{flag(name)} does nothing for {what}; leave it out.")


def _planned(plan: "Callable[[Setting], Any]", setting: "Setting") -> Any:
    """Return the plan; None if it is invalid."""
    try:
        return plan(setting)
    except UserError:  # without the option the plan is invalid: it has an effect
        return None
