"""How the training data are divided among clients.

partition = make_partition("dirichlet:0.5", train.labels, clients=10, seed=0)
parts = [partition.subset(train, client) for client in range(10)]
"""

from cutlayer.data.partition.divide import dirichlet, iid, label_shards, quantity_skew
from cutlayer.data.partition.spec import make_partition
from cutlayer.data.partition.value import Partition

__all__ = ["Partition", "dirichlet", "iid", "label_shards", "make_partition", "quantity_skew"]
