"""Which images train, select, judge and are reported on, by default and by the paper's split."""

import numpy as np
import pandas as pd
import pytest
from stores import ERM, PLACE, QT, SIZES, spec, trained

from flatlab.loading import data as loading_data
from flatlab.report import tables
from flatlab.specs.methods import METHODS, replicates
from flatlab.specs.settings import PAPER, QUICK, SMOKE, for_data
from flatlab.train.derived import join


def test_by_default_what_selects_does_not_judge():
    for setting in (SMOKE, QUICK, for_data(QUICK, "PACS")):
        shares = {run.test_share for method in METHODS.values() for run in replicates(method, setting)}
        assert shares == {0.2}
    assert {run.test_share for run in replicates(METHODS["ERM"], PAPER)} == {0.0}  # the paper's split


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_the_parts_of_a_domain_are_apart_and_the_target_is_reported_on_all_but_its_outer_part(share):
    domains = loading_data.domains(spec(test_share=share), PLACE)
    assert domains.target == "rot45" and set(domains.test) == (set(domains.sources) if share else set())
    for name in domains.data.names:
        parts = [domains.in_[name], domains.out[name], domains.test.get(name, np.array([], dtype=np.int64))]
        rows = np.concatenate(parts)
        assert len(rows) == len(set(rows.tolist())) == SIZES[name]
        assert abs(len(domains.out[name]) - 0.2 * SIZES[name]) < 1.5
    for name in domains.sources if share else ():
        assert abs(len(domains.test[name]) - share * SIZES[name]) < 1.5
    assert abs(len(domains.in_["rot45"]) - 0.8 * SIZES["rot45"]) < 1.5  # its 80 %, whatever the share


def test_an_ensemble_has_no_in_domain_test_since_its_members_trained_on_some_of_it(tmp_path):
    joint = ERM.replace(members=(ERM, QT))
    trained(tmp_path, ERM)
    store = trained(tmp_path, QT)
    join(joint, store, PLACE)
    found = tables.accuracies(store, [("one", ERM), ("both", joint)])
    assert (
        found[found["method"] == "both"]["test"].isna().all() and found[found["method"] == "one"]["test"].notna().all()
    )
    assert "source domains, out split (selected on)" in tables.reached(found, tables.gains(found, "one"))
    one = found[found["method"] == "one"]
    twice = pd.concat([one, one.assign(method="two")])
    assert "source domains, test split" in tables.reached(twice, tables.gains(twice, "one"))
