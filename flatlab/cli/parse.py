"""Arguments to values: runs by name or digest, and radii."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from math import floor
from typing import TYPE_CHECKING, Literal

from flatlab.data import catalog
from flatlab.errors import UserError, choose
from flatlab.specs.methods import METHODS, parts_of
from flatlab.specs.run import RunSpec

if TYPE_CHECKING:  # it loads numpy
    from flatlab.store.runs import Run, RunStore

SHOWN = 8  # candidates in a message
DIFFERENCES = 3  # fields in which they differ, shown with each
HEX = set("0123456789abcdef")
LARGEST_RADIUS = 1e9
MOST_RADII = 10_000  # more are a typing error


def named(
    store: "RunStore",
    words: Sequence[str],
    *,
    held_out: str = "all",
    seed: int | None = None,
    note: Callable[[str], object] = lambda _: None,
) -> "list[Run]":
    """Return the runs with these names, each once; for a method the finished ones, if any.

    Args:
        store: contains them.
        words: names of methods (QT-DoG) or compositions (sam-swad), or digests, or their beginnings.
        held_out: selects the runs of a method with these held-out domains.
        seed: selects the runs of a method with this seed; None: the smallest.
        note: called with a sentence where a name matches runs of several seeds, of which one is chosen.

    Raises:
        UserError: if a name matches no run, or several.
    """
    runs = [run for run in store.runs() if not run.lends]
    labels = {_plain(run.spec.label) for run in runs} | {_plain(name) for name in METHODS}
    digests = [word for word in words if _plain(word) not in labels]
    for word in digests:
        if not set(word) <= HEX:
            choose("run, method or composition", word, dict.fromkeys([*METHODS, *(run.spec.label for run in runs)]))
    if len(digests) == len(words) and (held_out.strip().lower() != "all" or seed is not None):
        raise UserError("--held-out and --seed select among the runs of a method; with digests, leave them out.")
    found = []
    for word in words:
        if word in digests:
            found.append(store.find(word))
            continue
        mine = [run for run in runs if means(word, run.spec)]
        mine = [run for run in mine if run.done] or mine
        mine = [run for run in mine if seed in (None, run.spec.seed) and _held_out(run.spec, held_out)]
        least = [run for run in mine if run.spec.seed == min(each.spec.seed for each in mine)]
        found.append(_only(least, word, store))
        if others := sorted({run.spec.seed for run in mine} - {found[-1].spec.seed}):
            note(_chosen(word, found[-1].spec, others))
    return list({run.path: run for run in found}.values())


def means(word: str, spec: RunSpec) -> bool:
    """Whether a word is the name of a run's method or composition."""
    parts = next((parts for name, parts in METHODS.items() if _plain(name) == _plain(word)), None)
    if parts is None:
        return _plain(word) == _plain(spec.label)
    if spec.source:
        return False
    return bool(parts.members) == bool(spec.members) and replace(parts, note="", members=0) == parts_of(spec)


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _held_out(spec: RunSpec, which: str) -> bool:
    """Whether a run has one of these held-out domains, given by name, or by index for data sets known by name."""
    known = catalog.facts(spec.dataset)
    order = list(known.held_out or known.domains) if known else []
    for word in [which.strip(), *(each.strip() for each in which.split(","))]:
        at = order[int(word)] if word.isdecimal() and int(word) < len(order) else word
        if word.lower() == "all" or _plain(at) == _plain(spec.held_out):
            return True
    return False


def _only(runs: "Sequence[Run]", word: str, store: "RunStore") -> "Run":
    if len(runs) == 1:
        return runs[0]
    if not runs:
        raise UserError(f"No run of {word} in {store.root} matches; `flatlab runs list` shows all runs.")
    apart = [each.spec.texts() for each in runs[:SHOWN]]
    names = [name for name in dict.fromkeys(chain(*apart)) if len({each.get(name) for each in apart}) > 1]
    told = [name for name in names if name not in ("seed", "held_out")][:DIFFERENCES]  # those two are shown anyway
    shown = [
        f"{run.spec.digest[:8]} ({', '.join([run.spec.target, f'seed {run.spec.seed}', *_told(own, told)])})"
        for run, own in zip(runs, apart, strict=False)
    ]
    more = f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
    raise UserError(
        f"{word} names {len(runs)} runs in {store.root}: {', '.join(shown)}{more}; select one "
        f"{'with --held-out or ' if 'held_out' in names else ''}by its digest."
    )


def _told(fields: dict[str, str], names: Sequence[str]) -> list[str]:
    return [f"{name} {fields[name]}" for name in names if name in fields]


def _chosen(word: str, spec: RunSpec, others: Sequence[int]) -> str:
    shown = ", ".join(map(str, others[:SHOWN])) + (" and more" if len(others) > SHOWN else "")
    return (
        f"{word} is run {spec.digest[:8]} ({spec.target}, seed {spec.seed}); there are others of that name"
        f" ({'seed' if len(others) == 1 else 'seeds'} {shown}): select with --seed."
    )


def parse_radii(text: str) -> tuple[float, ...] | Literal["auto"]:
    """Read `start:stop:step`, the end included, or a comma-separated list; sorted, each once.

    Args:
        text: "0:60:5" or "0,0.5,1".

    Raises:
        UserError: if it is neither, or a radius is negative or not finite.
    """
    if text.strip().lower() == "auto":
        return "auto"
    radii = _numbers(text)
    if not any(radii) or not all(0 <= radius <= LARGEST_RADIUS for radius in radii):
        raise UserError(
            f"--radii must be auto, start:stop:step such as 0:60:5, or numbers such as 0,0.5,1, all from 0 to "
            f"{LARGEST_RADIUS:g} and one above 0, got {text}."
        )
    return tuple(sorted(set(radii)))


def _numbers(text: str) -> list[float]:
    """Return the numbers; none if the text is neither a range nor a list."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        start, stop, step = (float(part) for part in text.split(":"))
        count = int(floor((stop - start) / step + 1e-9)) + 1 if step > 0 else 0
    except (ValueError, OverflowError):
        return []
    if count > MOST_RADII:
        raise UserError(f"--radii must name at most {MOST_RADII:,} radii, got {count:,} ({text}).")
    return [round(start + i * step, 12) for i in range(count)]
