"""CORAL and MixStyle against their formulas written out, in their limits, and through a training."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from stores import TINY, content, spec, trained

from flatlab import files, seeds
from flatlab.data.batches import Batch
from flatlab.errors import UserError
from flatlab.loading import data as loading_data
from flatlab.models.networks import CNNS, STAGES, build_network
from flatlab.specs.methods import METHODS, compose, vary
from flatlab.specs.run import MixSpec, Place
from flatlab.train.mixstyle import cross_domain_partners, mix, mixing
from flatlab.train.objectives import alignment, coral, erm, margin_softmax, objective_of


def random(*shape, name="objectives"):
    return torch.randn(shape, generator=seeds.generator(name, *shape), dtype=torch.float64)


def batch_of(sizes=(4, 4, 4)):
    inputs = random(sum(sizes), 1, 16, 16).float()
    return Batch(inputs, torch.arange(sum(sizes)) % 10, sizes)


# --- margin metric softmax ----------------------------------------------------------------------------------------


def test_the_margin_lowers_each_logit_by_the_similarity_of_the_classes():
    network, batch = build_network("digits-clip", num_classes=10, in_channels=1).eval(), batch_of()
    with torch.no_grad():
        network.head.weight.copy_(F.normalize(random(10, network.head.in_features), dim=-1))
    assert torch.equal(margin_softmax(network, batch, margin=0.0), erm(network, batch))
    vectors, logits = network.head.weight, network(batch.inputs)
    temperature = network.features.log_scale.exp()
    expected = F.cross_entropy(logits - 0.3 * temperature * (vectors @ vectors.T)[batch.targets], batch.targets)
    found = margin_softmax(network, batch, margin=0.3)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and found > erm(network, batch)
    chosen = compose(METHODS["CLIPood"], TINY.replace(margin=0.7), held_out="rot45", seed=0, trial_seed=0)
    assert (chosen.margin, chosen.average.kind, chosen.label) == (0.7, "bma", "mms-bma")
    assert objective_of(chosen)(network, batch, 0) == margin_softmax(network, batch, margin=0.7)
    plain = compose(METHODS["ERM"], TINY.replace(margin=0.7), held_out="rot45", seed=0, trial_seed=0)
    assert plain.margin == 0.3  # of another objective it is not part of the name


# --- CORAL -------------------------------------------------------------------------------------------------------


def test_alignment_is_the_mean_over_pairs_of_both_moments():
    domains = [random(n, 5, name=n) * (n - 3) for n in (4, 6, 7)]
    by_hand = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b = domains[i].numpy(), domains[j].numpy()
        means = np.square(a.mean(0) - b.mean(0)).mean()
        covariances = np.square(np.cov(a, rowvar=False) - np.cov(b, rowvar=False)).mean()  # over n - 1
        by_hand.append(means + covariances)
    assert alignment(domains).item() == pytest.approx(np.mean(by_hand), rel=1e-12)
    assert alignment([domains[0], domains[0].flip(0)]).item() == pytest.approx(0, abs=1e-15)
    assert alignment(domains[:1]).item() == 0.0


def test_coral_adds_the_alignment_of_the_features_to_erm():
    network, batch = build_network("digits-cnn", num_classes=10, in_channels=1).eval(), batch_of()
    features = network.features(batch.inputs).split(batch.sizes)
    expected = erm(network, batch) + 0.3 * alignment(features)
    assert coral(network, batch, weight=0.3).item() == pytest.approx(expected.item(), rel=1e-6)
    chosen = spec("CORAL", coral_weight=0.3)
    assert objective_of(chosen)(network, batch, 0).item() == pytest.approx(expected.item(), rel=1e-6)


def weights(run):
    """The bytes of a run's last weights by name; its file names the run, too."""
    arrays, _ = files.load_arrays(run.checkpoint("last"))
    return tuple((name, array.tobytes()) for name, array in sorted(arrays.items()))


def test_coral_without_weight_is_erm_to_the_bit_and_with_it_draws_the_domains_together(tmp_path):
    ends = {w: trained(tmp_path / str(w), spec("CORAL", coral_weight=w)) for w in (0.0, 1.0, 30.0)}
    erm_store = trained(tmp_path / "erm", spec("ERM"))
    paths = [ends[0.0].run(spec("CORAL", coral_weight=0.0)), erm_store.run(spec("ERM"))]
    none, plain = map(weights, paths)
    assert none == plain
    distances = {weight: _distance(store, spec("CORAL", coral_weight=weight)) for weight, store in ends.items()}
    assert distances[30.0] < distances[1.0] < distances[0.0]


def _distance(store, wanted):
    from flatlab.loading.checkpoint import network as network_of

    network, place = network_of(store.run(wanted), "last", Place(device="cpu")), Place(device="cpu")
    domains = loading_data.domains(wanted, place)
    rows = {name: domains.data.normalise(domains.data.domain(name).images) for name in domains.sources}
    with torch.no_grad():
        return alignment([network.features(images) for images in rows.values()]).item()


# --- MixStyle ----------------------------------------------------------------------------------------------------


def test_mixing_gives_each_image_the_mixed_statistics_and_keeps_its_pattern():
    features, partners = random(6, 3, 4, 5), torch.tensor([1, 0, 3, 2, 5, 4])
    share = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.9, 0.1], dtype=torch.float64)
    mixed = mix(features, partners, share)
    for i in range(6):
        for c in range(3):
            own, other = features[i, c].numpy(), features[int(partners[i]), c].numpy()
            lam = share[i].item()
            deviations = [np.sqrt(each.var(ddof=1) + 1e-6) for each in (own, other)]
            expected = (own - own.mean()) / deviations[0] * (lam * deviations[0] + (1 - lam) * deviations[1])
            expected += lam * own.mean() + (1 - lam) * other.mean()
            np.testing.assert_allclose(mixed[i, c].numpy(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mixed[0], features[0])  # all its own share


def test_no_gradient_flows_through_the_statistics():
    features = random(2, 1, 3, 3).requires_grad_()
    mix(features, torch.tensor([1, 0]), torch.tensor([0.3, 0.3])).sum().backward()
    deviation = (features.detach().var((2, 3), keepdim=True) + 1e-6).sqrt()
    mixed = 0.3 * deviation + 0.7 * deviation.flip(0)
    torch.testing.assert_close(features.grad, (mixed / deviation).expand(2, 1, 3, 3))


@pytest.mark.parametrize("name", STAGES)
def test_every_network_has_stages_to_mix_and_is_left_as_it_was(name, untouched):
    channels, side = (1, 16) if name == "digits-cnn" or name in CNNS else (3, 64 if name == "densenet121" else 32)
    network = build_network(name, num_classes=3, in_channels=channels).double().eval()
    inputs = random(4, channels, side, side)
    with untouched(network), torch.no_grad():
        plain = network(inputs)
        with mixing(network, STAGES[name], MixSpec(p=1.0), names=(0, 7)):
            mixed = network(inputs)
        with mixing(network, STAGES[name], MixSpec(p=1.0), names=(0, 7)):
            assert torch.equal(network(inputs), mixed)
        with mixing(network, STAGES[name], MixSpec(p=1.0), names=(0, 8)):
            assert not torch.equal(network(inputs), mixed)
        assert torch.equal(network(inputs), plain) and not torch.equal(mixed, plain)
        with pytest.raises(ZeroDivisionError), mixing(network, STAGES[name], MixSpec(p=1.0), names=(0, 7)):
            raise ZeroDivisionError


def test_a_stranger_is_of_another_domain_and_each_is_somebodys():
    sizes, domains = (4, 4, 4), np.repeat([0, 1, 2], 4)
    seen = np.zeros((12, 12), dtype=int)
    for draw in range(200):
        partners = cross_domain_partners(sizes, np.random.default_rng(draw))
        assert sorted(partners) == list(range(12)) and (domains[partners] != domains).all()
        seen[np.arange(12), partners] += 1
    assert (seen > 0).sum() == 12 * 8  # everybody of another domain
    uneven = cross_domain_partners((2, 5), np.random.default_rng(0))
    assert set(uneven[:2]) <= set(range(2, 7)) and set(uneven[2:]) == {0, 1}


def test_mixing_across_domains_is_a_run_of_its_own(tmp_path):
    parts = vary(METHODS["ERM"], {"mixing": "mixstyle-across"})
    across = compose(parts, TINY, held_out="rot45", seed=0, trial_seed=0)
    assert across == spec("MixStyle", mixing=MixSpec(across=True)) and across.label == "mixstyle-across"
    plain = spec("MixStyle")
    assert "across" not in plain.canonical()  # old runs keep their names
    ends = {content(trained(tmp_path / each.digest, each).run(each))["checkpoints/last.safetensors"]
            for each in (across, plain)}  # fmt: skip
    assert len(ends) == 2
    network = build_network("digits-cnn", num_classes=3, in_channels=1)
    alone = mixing(network, STAGES["digits-cnn"], MixSpec(across=True), names=(0, 0), sizes=(8,))
    with pytest.raises(UserError, match="needs at least 2 source domains, got 1: take mixstyle"), alone:
        pass


def test_a_stage_is_mixed_as_often_as_p_says():
    network = build_network("digits-cnn", num_classes=3, in_channels=1)
    stages = [network.get_submodule(name) for name in STAGES["digits-cnn"]]
    hooked = np.zeros(2, dtype=int)
    for step in range(400):
        with mixing(network, STAGES["digits-cnn"], MixSpec(), names=(0, step)):
            hooked += [len(stage._forward_hooks) for stage in stages]
    assert all(stats.binomtest(int(count), 400, 0.5).pvalue > 1e-4 for count in hooked)


def test_without_mixing_it_is_erm_to_the_bit_and_draws_belong_to_steps_and_seeds(tmp_path):
    never = spec("MixStyle", mixing=MixSpec(p=0.0))
    runs = {"never": never, "erm": spec("ERM"), "mixed": spec("MixStyle"), "seed": spec("MixStyle", seed=1)}
    ends = {name: weights(trained(tmp_path / name, each).run(each)) for name, each in runs.items()}
    assert ends["never"] == ends["erm"]
    assert len({ends["erm"], ends["mixed"], ends["seed"]}) == 3


def test_images_are_not_mixed_when_networks_are_judged():
    network, batch = build_network("digits-cnn", num_classes=10, in_channels=1).eval(), batch_of()
    chosen = spec("MixStyle", mixing=MixSpec(p=1.0))
    plain = F.cross_entropy(network(batch.inputs), batch.targets)
    assert objective_of(chosen)(network, batch, 0).item() != pytest.approx(plain.item())
    assert torch.equal(F.cross_entropy(network(batch.inputs), batch.targets), plain)
