"""The two figures of quantization noise: they differ in layers, and in the pooling of their noise. Torch-free."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from flatlab import files
from flatlab.analysis import Analysis, by_method
from flatlab.report import quantization_noise, verdicts
from flatlab.resources import published
from flatlab.seeds import derive
from flatlab.specs.measurements import QuantizationNoiseSpec
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE, METHOD = "ERM", "QT-DoG"
labelled = by_method((BASELINE, METHOD))  # the baseline only for the accuracies
MEASUREMENT = QuantizationNoiseSpec()
SUMMARY = "KL to the uniform (nats); corrected: less a uniform sample's, 95 % intervals over seeds, each alone; "
SUMMARY += "* p < 0.05 after Holm over the layers; refused: share of runs in which the test alone refuses at 5 %"
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # of ResNet-50: width and blocks


@dataclass(frozen=True)
class NoiseFigure:
    """A figure of quantization noise.

    Attributes:
        number: in the paper.
        layers: number of layers drawn; one is that of a random weight, more are spread evenly over the network.
        modes: of pooling.
    """

    number: str
    layers: int
    modes: tuple[str, ...]

    @property
    def published(self) -> list[float]:
        """The divergences that the paper prints for ResNet-50 at 7 bits, in layers that it does not name."""
        facts = published()["figures"][self.number]
        return list(facts["kl_top_to_bottom"]) if "kl_top_to_bottom" in facts else [facts["kl"]]

    def table(self, store: RunStore, setting: Setting) -> pd.DataFrame:
        """Return a row for each layer and mode of each run; `shown` marks those that are drawn."""
        frame = quantization_noise.statistics(store, self._measured(setting))
        mine = (
            [_random_layer(frame, derive("figure", self.number, setting.seed))]
            if self.layers == 1
            else quantization_noise.chosen_layers(frame, most=self.layers)
        )
        shown = (frame["run"] == frame["run"].iloc[0]) & frame["layer"].isin(mine) & frame["mode"].isin(self.modes)
        return frame.assign(shown=shown)

    @staticmethod
    def arrays(frame: pd.DataFrame, store: RunStore, setting: Setting) -> files.Arrays:
        """Return the histograms and quantiles of the layers that are marked."""
        return quantization_noise.drawn(store, NoiseFigure._shown(frame), NoiseFigure._measured(setting))

    @staticmethod
    def _measured(setting: Setting) -> list[tuple[str, RunSpec, QuantizationNoiseSpec]]:
        return [(label, spec, MEASUREMENT) for label, spec in labelled(setting) if label == METHOD]

    @staticmethod
    def _shown(frame: pd.DataFrame) -> pd.DataFrame:
        return frame[frame["shown"].astype(bool)]

    @staticmethod
    def findings(frame: pd.DataFrame) -> pd.DataFrame:
        """Return the divergences of each layer and mode over seeds, and the share of runs that each test rejects."""
        return quantization_noise.findings(frame)

    @staticmethod
    def summary(findings: pd.DataFrame) -> pd.DataFrame:
        """Return the findings with formatted numbers."""
        names = {"count": "N", "kl": "KL (nats)", "kl_null": "uniform sample"}
        table = findings.assign(corrected=verdicts.cells(findings), count=findings["count"].round().astype(int)).rename(
            columns=names
        )
        for name in ("KL (nats)", "uniform sample"):
            table[name] = table[name].map("{:.4f}".format)
        for test in quantization_noise.TESTS.values():
            table[f"{test} refused"] = table[test].map("{:.0%}".format)
        columns = ["mode", "layer", "N", "KL (nats)", "uniform sample", "corrected"]
        return table[[*columns, *(f"{test} refused" for test in quantization_noise.TESTS.values())]]

    def remarks(self, frame: pd.DataFrame) -> list[str]:
        """Return sentences on the tests of uniformity, and on the bias of the published divergences."""
        found = self.findings(frame).assign(at=lambda rows: rows["layer"])
        sentences = [*verdicts.sentences(found, place="in"), verdicts.statement(found, test="t tests over seeds")]
        for mode, rows in frame.groupby("mode", sort=False):
            chance = f"{quantization_noise.REJECTED * len(rows):.0f} refused without correction would be chance"
            refused = "; ".join(quantization_noise.refused(rows))
            sentences.append(
                f"{quantization_noise.MODES[str(mode)].capitalize()}: of {len(rows)} layers and runs, refused at 5 % "
                f"after Holm: {refused}. {chance}. A uniform sample explains {rows['explained'].median():.0%} of the "
                f"KL in the median; {rows['clipped'].mean():.2%} clipped."
            )
        return [*sentences, *(explained(kl, int(frame["bins"].iloc[0])) for kl in self.published)]

    def caption(self, setting: Setting) -> str:
        """Return title and notes: data and run."""
        return (
            f"Quantization noise at {setting.bits} bits: {setting.dataset}, {setting.model}, {METHOD}\n"
            f"{setting.held_out[0]} held out, seed {setting.seed}. {quantization_noise.NULL}"
        )

    @staticmethod
    def draw(frame: pd.DataFrame, caption: str, arrays: files.Arrays) -> "Figure":
        """Draw the layers that are marked."""
        return quantization_noise.draw(NoiseFigure._shown(frame), caption, arrays)

    def figure(self, module: str, doc: str) -> Analysis:
        """Return the declaration of the figure."""
        return Analysis(
            module,
            doc,
            BASELINE,
            labelled=labelled,
            measured=lambda setting: [(spec, measurement) for _, spec, measurement in self._measured(setting)],
            table=self.table,
            arrays=self.arrays,
            findings=self.findings,
            summary=self.summary,
            summary_title=SUMMARY,
            remarks=self.remarks,
            caption=self.caption,
            draw=self.draw,
        )


def _random_layer(frame: pd.DataFrame, number: int) -> str:
    """Return the layer of a random weight: the probability of a layer is proportional to its size."""
    sizes = frame.drop_duplicates("layer").set_index("layer")["count"].cumsum()
    return str(sizes.index[sizes > number % int(sizes.iloc[-1])][0])


def null_count(kl: float, bins: int) -> float:
    """Return the size of a uniform sample with this mean divergence, (B - 1) / (2 KL)."""
    return (bins - 1) / (2 * kl)


def null_shares(kl: float, bins: int) -> pd.Series:
    """Return the share of a published divergence that the null explains in each convolution of ResNet-50."""
    return ((bins - 1) / (2 * pd.Series(resnet50_convolutions())) / kl).clip(upper=1)


def explained(kl: float, bins: int) -> str:
    """Return a sentence on the share of a published divergence that the bias explains in the layers of ResNet-50."""
    shares = null_shares(kl, bins)
    return (
        f"Published KL {kl:g}, layer and bins not named: with {bins} bins a uniform sample of "
        f"{null_count(kl, bins):,.0f} weights gives as much; {(shares == 1).sum()} of ResNet-50's {len(shares)} "
        "convolutions are no larger, and the null explains all of it there; over all layers it explains "
        f"{shares.median():.0%} in the median ({shares.min():.0%} to {shares.max():.0%})."
    )


def resnet50_convolutions() -> list[int]:
    """Return the number of weights of each convolution of ResNet-50 (He et al. 2016, Table 1)."""
    sizes, wide = [3 * 64 * 7 * 7], 64
    for width, blocks in STAGES:
        for block in range(blocks):
            sizes += [wide * width, width * width * 9, width * 4 * width]
            if block == 0:
                sizes.append(wide * 4 * width)  # the shortcut
            wide = 4 * width
    return sizes
