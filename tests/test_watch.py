"""Flatness while training: what is measured, when, within which share; and that the training is the same with it."""

import random
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from stores import refuses
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatlab
from flatlab.errors import UserError
from flatlab.watch import CSV, Monitor, TensorBoard, monitor

COLUMNS = [
    "step",
    "loss",
    "norm",
    "radius",
    "eigenvalue",
    "eigenvalue_low",
    "eigenvalue_high",
    "trace",
    "trace_low",
    "trace_high",
    "seconds",
]


def data():
    rng = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 6, generator=rng)
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def landscape(model):
    inputs, targets = data()
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=32)  # draws from the global generator when read
    torch.rand(3), np.random.rand(3), random.random()  # as careless code does
    return flatlab.Landscape(model, loader, F.cross_entropy)


def train(watch=None, steps=12):
    random.seed(0), np.random.seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    batches, seen, step = DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True), [], 0
    while step < steps:
        for inputs, targets in batches:
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(inputs + 0.1 * torch.randn_like(inputs)), targets).backward()
            optimizer.step()
            step += 1
            if watch:
                watch(model, step)
                assert all(module.training for module in model.modules())
            seen += [random.random(), np.random.rand(), *(each.grad.sum().item() for each in model.parameters())]
    return model, optimizer, seen


def test_a_training_is_the_same_to_the_byte_with_and_without():
    watch = Monitor(landscape, every=3, share=1e6)
    (one, first, seen), (other, second, saw) = train(watch), train()
    assert len(watch.rows) == 4 and seen == saw
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()
    states = [each.state_dict()["state"] for each in (first, second)]
    assert all(torch.equal(states[0][key][name], states[1][key][name]) for key in states[0] for name in states[0][key])


def test_the_numbers_are_those_of_the_library_with_their_ends():
    watch = Monitor(landscape, every=12, share=1e6)
    model, *_ = train(watch)
    frame = watch.to_frame()
    assert list(frame) == COLUMNS and frame["step"].tolist() == [12] and not watch.remarks
    row, at = frame.iloc[0], landscape(model.eval())
    assert row["loss"] == at.base_loss.mean() and row["norm"] == at.norm
    assert row["radius"] == flatlab.radii_at_rises(at, [0.1]).radii[0]
    exact = torch.linalg.eigvalsh(torch.stack([at.hvp(each) for each in torch.eye(at.num_params)]).double())
    assert row["eigenvalue_low"] <= float(exact[-1]) * (1 + 1e-5) <= row["eigenvalue_high"] * (1 + 2e-5)
    assert row["trace"] == pytest.approx(float(exact.sum()), rel=0.5)
    assert row["trace_low"] <= row["trace"] <= row["trace_high"]


class Clock:
    """Seconds that tests let pass."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize(("share", "cost"), [(0.05, 1.0), (0.5, 1.0), (0.05, 30.0)])
def test_measurements_keep_within_their_share(monkeypatch, share, cost):
    clock = Clock()
    monkeypatch.setattr(monitor, "time", clock)

    class Timed(Monitor):
        def _measure(self, model, step):
            clock.now += cost * (1 if step < 500 else 2)
            return {"loss": 0.0}

    watch, model = Timed(landscape, every=10, share=share), nn.Linear(1, 1)
    for step in range(1, 2001):
        clock.now += 1.0
        watch(model, step)
        assert watch.spent <= max(share * watch.trained + cost, cost), "one that became dearer, at most"
    assert watch.rows[0]["step"] == 10 and all(row["step"] % 10 == 0 for row in watch.rows)
    assert watch.spent <= share * watch.trained
    assert watch.spent > share * watch.trained - 3 * cost - share * 10 or len(watch.rows) == 200


def test_steps_that_the_share_does_not_allow_are_told_once_and_listed(monkeypatch, caplog):
    clock = Clock()
    monkeypatch.setattr(monitor, "time", clock)

    class Timed(Monitor):
        def _measure(self, model, step):
            clock.now += 3.0
            return {"loss": 0.0}

    watch, model = Timed(landscape, every=10), nn.Linear(1, 1)
    for step in range(1, 31):
        clock.now += 1.0
        watch(model, step), watch(model, step)
    assert [row["step"] for row in watch.rows] == [10] and watch.skipped == [20, 30]
    sentence = (
        "step 20: skipped, and so may later ones be .*of 3 s, .* share 0.05 of the training time; choose a larger"
    )
    assert len(watch.remarks) == len(caplog.messages) == 1
    assert re.match(sentence, watch.remarks[0]) and watch.remarks[0] in caplog.messages[0]


def test_a_step_is_measured_once_and_others_are_passed_over():
    watch, model = Monitor(landscape, every=2, share=1e6, numbers=["radius"]), network()
    found = [watch(model, step) for step in (1, 2, 2, 3, 4)]
    assert [each is not None for each in found] == [False, True, False, False, True]
    assert list(watch.to_frame()) == ["step", "loss", "norm", "radius", "seconds"]


def test_a_loss_that_does_not_rise_is_a_remark_and_training_goes_on():
    watch, model = Monitor(landscape, every=1, share=1e6, rise=1e9, numbers=["radius"]), network()
    assert np.isnan(watch(model, 1)["radius"])
    (remark,) = watch.remarks
    assert remark.startswith("step 1: The loss must rise by 1e+09 nats")


def test_modes_and_generators_are_restored_after_an_error():
    def broken(model):
        raise KeyError("theirs")

    model = network().train()
    model[3].eval()
    before = [torch.get_rng_state(), random.getstate()]
    with pytest.raises(KeyError, match="theirs"):
        Monitor(broken, every=1)(model, 1)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert [module.training for module in model] == [True, True, True, False, True]


def test_a_file_of_other_columns_is_left_as_it_is(tmp_path):
    path = tmp_path / "flat.csv"
    CSV(path).log({"loss": 1.0, "radius": 2.0}, step=1)
    CSV(path).log({"loss": 0.5, "radius": 3.0}, step=2)
    before = path.read_text()
    with pytest.raises(UserError, match="has the columns step, loss, radius, got step, loss, trace; give another file"):
        CSV(path).log({"loss": 0.5, "trace": 3.0}, step=3)
    assert path.read_text() == before and before.splitlines() == ["step,loss,radius", "1,1.0,2.0", "2,0.5,3.0"]


def test_every_sink_is_given_every_measurement(tmp_path):
    class Tracker:
        rows = []

        def log(self, values, step):
            self.rows.append((step, values))

    sinks = [CSV(tmp_path / "flat.csv"), TensorBoard(tmp_path / "tb"), Tracker()]
    watch, model = Monitor(landscape, every=2, share=1e6, numbers=["radius"], sinks=sinks), network()
    for step in range(1, 5):
        watch(model, step)
    Monitor(landscape, every=2, share=1e6, numbers=["radius"], sinks=sinks[:1])(model, 6)  # a resumed training
    table = pd.read_csv(tmp_path / "flat.csv")
    assert table["step"].tolist() == [2, 4, 6] and list(table) == list(watch.to_frame())
    assert [step for step, _ in Tracker.rows] == [2, 4] and Tracker.rows[0][1]["radius"] == watch.rows[0]["radius"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("flatness/radius")
    assert [(each.step, each.value) for each in events] == [
        (2, pytest.approx(watch.rows[0]["radius"])),
        (4, events[1].value),
    ]


def test_wrong_arguments_are_refused():
    refuses(
        lambda: Monitor(landscape(network().eval())), "landscape must be a function from the model", "got Landscape"
    )
    refuses(lambda: Monitor(lambda model: model, every=1)(network(), 1), "must return a Landscape, got Sequential")
    refuses(lambda: Monitor(landscape, every=0), "every must be an integer >= 1, got 0")
    refuses(lambda: Monitor(landscape, share=0), "share must be a finite number > 0, got 0")
    refuses(lambda: Monitor(landscape, rise=-1), "rise must be a finite number > 0, got -1")
    refuses(lambda: Monitor(landscape, numbers=["radios"]), "Unknown number 'radios'; did you mean radius?")


@pytest.mark.slow
def test_importing_the_package_is_enough():
    line = "import flatlab; print(flatlab.watch.Monitor.__name__)"
    found = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "Monitor"


# ----------------------------------------------------------------------------------------- with the real frameworks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_callback_of_lightning(tmp_path):
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: uv sync --extra lightning")
    from lightning.pytorch.loggers import CSVLogger

    from flatlab.watch.lightning import FlatnessCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, index):
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(*callbacks):
        pl.seed_everything(0, verbose=False)
        module = Module()
        logger = CSVLogger(tmp_path) if callbacks else False
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=logger,
            callbacks=list(callbacks),
            accumulate_grad_batches=2,
            **quiet,
        )
        trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=8, shuffle=True))
        return module.state_dict(), trainer

    watch = Monitor(lambda module: landscape(module.network), every=2, share=1e6)
    (watched, trainer), (plain, _) = fit(FlatnessCallback(watch)), fit()
    assert [row["step"] for row in watch.rows] == [2, 4, 6, 8]
    assert all(watched[name].numpy().tobytes() == plain[name].numpy().tobytes() for name in plain)
    trainer.logger.save()
    logged = pd.read_csv(f"{trainer.logger.log_dir}/metrics.csv")
    assert logged["flatness/radius"].tolist() == pytest.approx([row["radius"] for row in watch.rows])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_callback_of_transformers(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: uv sync --extra transformers")
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from flatlab.watch.transformers import FlatnessCallback

    rng = torch.Generator().manual_seed(3)
    rows = [{"input_ids": torch.randint(0, 30, (6,), generator=rng), "labels": torch.tensor(k % 2)} for k in range(16)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    small = dict(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)

    def fit(*callbacks):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**small, max_position_embeddings=8))
        given = TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True
        )
        Trainer(model, given, train_dataset=rows, callbacks=list(callbacks)).train()
        return model.state_dict()

    watch = Monitor(
        lambda model: flatlab.Landscape(model, [batch], flatlab.loss_of(model)), every=2, share=1e6, numbers=["radius"]
    )
    watched, plain = fit(FlatnessCallback(watch)), fit()
    assert [row["step"] for row in watch.rows] == [2, 4, 6] and not watch.remarks
    assert all(watched[name].numpy().tobytes() == plain[name].numpy().tobytes() for name in plain)


def test_a_training_that_diverges_is_not_ended_and_a_mistake_is_an_error():
    model = network().eval()
    watch = Monitor(landscape, every=1, share=1e9)
    watch(model, 1)
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    row = watch(model, 2)
    assert np.isnan([value for name, value in row.items() if name != "seconds"]).all() and list(row) == COLUMNS[1:]
    assert watch.remarks[0].startswith("step 2: The loss at the point itself must be finite")
    refuses(lambda: Monitor(landscape, every=1)(model, 1), "must be finite")
