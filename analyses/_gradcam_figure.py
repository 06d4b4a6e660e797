"""Pictures of GradCAM in the paper's layout, and measures of the maps.

One class serves Figures 6, 7 and 9 to 12: they differ in targets, images and layout.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from flatlab import files, plots
from flatlab.analysis import Analysis, by_method, crossed
from flatlab.arguments import FloatArray
from flatlab.report import tables, verdicts
from flatlab.results.gradcam import MeasuredMaps, agreement, heat, pixels
from flatlab.specs.measurements import GradCAMSpec
from flatlab.specs.methods import Labelled, radii_by_rise
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE, OTHER = "ERM", "QT-DoG"
METHODS_SHOWN = (BASELINE, OTHER)
SUMMARY = (
    "QT-DoG less ERM, paired by held-out domain and seed, 95 % intervals over seeds, each alone; * p < 0.05 after Holm "
    "over the numbers"
)
NUMBERS = {
    "deletion": "Deletion area\n(low: informative)",
    "insertion": "Insertion area\n(high: informative)",
    "energy": "Energy inside the ink\n(dotted: the ink's area)",
    "empty": "Empty maps: no\nevidence for the class",
    "moved": "Agreement with itself\nat moved weights",
    "vanished": "Maps that vanish\nat moved weights",
    "agreement": "Agreement of the\ntwo networks",
}
COLUMNS = ["quantity", "method", "held_out", "seed", "share", "image", "label", "predicted", "run"]
CORRELATIONS = ("moved", "agreement")
PER_IMAGE = ("energy", "area", "empty", "moved", "vanished")  # columns of `MeasuredMaps.to_frame`
COLUMNS += ["value", "stderr", "low", "high", "over"]
IMAGES = 24  # of each target: the numbers are over all of them, the pictures show the first
DIRECTIONS = 5
RISES = (0.005, 0.02)  # nats on the source domains, which define the radii; further out most maps are empty
# This network's head reads the last grid cell by cell, for which averaging gradients over cells leaves 7 maps of 10
# empty (measured on ERM and QT-DoG); one stage earlier none is.
LAYERS = {"digits-cnn": "features.6"}


@dataclass(frozen=True)
class CamFigure:
    """A figure of GradCAM.

    Attributes:
        number: of the paper's figure.
        layout: "pairs" has a row for each target and columns ERM, QT-DoG; "triples" one target, the original first.
        targets: the paper's held-out domains, and the indices of those that replace them on other data.
        first: the first image shown; figures of the same layout continue each other.
        shown: images of each target.
    """

    number: str
    layout: Literal["pairs", "triples"]
    targets: dict[str, int]
    first: int = 0
    shown: int = 3

    def held_out(self, setting: Setting) -> tuple[str, ...]:
        """Return the held-out domains: the paper's if the data have them, else those that replace them."""
        known = [name for name in self.targets if name in setting.held_out]
        others = [setting.held_out[i % len(setting.held_out)] for i in self.targets.values()]
        return tuple(dict.fromkeys(known or others))

    def measurement(self, setting: Setting) -> GradCAMSpec:
        """Return the measurement: all figures share it."""
        chosen = setting.replace(held_out=self.held_out(setting))
        radii = setting.radii[1:5:3] if setting.radii else radii_by_rise(chosen, RISES)
        images = max(IMAGES if setting.images is None else min(IMAGES, setting.images), self.first + self.shown)
        return GradCAMSpec(images=images, layer=LAYERS.get(setting.model), radii=radii, num_samples=DIRECTIONS)

    def labelled(self, setting: Setting) -> list[Labelled]:
        """Return each run with its method's name."""
        return by_method(METHODS_SHOWN)(setting.replace(held_out=self.held_out(setting)))

    def table(self, store: RunStore, setting: Setting) -> pd.DataFrame:
        """Return numbers of each run over images and of each method over seeds, and the pictures by run and index."""
        measurement = self.measurement(setting)
        found = {}
        for label, spec in self.labelled(setting):
            found[label, spec.held_out, spec.seed] = spec.digest, store.run(spec).result(measurement, label)
        each = pd.DataFrame(list(_numbers(found)))
        single, along = each[each["share"].isna()], each[each["share"].notna()]
        whole = [
            tables.over_seeds_within(single, ["quantity", "method"], correlations=CORRELATIONS),
            tables.over_seeds_within(along, ["quantity", "method", "share"]),
        ]
        shown = pd.DataFrame(list(_pictures(found, range(self.first, self.first + self.shown), setting.seed)))
        return pd.concat([each, *whole, shown], ignore_index=True).reindex(columns=COLUMNS)

    def arrays(self, frame: pd.DataFrame, store: RunStore, setting: Setting) -> files.Arrays:
        """Return the images (C, H, W) and maps (H, W) that are shown, by run and index."""
        shown = frame[frame["quantity"] == "picture"]
        held: files.Arrays = {}
        for label, spec in self.labelled(setting):
            found = store.run(spec).result(self.measurement(setting), label)
            for index in shown["image"][shown["run"] == spec.digest].astype(int):
                held[f"{spec.digest}-image-{index}"] = found.images[index]
                held[f"{spec.digest}-map-{index}"] = found.maps[index]
        return held

    def caption(self, setting: Setting) -> str:
        """Return title and notes: data, images, networks."""
        measurement = self.measurement(setting)
        moved = " and ".join(f"{each:g}" for each in (setting.radii[1:5:3] if setting.radii else RISES))
        moved = f"by γ = {moved}" if setting.radii else f"to where ERM's loss rises by {moved} nats on source domains,"
        return (
            f"GradCAM (Figure {self.number}): {setting.words}\n"
            f"Evidence for the true class in images {self.first + 1} to {self.first + self.shown} of each held-out "
            f"domain's in split, seed {measurement.seed}, by classes; networks of seed {setting.seed}. Each "
            "map on its own scale, and below both networks' on one. Numbers: "
            f"{measurement.images} images; bands and bars: {setting.interval}; weights moved {moved} along "
            f"{measurement.num_samples} directions. Layer: {measurement.layer or 'the last with a grid'}."
        )

    def draw(self, frame: pd.DataFrame, caption: str, arrays: files.Arrays) -> "Figure":
        """Draw the pictures, each map on its own scale and on one, and the numbers below."""
        import matplotlib.pyplot as plt

        shown = frame[frame["quantity"] == "picture"]
        pairs = self.layout == "pairs"
        blocks = {"Each map on its own scale": False, "One scale for both networks": True}
        targets = list(dict.fromkeys(shown["held_out"]))
        rows = len(targets) if pairs else -(-self.shown // 3)
        height = 2 * (rows * 0.8 + 0.35)
        with plots.style():
            figure = plt.figure(figsize=(7.0, height + 3.4), layout="constrained")
            above, below = list(figure.subfigures(2, 1, height_ratios=[height, 2.6]))  # type: ignore[arg-type]
            for part, (title, common) in zip(list(above.subfigures(2, 1)), blocks.items(), strict=True):
                part.suptitle(title, fontsize=8)
                (_pairs if pairs else _triples)(part, shown, arrays, common=common)
            _charts(below, frame[frame["over"] == "seeds"])
            plots.captioned(figure, None, caption, fontsize=6)
        return figure

    def figure(self, module: str, doc: str) -> Analysis:
        """Return the declaration of the figure."""
        return Analysis(
            module,
            doc,
            BASELINE,
            labelled=self.labelled,
            measured=lambda setting: crossed(self.labelled(setting), [self.measurement(setting)]),
            table=self.table,
            arrays=self.arrays,
            findings=findings,
            summary=summary,
            summary_title=SUMMARY,
            remarks=remarks,
            caption=self.caption,
            draw=self.draw,
        )


def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return QT-DoG's numbers less ERM's, paired by held-out domain and seed; one family of tests."""
    each = frame[(frame["over"] == "images") & frame["share"].isna() & ~frame["quantity"].isin(["agreement", "area"])]
    found = tables.paired(each, BASELINE, ["quantity"])
    return verdicts.corrected(found, pd.Series("Numbers of the maps", found.index))


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return the findings in one line."""
    cells = findings.assign(cell=verdicts.cells(findings))
    return cells.pivot_table(
        index="method", columns="quantity", values="cell", aggfunc="first", sort=False
    ).reset_index()


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the agreement of the two networks' maps, and on the tests of their numbers."""
    found = findings(frame)
    whole = frame[(frame["over"] == "seeds") & (frame["quantity"] == "agreement")]["value"].item()
    empty = frame[(frame["over"] == "seeds") & (frame["quantity"] == "empty")].set_index("method")["value"]
    shares = " and ".join(f"{share:.0%} of {method}'s" for method, share in empty.items())
    return [
        f"The two networks' maps correlate by {whole:.2f}, image by image.",
        *verdicts.sentences(found.assign(at=found["quantity"]), place="in"),
        verdicts.statement(found),
        f"{shares} maps are empty: there is no evidence for the true class once gradients are averaged over the grid.",
    ]


Found = dict[tuple[str, str, int], tuple[str, MeasuredMaps]]


def _numbers(found: Found) -> Iterable[dict[str, Any]]:
    """Yield one row per run and number, the mean over images; for curves one for each share of the pixels."""
    for (method, held_out, seed), (_, own) in found.items():
        keys = {"method": method, "held_out": held_out, "seed": seed, "over": "images"}
        numbers = own.to_frame()
        for quantity, curve in {"deletion": own.deletion, "insertion": own.insertion}.items():
            for share, column in zip(np.linspace(0, 1, curve.shape[1]), curve.T, strict=True):
                yield {**keys, "quantity": quantity, "share": float(share), **tables.estimate(column)}
            yield {**keys, "quantity": quantity, **tables.estimate(numbers[quantity])}
        for quantity in [name for name in PER_IMAGE if name in numbers]:
            yield {**keys, "quantity": quantity, **tables.estimate(numbers[quantity].dropna())}
    for (method, held_out, seed), (_, own) in found.items():
        if method == OTHER:
            alike = agreement(own.maps, found[BASELINE, held_out, seed][1].maps)
            keys = {"method": f"{BASELINE} with {OTHER}", "held_out": held_out, "seed": seed, "over": "images"}
            yield {**keys, "quantity": "agreement", **tables.estimate(alike[np.isfinite(alike)])}


def _pictures(found: Found, indices: Iterable[int], seed: int) -> Iterable[dict[str, Any]]:
    """Yield one row per picture: its run and image, and the network's prediction."""
    for (method, held_out, trial), (run, own) in found.items():
        keys = {"quantity": "picture", "method": method, "held_out": held_out, "seed": trial, "run": run}
        numbers = own.to_frame()[["label", "predicted", "probability"]].rename(columns={"probability": "value"})
        for index in indices if trial == seed else ():
            facts: dict[Any, Any] = numbers.loc[index].to_dict()
            yield {**keys, "image": index, **facts, "over": "picture"}


# --- drawing ----------------------------------------------------------------------------------------------------------


def _pairs(part: Any, shown: pd.DataFrame, arrays: files.Arrays, *, common: bool) -> None:
    """Draw a row for each target: each image, and beside it ERM's and QT-DoG's map (the paper's Figure 6)."""
    targets, images = list(dict.fromkeys(shown["held_out"])), sorted(shown["image"].unique())
    grid = part.subplots(len(targets), 3 * len(images), squeeze=False)
    for row, target in zip(grid, targets, strict=True):
        row[0].set_ylabel(target)
        for place, image in enumerate(images):
            mine = shown[(shown["held_out"] == target) & (shown["image"] == image)]
            original, _ = _arrays(arrays, mine["run"].iloc[0], int(image))
            _show(row[3 * place], original, " ")
            _explained(row[3 * place + 1 : 3 * place + 3], mine, arrays, common=common)
    for ax, name in zip(grid[0], ("image", *METHODS_SHOWN) * len(images), strict=True):
        ax.set_title(name, fontsize=7)


def _triples(part: Any, shown: pd.DataFrame, arrays: files.Arrays, *, common: bool) -> None:
    """Draw original, ERM and QT-DoG for each image, three images in a row (the paper's Figures 9 to 12)."""
    images = sorted(shown["image"].unique())
    grid = part.subplots(-(-len(images) // 3), 9, squeeze=False)
    for start, image in enumerate(images):
        cells = grid[start // 3, 3 * (start % 3) : 3 * (start % 3) + 3]
        mine = shown[shown["image"] == image]
        original, _ = _arrays(arrays, mine["run"].iloc[0], int(image))
        _show(cells[0], original, " ")
        _explained(cells[1:], mine, arrays, common=common)
    for ax in grid.ravel()[len(images) * 3 :]:
        ax.set_axis_off()
    for ax, name in zip(grid[0], ("image", *METHODS_SHOWN) * 3, strict=True):
        ax.set_title(name, fontsize=7)


def _explained(cells: "Sequence[Axes]", rows: pd.DataFrame, arrays: files.Arrays, *, common: bool) -> None:
    """Draw both networks' maps of one image, with a wrong prediction below."""
    both = [_arrays(arrays, run, int(image)) for run, image in rows[["run", "image"]].itertuples(index=False)]
    peak = max(float(each.max()) for _, each in both) if common else None
    for ax, (image, evidence), (_, row) in zip(cells, both, rows.iterrows(), strict=True):
        wrong = row["predicted"] != row["label"]
        _show(ax, 0.5 * image + 0.5 * heat(evidence, peak), f"predicts {row['predicted']:.0f}" if wrong else " ")


def _arrays(arrays: files.Arrays, run: str, index: int) -> tuple[FloatArray, FloatArray]:
    """Return an image (H, W, 3) in [0, 1] and its map (H, W)."""
    return pixels(arrays[f"{run}-image-{index}"]), arrays[f"{run}-map-{index}"].astype(float)


def _show(ax: "Axes", picture: FloatArray, below: str) -> None:
    ax.imshow(picture, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel(below, fontsize=5.5, labelpad=1)
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _charts(part: Any, whole: pd.DataFrame) -> None:
    """Draw deletion and insertion curves, and each number with its interval."""
    left, right = list(part.subfigures(1, 2, width_ratios=[1, 1.5]))
    axes = left.subplots(1, 2, sharey=True)
    for ax, quantity in zip(axes, ("deletion", "insertion"), strict=True):
        mine = whole[(whole["quantity"] == quantity) & whole["share"].notna()]
        plots.curves(ax, mine, x="share", by="method", order=METHODS_SHOWN)
        ax.set(title=quantity.capitalize(), xlabel="Share of pixels", ylim=(0, 1))
        ax.locator_params(axis="x", nbins=3)
    axes[0].set_ylabel("Probability of the true class")
    plots.legend_above(left, axes[0], "")
    single = whole[whole["share"].isna()]
    names = [name for name in NUMBERS if name in set(single["quantity"])]
    grid = np.ravel(right.subplots(2, 4))
    for ax in grid[len(names) :]:
        ax.set_axis_off()
    for ax, quantity in zip(grid, names, strict=False):
        rows = single[single["quantity"] == quantity].set_index("method")
        for place, (method, row) in enumerate(rows.iterrows()):
            look: dict[str, Any] = {"color": f"C{METHODS_SHOWN.index(method) if method in METHODS_SHOWN else 2}"}
            ax.hlines(place, row["low"], row["high"], **look)
            ax.plot(row["value"], place, plots.MARKERS[place], **look)
        if quantity == "energy":
            ax.axvline(single[single["quantity"] == "area"]["value"].mean(), color="0.3", linewidth=0.8, linestyle=":")
        ax.set(yticks=[], ylim=(1.6, -0.6))
        ax.set_title(NUMBERS[quantity], fontsize=5.5)
        ax.locator_params(axis="x", nbins=3)
        ax.tick_params(axis="x", labelsize=5)
        ax.grid(visible=False, axis="y")
