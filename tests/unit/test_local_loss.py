"""A client that trains by itself while it sends (CSE-FSL): its loop written out, and what crosses."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cutlayer import Budget, ConfigError, Method, Optimizer, RunConfig, with_choices
from cutlayer.data.batches import Batches
from cutlayer.privacy import Defence
from cutlayer.runs.client_half import LocalLoss
from cutlayer.runs.experiment import run_experiment
from cutlayer.runs.recipes import digits
from cutlayer.runs.run import Run
from cutlayer.runs.serve import serve

EPOCHS, BATCH, SAMPLES, EVERY = 3, 16, 150, 3
SGD = Optimizer(lr=0.05, momentum=0.9, weight_decay=5e-4, schedule="constant")
CONFIG = replace(
    with_choices(
        digits(),
        **{"schedule": "always", "codec": "fp32", "train_samples": SAMPLES, "test_samples": 60, "epochs": EPOCHS},
        **{"batch_size": BATCH, "width": 0.5, "threads": 1, "client": SGD, "server": SGD},
    ),
    client_half=LocalLoss(every=EVERY),
)


def written_out() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Each batch trains half and head by the local loss; of every so many the first goes up, as it was before that."""
    train = CONFIG.datasets()[0]
    halves = copy.deepcopy(CONFIG.halves(train))
    client, server = halves.client.train(), halves.server.train()
    both = [torch.optim.SGD(half.parameters(), 0.05, 0.9, weight_decay=5e-4) for half in (client, server)]
    feed = Batches(train, batch_size=BATCH, seed=CONFIG.training.seed)
    for epoch in range(EPOCHS):
        for step, batch in enumerate(feed.epoch(epoch)):
            activations = client.layers(batch.inputs)
            sent = activations.detach()
            both[0].zero_grad()
            cross_entropy(client.head(activations), batch.labels).backward()
            both[0].step()
            if step % EVERY == 0:
                both[1].zero_grad()
                cross_entropy(server(sent), batch.labels).backward()
                both[1].step()
    return client.state_dict(), server.state_dict()


def same(half: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in half.state_dict().items())


def test_it_is_the_publication_s_loop_bit_for_bit() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        client, server = written_out()
    finally:
        torch.set_num_threads(threads)
    result = run_experiment(CONFIG, progress=False)
    assert same(result.halves.client, client)
    assert same(result.halves.server, server)


def test_every_third_batch_goes_up_and_nothing_comes_down() -> None:
    history = run_experiment(CONFIG, progress=False).history
    all_of_it = run_experiment(replace(CONFIG, client_half=LocalLoss(every=1)), progress=False).history
    assert history.exchanges == "BBB"
    assert history.bytes(kinds=("gradients",)) == 0
    steps, sent = math.ceil(SAMPLES / BATCH), math.ceil(math.ceil(SAMPLES / BATCH) / EVERY)
    last = SAMPLES - (steps - 1) * BATCH if (steps - 1) % EVERY == 0 else BATCH
    assert [record.samples for record in history.epochs] == [(sent - 1) * BATCH + last] * EPOCHS
    ratio = history.bytes(kinds=("activations",)) / all_of_it.bytes(kinds=("activations",))
    assert ratio == pytest.approx(((sent - 1) * BATCH + last) / SAMPLES, rel=0.01)
    # The client trains on all batches whatever it sends, and its head counts.
    assert history.flops("client") == all_of_it.flops("client")
    half = CONFIG.halves(CONFIG.datasets()[0]).client
    assert sum(p.numel() for p in half.head.parameters()) > 0
    costs = history.epochs[0].flops["client"]
    assert costs["backward"] > costs["forward"] > 0


def test_a_run_is_resumed_and_its_network_read_back(tmp_path: Path) -> None:
    whole = run_experiment(CONFIG, progress=False)

    def stop(record: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_experiment(CONFIG, tmp_path, resume=True, on_epoch=stop, progress=False)
    resumed = run_experiment(CONFIG, tmp_path, resume=True, progress=False)
    assert same(resumed.model, whole.model.state_dict())
    assert resumed.history.losses == whole.history.losses
    assert same(Run(tmp_path).model(), whole.model.state_dict())


def test_its_config_is_written_and_read_and_what_it_cannot_do_is_refused() -> None:
    assert RunConfig.from_dict(CONFIG.as_dict()) == CONFIG
    with pytest.raises(ConfigError, match="expected one client, got 2"):
        replace(CONFIG, clients=2)
    with pytest.raises(ConfigError, match="bind, budget, nopeek"):
        replace(CONFIG, method=Method(Budget(megabytes=1)))
    with pytest.raises(ConfigError, match="at least 1 batch"):
        LocalLoss(every=0)


def test_it_is_not_served_and_not_with_defences_that_train_along(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected no padding, bind, budget, nopeek"):
        replace(CONFIG, method=replace(CONFIG.method, defence=Defence(nopeek=1.0)))
    halves = CONFIG.halves(CONFIG.data.outline())
    with pytest.raises(
        ConfigError, match=r"LocalLoss\) is not served: .* Ray cluster .* or serve a half that is trained"
    ):
        serve(halves.server, (1,), listen="127.0.0.1:0", run=tmp_path, client_half=halves.client)
