"""Tables 3, 5, 6 and 11: which network stands in for the paper's, and what stands beside what."""

import pytest
from stores import spec, trained

from analyses import _percent, table3, table5, table6, table11
from flatlab.report.panels import TARGET
from flatlab.resources import published
from flatlab.specs.methods import METHODS, compose
from flatlab.specs.settings import PAPER, QUICK, SMOKE, for_data

TABLES = {"3": table3, "5": table5, "6": table6, "11": table11}
NETWORKS = {
    "3": {"digits": "digits-densenet", "sentences": "sentences-transformer", "PACS": "densenet121"},
    "5": {"digits": "digits-vit", "PACS": "vit_b_16"},
    "6": {"digits": "digits-clip", "PACS": "vit_b_16"},
    "11": {"digits": "digits-resnext", "PACS": "resnext50_32x4d"},
}


@pytest.mark.parametrize("number", TABLES)
def test_the_network_that_stands_in_is_that_of_the_data_and_in_the_caption(number):
    module, networks = TABLES[number], NETWORKS[number]
    runs = {run.dataset: run.model for _, run in module.FIGURE.labelled(QUICK)}
    assert runs == {name: model for name, model in networks.items() if name != "PACS"}
    caption = module.FIGURE.caption(QUICK)
    for name, model in runs.items():
        assert f"{name}, {model}" in caption and f"{model}, weights none, " in caption
    assert f"in place of the paper's {module.TABLE.theirs}." in caption
    assert {run.model for _, run in module.FIGURE.labelled(PAPER)} == {networks["PACS"]}
    asked = QUICK.replace(model="cnn-10x2")
    assert {run.model for _, run in module.FIGURE.labelled(asked) if run.dataset == "digits"} == {"cnn-10x2"}


@pytest.mark.parametrize("number", TABLES)
def test_no_printed_number_stands_beside_ours_since_another_network_gave_it(number):
    table = TABLES[number].TABLE
    assert table._same(PAPER.replace(model="resnet50")) == set() and table.networks and table.theirs


def test_table_3_prints_both_data_sets_of_the_paper():
    found = table3.FIGURE.as_published().set_index("method")
    rows = published()["tables"]["3"]["rows"]
    assert list(found.index) == [f"{row['dataset']}, {row['method']}" for row in (rows[0], rows[2], rows[1], rows[3])]
    for row in rows:
        for column in ("in_dist", "out_dist"):
            cell = row[column]
            assert found.loc[f"{row['dataset']}, {row['method']}", column] == f"{cell['mean']} ± {cell['std']}"


def test_the_caption_names_the_percentile_where_there_is_one():
    assert "Percentile over groups: 10 % quantile of the accuracies of classes." in table3.FIGURE.caption(QUICK)
    assert "percentile" not in table5.FIGURE.caption(QUICK)


def test_the_optimizers_are_those_of_the_papers_code():
    def of(module, dataset="digits"):
        (first, *_) = (run for _, run in module.FIGURE.labelled(QUICK) if run.dataset == dataset)
        return first.optimizer, first.weight_decay, first.schedule, first.clip_norm

    assert of(table5) == ("adamw", 0.0, "constant", None)
    assert of(table6) == ("adamw", 0.1, "cosine", None)
    assert of(table3, "sentences") == ("adamw", 0.01, "linear", 1.0)
    assert of(table11) == ("adam", 0.0, "constant", None)


def test_table_6_scores_both_splits_of_the_held_out_domain_and_adds_clipood(tmp_path):
    run = spec()
    store = trained(tmp_path, run)
    found = _percent.accuracies(store, [("ERM", run)], [(TARGET, split) for split in ("in", "out", "all")])
    best = max(store.run(run).rows(), key=lambda row: row["validation"])["target"]
    inside, outside, both = found["value"]
    assert outside == pytest.approx(100 * best["out"]["accuracy"]) and inside != outside
    hits = [best[part]["accuracy"] * best[part]["n"] for part in ("in", "out")]
    assert both == pytest.approx(100 * sum(hits) / 449)
    assert table6.TABLE._panels(QUICK) == [(TARGET, "in"), (TARGET, "out"), (TARGET, "all")]
    asked = table6.TABLE._panels(QUICK.replace(class_percentile=10.0))
    assert asked.count((TARGET, "percentile")) == 1
    for controls, added in ((False, set()), (True, {"mms-bma", "mms-lsq-bma"})):
        labels = {run.label for _, run in table6.FIGURE.labelled(SMOKE.replace(controls=controls))}
        assert labels == {"erm", "lsq"} | added
    assert {"ERM", "CLIPood", "QT-DoG"} <= set(table6.FIGURE.as_published()["method"])
    assert table6.TABLE.notes() == ["Printed, and not made here: CLIPood."]
    assert table6.TABLE.notes(["ERM", "CLIPood"]) == []


def test_of_table_3_fewer_domains_are_held_out_where_fewer_are_asked_for():
    one = SMOKE.replace(held_out=("rot15",))
    held = {(run.dataset, run.held_out) for _, run in table3.FIGURE.labelled(one)}
    assert held == {("digits", "rot15"), ("sentences", "amazon")}
    assert {run.class_percentile for _, run in table3.FIGURE.labelled(one)} == {10.0}
    text = for_data(QUICK, "sentences").replace(domains=("a", "b"), held_out=("b",))  # --dataset sentences
    assert {(run.dataset, run.held_out) for _, run in table3.FIGURE.labelled(text)} == {("sentences", "b")}


def test_the_percentile_over_classes_is_a_panel_where_it_is_logged(tmp_path):
    run = spec().replace(class_percentile=10.0)
    store = trained(tmp_path, run)
    found = _percent.accuracies(store, [("ERM", run)], [(TARGET, "in"), (TARGET, "percentile")])
    rows = store.run(run).rows()
    best = max(rows, key=lambda row: row["validation"])["target"]["in"]
    assert list(found["value"]) == pytest.approx([100 * best["accuracy"], 100 * best["class_percentile"]])
    assert best["class_percentile"] < best["accuracy"]
    plain = compose(METHODS["ERM"], QUICK, held_out="rot0", seed=0, trial_seed=0)
    assert plain.class_percentile is None and table5.TABLE._panels(QUICK) == [(TARGET, "in")]
    assert (TARGET, "percentile") in table3.TABLE._panels(table3.TABLE.suited(QUICK))
