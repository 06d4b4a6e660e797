"""The style of all figures, and findings that are computed once."""

import matplotlib.colors as colors
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
