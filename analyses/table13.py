"""Table 13: one step size for a layer, or one for each of its channels, at 7 bits (QT-DoG, Table 13)."""

from analyses._accuracy_table import Line, PaperTable

TABLE = PaperTable(
    number="13",
    lines=(
        Line("no quantization", "ERM", printed={"scale": "No quantization"}),
        Line("layer", "QT-DoG", {"granularity": "tensor"}, {"scale": "Layerwise"}),
        Line("channel", "QT-DoG", {"granularity": "channel"}, {"scale": "Channelwise"}),
    ),
    columns={"PACS": {"target": "PACS_out"}},
)
FIGURE = TABLE.figure(__name__, __doc__)
