"""From what the efficiency benchmark kept to its tables."""

import json
from pathlib import Path
from typing import Any

import numpy as np

BOOTSTRAPS = 2000
REL_ERROR = 0.02


def summary(arena: Any) -> dict[str, Any]:
    """Return the numbers of one network on one set of images."""
    facts, radii = arena.keep("facts", dict), arena.radii
    plain, ours, crossed = (arena.kept(kind) for kind in ("plain", "ours", "crossed"))
    rises, images = np.array([each["rises"] for each in plain]), facts["images"]
    needed = directions_needed(rises)
    draw = np.random.default_rng(0)
    again = [directions_needed(rises[draw.integers(len(rises), size=len(rises))]) for _ in range(BOOTSTRAPS)]
    values, errors = (np.array([each[key] for each in ours]) for key in ("value", "stderr"))
    walked = np.array([each["walked"] for each in ours])
    shared = np.array([each["images"] for each in ours]) - walked.sum(axis=1)
    lacking = np.maximum(1.0, (errors / values / REL_ERROR) ** 2)  # where the default budget ended it sooner
    cost = walked * lacking + shared[:, None] / len(radii)  # the pilot, evenly
    ratios, spread = needed * images / cost.mean(axis=0), np.array(again) * images / cost.mean(axis=0)
    per_pass = float(np.median([each["seconds_per_pass"] for each in plain]))
    longer = (walked * lacking).sum(axis=1) / walked.sum(axis=1)
    seconds = float(np.median(np.array([each["seconds"] for each in ours]) * longer))
    wall = needed.sum() * per_pass / seconds
    return {
        **facts,
        "radii": radii.tolist(),
        "F": values.mean(axis=0).tolist(),
        "F_plain": rises.mean(axis=0).tolist(),
        "F_plain_stderr": (rises.std(axis=0, ddof=1) / np.sqrt(len(rises))).tolist(),
        "plain_directions": len(rises),
        "plain_needed": needed.tolist(),
        "plain_needed_90": np.quantile(again, [0.05, 0.95], axis=0).T.tolist(),
        "ours_passes": (cost.mean(axis=0) / images).tolist(),
        "ours_images": cost.mean(axis=0).tolist(),
        "pilot_images": float(shared.mean()),
        "plans": [each["plans"] for each in ours],
        "stopped": sorted({why for each in ours for why in each["stopped"]}),
        "ratio": ratios.tolist(),
        "ratio_90": np.quantile(spread, [0.05, 0.95], axis=0).T.tolist(),
        "geometric_mean": geometric(ratios),
        "geometric_mean_90": np.quantile([geometric(each) for each in spread], [0.05, 0.95]).tolist(),
        "repetitions": len(ours),
        "relative_stderr": (errors / values).mean(axis=0).tolist(),
        "spread_over_stderr": (values.std(axis=0, ddof=1) / np.sqrt((errors**2).mean(axis=0))).tolist(),
        "wall_ratio": float(wall),
        "seconds": {"ours": seconds, "plain_per_pass": per_pass},
        "crossed_over_bare": float(np.median([e["point"] / e["bare"] for e in crossed])) if crossed else None,
    }


def directions_needed(rises: np.ndarray) -> np.ndarray:
    """Return how many directions bring the standard error to 2 % of the mean, at each radius."""
    return np.asarray((rises.std(axis=0, ddof=1) / rises.mean(axis=0) / REL_ERROR) ** 2)


def geometric(ratios: np.ndarray) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def write(arenas: list[Any], facts: dict[str, Any], out: Path) -> str:
    """Write flatness.md and flatness.json; returns the text."""
    rows = [summary(arena) for arena in arenas]
    allocator = " ".join(f"{key}={value}" for key, value in facts["allocator"].items())
    text = "\n".join(
        [
            "# Flatness to 2 %: the plain procedure against ours\n",
            f"Both sides: {facts['threads']} thread(s), {allocator}, torch {facts['machine']['torch']}.",
            "Plain: passes needed = (spread / mean / 0.02)^2, from measured directions on all images, with a 90 %",
            "bootstrap interval. Ours: passes really spent, the pilot included and shared evenly by the radii; where",
            "the default budget ended a repetition short of 2 %, scaled to that accuracy.\n",
            *(part for row in rows for part in section(row)),
            *growth(rows),
        ]
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "flatness.md").write_text(text + "\n")
    (out / "flatness.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return text


def section(row: dict[str, Any]) -> list[str]:
    """Return the table of one network on one set of images."""
    lines = [
        f"## {row['words']}, N = {row['images']:,}\n",
        "| radius | F (ours) | F (plain) | plain, passes | ours, passes | ratio | ours: s.e. / F | spread / s.e. |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r, radius in enumerate(row["radii"]):
        low, high = row["plain_needed_90"][r]
        below, above = row["ratio_90"][r]
        cells = (
            f"{radius:.3g}",
            f"{row['F'][r]:.4g}",
            f"{row['F_plain'][r]:.4g} ± {row['F_plain_stderr'][r]:.2g}",
            f"{row['plain_needed'][r]:.0f} [{low:.0f}, {high:.0f}]",
            f"{row['ours_passes'][r]:.1f}",
            f"{row['ratio'][r]:.1f} [{below:.1f}, {above:.1f}]",
            f"{row['relative_stderr'][r]:.2%}",
            f"{row['spread_over_stderr'][r]:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    low, high = row["geometric_mean_90"]
    lines += [
        f"\nGeometric mean of the ratios {row['geometric_mean']:.1f} [{low:.1f}, {high:.1f}]; wall time, plain over"
        f" ours, {row['wall_ratio']:.1f} (plain: measured seconds of a pass at its best batch size of"
        f" {row['plain_batch_size']}, times the passes needed).",
        f"{row['repetitions']} repetitions of ours, {row['plain_directions']} plain directions."
        f" Slope of the loss at w {row['slope']:.2g}; the pilot forwards {row['pilot_images']:,.0f} images.",
    ]
    if row["crossed_over_bare"]:
        lines.append(f"A point of the crossed design costs {row['crossed_over_bare']:.3f} bare forward passes.")
    return [*lines, ""]


def growth(rows: list[dict[str, Any]]) -> list[str]:
    """Return how our cost grows with the number of images."""
    pairs = [(a, b) for a in rows for b in rows if a["words"] == b["words"] and a["images"] < b["images"]]
    lines = []
    for a, b in pairs:
        factors = np.array(b["ours_images"]) / np.array(a["ours_images"])
        total = sum(b["ours_images"]) / sum(a["ours_images"])
        lines.append(
            f"From N = {a['images']:,} to {b['images']:,} our cost grows by {total:.2f} in all"
            f" ({', '.join(f'{each:.2f}' for each in factors)} at the radii), plain's by"
            f" {b['images'] / a['images']:.1f} for each direction."
        )
    return lines
