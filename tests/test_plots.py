"""The style of all figures, and findings that are computed once."""

import matplotlib.colors as colors
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from flatlab import plots
from flatlab.analysis import once


def test_the_palette_is_seaborns_for_colour_blind_readers():
    assert [colors.to_hex(color) for color in sns.color_palette("colorblind")] == plots.PALETTE


def test_findings_are_computed_once_for_a_frame_and_again_for_another():
    asked = []

    @once
    def findings(frame):
        asked.append(frame)
        return frame + 1

    frame = pd.DataFrame({"value": [1.0]})
    first = findings(frame)
    first["value"] = 7.0  # the reader's own copy
    assert findings(frame)["value"].item() == 2 and len(asked) == 1
    assert findings(frame.copy())["value"].item() == 2 and len(asked) == 2
    assert findings(frame)["value"].item() == 2 and len(asked) == 3


def test_a_name_beside_a_point_covers_no_other_text():
    _, ax = plt.subplots()
    plots.marked(ax, np.array([[0.2, 0.2], [0.7, 0.7]]), ["alone", "crowded"])
    assert [text.get_position() for text in ax.texts] == [plots.CORNERS[0]] * 2
    ax.clear()
    ax.plot([0, 1], [0, 1], ".")
    label = ax.annotate("0.034", (0.5, 0.5), (4, 2), textcoords="offset points")
    plots.marked(ax, np.array([[0.5, 0.5]]), ["first"])
    name = ax.texts[-1]
    assert not name.get_window_extent().overlaps(label.get_window_extent()) and name.get_position() == (-4, 4)
    for place in ((-40, 4), (-40, -12), (4, -12)):
        ax.annotate("0.0340", (0.5, 0.5), place, textcoords="offset points")
    plots.marked(ax, np.array([[0.5, 0.5]]), ["fourth"])
    assert ax.texts[-1].get_position() == plots.CORNERS[0], "where no corner is free, the first"
    plt.close("all")
