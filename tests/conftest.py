import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# How long an example takes says how busy the machine is.
settings.register_profile("cutlayer", deadline=None)
settings.load_profile("cutlayer")


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder with the real CIFAR-10; tests that need it say so when it is not there."""
    folder = os.environ.get("CUTLAYER_DATA")
    if not folder or not (Path(folder) / "cifar-10-batches-bin").is_dir():
        pytest.skip("needs CIFAR-10: set CUTLAYER_DATA to the folder that holds cifar-10-batches-bin")
    return Path(folder)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray cluster on this machine, as small as it gets; its tests are in one group, and so in one process."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'cutlayer[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for again in (True, True, False):
        try:
            ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
            break
        except RuntimeError:  # on a busy machine its processes may not be up in the time that Ray gives them
            ray.shutdown()
            if not again:
                raise
    yield
    ray.shutdown()
