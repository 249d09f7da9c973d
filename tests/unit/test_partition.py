import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import TensorDataset

from cutlayer import ConfigError
from cutlayer.cli import main
from cutlayer.data.batches import Batches
from cutlayer.data.datasets import load
from cutlayer.data.partition import Partition, dirichlet, iid, label_shards, make_partition, quantity_skew
from cutlayer.report.partition import distances, figure, save_figure, summary, table

LABELS = np.repeat(np.arange(10), 500)


# --- statistics: what each way of dividing is for ----------------------------------------------------------------


def test_iid_is_what_drawing_without_replacement_is_expected_to_give() -> None:
    counts = iid(5000, 10, seed=1).counts(LABELS)
    assert counts.sum(1).tolist() == [500] * 10
    # Hypergeometric: 500 of 5,000, of which 500 are of the class: mean 50, variance 50 * 0.9 * 4500 / 4999.
    assert counts.mean() == 50
    assert counts.var() == pytest.approx(50 * 0.9 * 4500 / 4999, rel=0.4)


def test_a_large_alpha_approaches_iid_and_a_small_one_concentrates() -> None:
    means = [distances(dirichlet(LABELS, 20, alpha, seed=3).counts(LABELS)).mean() for alpha in (0.05, 0.5, 5, 1e6)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.7
    assert means[-1] < 0.01  # proportions are all but equal, and classes are divided by them, not at random
    assert np.ptp(dirichlet(LABELS, 20, 1e9).sizes) <= 10
    assert np.ptp(quantity_skew(5000, 20, 1e9).sizes) <= 1


def test_proportions_are_those_of_the_dirichlet_distribution() -> None:
    """Mean 1/K and variance (K - 1) / (K^2 (K alpha + 1)), over many draws without redrawing."""
    alpha, clients = 0.5, 4
    label = np.zeros(10_000, int)
    shares = np.array([dirichlet(label, clients, alpha, seed, min_samples=0).sizes for seed in range(400)]) / 10_000
    assert shares.mean(0) == pytest.approx([1 / clients] * clients, abs=0.04)
    assert shares.var() == pytest.approx((clients - 1) / (clients**2 * (clients * alpha + 1)), rel=0.1)
    sizes = np.array([quantity_skew(10_000, clients, alpha, seed, min_samples=0).sizes for seed in range(400)]) / 10_000
    assert sizes.var() == pytest.approx((clients - 1) / (clients**2 * (clients * alpha + 1)), rel=0.1)


def test_quantity_skew_leaves_the_classes_alone() -> None:
    partition = quantity_skew(5000, 5, 0.5, seed=2, min_samples=200)
    assert partition.sizes.max() > 2 * partition.sizes.min()
    assert distances(partition.counts(LABELS)).max() < 0.12


def test_shards_hold_few_classes_as_in_the_published_set_up() -> None:
    labels = np.repeat(np.arange(10), 6000)  # MNIST's size, 100 clients, 2 shards of 300
    partition = label_shards(labels, 100, 2, seed=0)
    assert partition.sizes.tolist() == [600] * 100
    classes = (partition.counts(labels) > 0).sum(1)
    assert set(classes.tolist()) == {1, 2}
    assert (classes == 1).mean() < 0.25  # the chance that both shards are of one class is 19/199
    assert set(np.unique(partition.counts(labels)).tolist()) == {0, 300, 600}


def test_total_variation_distance_against_values_by_hand() -> None:
    assert distances(np.array([[10, 0], [0, 10]])).tolist() == [0.5, 0.5]
    assert distances(np.array([[1, 1], [5, 5]])).tolist() == [0, 0]
    assert np.isnan(distances(np.array([[1, 1], [0, 0]]))[1])


# --- reaching min_samples ----------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_a_thousand_clients_all_get_enough() -> None:
    labels = np.repeat(np.arange(10), 5000)
    for alpha in (0.001, 0.1, 100):
        partition = dirichlet(labels, 1000, alpha)
        assert partition.sizes.min() >= 10
        assert partition.sizes.sum() == 50_000
    assert dirichlet(labels, 1000, 100).parameters == {"alpha": 100, "min_samples": 10}  # no sample was moved
    assert dirichlet(labels, 1000, 0.1).parameters["moved"] > 0
    assert dirichlet(labels, 1000, 0.1, min_samples=50).sizes.tolist() == [50] * 1000
    assert quantity_skew(50_000, 1000, 0.01).sizes.min() == 10


def test_a_client_may_have_none_where_that_is_allowed(tmp_path: Path) -> None:
    partition = dirichlet(LABELS, 300, 0.01, min_samples=0)
    assert partition.sizes.min() == 0
    partition.save(tmp_path / "p.json")
    with pytest.raises(ConfigError, match=r"p\.json.*client \d+ has no sample; give it one, or leave it out"):
        Partition.load(tmp_path / "p.json")
    assert Partition.load(tmp_path / "p.json", allow_empty=True) == partition
    assert np.isfinite(float(summary(partition.of(LABELS)).split()[-1]))


# --- the same everywhere -----------------------------------------------------------------------------------------


GOLDEN = {
    "iid": [[2, 5, 6, 13, 21, 23], [0, 4, 11, 14, 17, 18], [1, 8, 10, 16, 20, 22], [3, 7, 9, 12, 15, 19]],
    "dirichlet": [[0, 2, 3, 6, 8, 12, 15, 18, 21, 23], [4, 9, 19], [5, 11, 17, 20], [1, 7, 10, 13, 14, 16, 22]],
    "shards": [[5, 8, 12, 13, 15, 23], [0, 3, 10, 14, 18, 20], [2, 11, 16, 17, 19, 22], [1, 4, 6, 7, 9, 21]],
    "quantity": [[4, 7, 9, 14, 15, 16, 17, 21], [5, 19], [0, 1, 2, 3, 6, 10, 11, 12, 13, 20, 22, 23], [8, 18]],
}


def test_a_seed_gives_the_same_partition_in_every_process_and_release() -> None:
    """Fixed values: a change of these changes what published seeds mean, be it here or in NumPy's generators."""
    labels = np.arange(24) % 3
    got = {
        "iid": [p.tolist() for p in iid(24, 4, seed=7).clients],
        "dirichlet": [p.tolist() for p in dirichlet(labels, 4, 0.5, seed=7, min_samples=2).clients],
        "shards": [p.tolist() for p in label_shards(labels, 4, 2, seed=7).clients],
        "quantity": [p.tolist() for p in quantity_skew(24, 4, 0.5, seed=7, min_samples=2).clients],
    }
    assert got == GOLDEN
    assert iid(24, 4, seed=7) != iid(24, 4, seed=8)


# --- specs -------------------------------------------------------------------------------------------------------


def test_specs_name_the_functions(tmp_path: Path) -> None:
    for spec, partition in (
        ("iid", iid(5000, 10, 4)),
        ("dirichlet:0.5", dirichlet(LABELS, 10, 0.5, 4)),
        ("dirichlet:1e-1:50", dirichlet(LABELS, 10, 0.1, 4, min_samples=50)),
        ("shards:2", label_shards(LABELS, 10, 2, 4)),
        ("quantity:0.5", quantity_skew(5000, 10, 0.5, 4)),
        ("quantity:0.5:100", quantity_skew(5000, 10, 0.5, 4, min_samples=100)),
    ):
        made = make_partition(spec, torch.from_numpy(LABELS), 10, 4, "toy")
        assert made == partition.of(LABELS, "toy")
        made.save(tmp_path / "toy.json")
        assert make_partition(str(tmp_path / "toy.json"), LABELS, 10, data="toy") == made


@pytest.mark.parametrize(
    "spec", ["", "iid:1", "dirichlet", "dirichlet:x", "dirichlet:1:2:3", "shards", "shards:1:2", "Dirichlet:1", "no:1"]
)
def test_an_unknown_spec_lists_the_known_ones(spec: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown partition '{spec}'; known: iid, dirichlet:ALPHA\[:MIN_SAMPLES\]"):
        make_partition(spec, LABELS, 10)


@pytest.mark.parametrize(
    ("spec", "clients", "words"),
    [
        ("dirichlet:0", 10, "expected an alpha above 0, got 0.0"),
        ("dirichlet:nan", 10, "expected an alpha above 0, got nan"),
        ("dirichlet:inf", 10, "expected an alpha above 0, got inf"),
        ("dirichlet:1:-1", 10, "expected min_samples of at least 0, got -1"),
        ("dirichlet:1:1.5", 10, "expected a whole number, got 1.5"),
        ("dirichlet:1", 501, "5000 samples are too few for 501 clients with at least 10 each; take fewer clients"),
        ("shards:0", 10, "expected at least one shard for each client, got 0"),
        ("shards:501", 10, "5000 samples are too few for 10 clients with at least 501 each"),
        ("shards:inf", 10, "expected a whole number, got inf"),
        ("iid", 0, "expected at least one client and one sample, got 0 and 5000"),
        ("iid", 5001, "too few for 5001 clients"),
        ("nowhere.json", 10, "nowhere.json: no such file; `cutlayer partition` makes one"),
    ],
)
def test_what_cannot_be_carried_out_is_explained(spec: str, clients: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_partition(spec, LABELS, clients)


def test_labels_that_are_no_classes_are_explained() -> None:
    for labels in (np.zeros((4, 2), int), np.zeros(4), np.array([], int), torch.zeros(4)):
        with pytest.raises(ConfigError, match=r"expected the class of each sample, integers \[samples\], got"):
            dirichlet(labels, 1, 0.5, min_samples=0)
    with pytest.raises(ConfigError, match="expected classes from 0 to 65535, got -1 to 2"):
        dirichlet([-1, 2], 1, 0.5, min_samples=0)


# --- data sets ---------------------------------------------------------------------------------------------------


def test_a_client_gets_its_samples_and_no_others() -> None:
    train, _ = load("digits")
    partition = make_partition("dirichlet:0.5", train.labels, 3, 0, "digits")
    parts = [partition.subset(train, client) for client in range(3)]
    for part, indices in zip(parts, partition.clients, strict=True):
        assert torch.equal(part.inputs, train.inputs[torch.tensor(indices)])
        assert torch.equal(part.labels, train.labels[torch.tensor(indices)])
        assert (part.mean, part.std, part.classes) == (train.mean, train.std, train.classes)
        assert len(next(iter(Batches(part, batch_size=16).epoch(0))).ids) == 16
    assert [len(part) for part in parts] == partition.sizes.tolist()
    assert (np.stack([p.labels.bincount(minlength=10).numpy() for p in parts]) == partition.class_counts).all()

    tensors = TensorDataset(train.inputs, train.labels)
    subset = partition.subset(tensors, 1)
    assert len(subset) == len(parts[1])
    assert torch.equal(subset[5][0], parts[1][5][0])
    with pytest.raises(ConfigError, match="the partition is of 1437 samples, the data set has 100"):
        partition.subset(train.first(100), 0)
    with pytest.raises(ConfigError, match="expected a client from 0 to 2, got 3"):
        partition.subset(train, 3)


def test_one_client_holds_the_data_set_itself() -> None:
    train, _ = load("digits")
    for spec in ("iid", "dirichlet:0.1", "shards:3", "quantity:0.1"):
        partition = make_partition(spec, train.labels, 1)
        assert partition.clients[0].tolist() == list(range(1437))
        part = partition.subset(train, 0)
        assert part.inputs.data_ptr() == train.inputs.data_ptr()  # a view: the data are not held twice


# --- files -------------------------------------------------------------------------------------------------------


def small() -> Partition:
    return Partition((np.array([0, 1, 2, 5]), np.array([3, 7])), 8, "by hand", {}).of([0, 0, 1, 1, 0, 2, 0, 2], "toy")


def test_a_file_is_for_people_and_reads_back(tmp_path: Path) -> None:
    partition = make_partition("dirichlet:0.5", LABELS, 10, 3, "toy")
    partition.save(tmp_path / "p.json")
    assert Partition.load(tmp_path / "p.json") == partition
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["how"] == {"method": "dirichlet", "parameters": {"alpha": 0.5, "min_samples": 10}, "seed": 3}
    assert content["data"]["name"] == "toy"
    assert [client["samples"] for client in content["clients"]] == partition.sizes.tolist()
    small().save(tmp_path / "small.json")
    text = (tmp_path / "small.json").read_text()
    assert '{"client": 0, "samples": 4, "class_counts": [2, 1, 1], "indices": "0-2,5"}' in text
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".json"] == []


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(
        '{"format": "cutlayer partition 1", "data": {"samples": 8}, '
        '"clients": [{"indices": "0-2,5"}, {"indices": [3, 7]}]}'
    )
    partition = Partition.load(file)
    assert [own.tolist() for own in partition.clients] == [[0, 1, 2, 5], [3, 7]]
    assert partition.how == "by hand"
    made = make_partition(str(file), [0, 1] * 4, 2)
    assert made.counts([0, 1] * 4).tolist() == [[2, 2], [0, 2]]
    with pytest.raises(ConfigError, match=r"mine.json: expected a partition among 3 clients, got one among 2"):
        make_partition(str(file), [0, 1] * 4, 3)
    assert "2 samples are with no client" in summary(made)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('"0-2,5"', '"0-3,5"', r"client 0: expected samples 5, as the file goes on, got 4"),
        ('"3,7"', '"2,7"', "sample 2 is with client 0 and with client 1; keep one"),
        ('"3,7"', '"3,8"', "client 1: expected increasing numbers from 0 to 7, got 8 after 3"),
        ('"3,7"', '"7,3"', "client 1: expected increasing numbers from 0 to 7, got 3 after 7"),
        ('"3,7"', '"3-999999999999"', "client 1: expected increasing numbers from 0 to 7"),
        ('"3,7"', '"3;7"', "client 1: expected numbers and ranges such as 0-4,7,9-12, got '3;7'"),
        ('"3,7"', "[7, 3]", "client 1: expected indices that increase, each once"),
        ('"3,7"', "[3, 3]", "client 1: expected indices that increase, each once"),
        ('"3,7"', "[-1, 3]", "client 1: expected indices from 0 to 7, got -1"),
        ('"3,7"', "[3, 8]", "client 1: expected indices from 0 to 7, got 8"),
        ('"3,7"', "[3, 99999999999999999999]", "client 1"),
        ('"3,7"', "[3, 7.5]", "Expected `int`, got `float`"),
        ('"client": 1', '"client": 0', "client 1: expected client 1, as the file goes on, got 0"),
        ("[0, 1, 1]", "[0, 1, 2]", "client 1: expected class_counts that add up to 2, got 3"),
        ("[0, 1, 1]", "[0, 3, -1]", "client 1: expected class_counts that add up to 2"),
        ("[0, 1, 1]", "[1, 1]", "expected class_counts of every client or of none, as many for each"),
        ('"samples": 8', '"samples": 0', "expected from 1 to 100000000 samples, got 0"),
        ('"samples": 8', '"samples": 1000000000000', "expected from 1 to 100000000 samples"),
        ("partition 1", "partition 2", "expected the format 'cutlayer partition 1', got 'cutlayer partition 2'"),
        ('"seed"', '"sead"', "unknown field `sead`"),
        ("}\n", "", "truncated"),
    ],
)
def test_damage_is_named(before: str, after: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    small().save(file)
    text = file.read_text()
    assert before in text
    file.write_text("".join(text.rsplit(before, 1)[:1]) + after + text.rsplit(before, 1)[1])
    with pytest.raises(ConfigError, match=rf"p\.json: not a partition that can be used: .*{words}"):
        Partition.load(file)


def test_a_file_for_other_data_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    partition = make_partition("iid", LABELS, 10, 0, "toy")
    partition.save(file)
    with pytest.raises(ConfigError, match=r"p.json: the partition was made for other labels \(fingerprint \w+\) than"):
        make_partition(str(file), LABELS[::-1].copy(), 10)
    with pytest.raises(ConfigError, match="the partition is of 5000 samples, the data set has 4999"):
        make_partition(str(file), LABELS[1:], 10)
    with pytest.raises(ConfigError, match="the partition is of the data set 'toy', not of 'digits'"):
        make_partition(str(file), LABELS, 10, data="digits")
    first, second = partition.clients[:2]  # two clients' indices exchanged: numbers add up, counts do not
    Partition((second, first, *partition.clients[2:]), 5000, "iid", {}, 0, "toy", partition.labels,
              partition.class_counts).save(file)  # fmt: skip
    with pytest.raises(ConfigError, match="class counts are not those of its indices"):
        make_partition(str(file), LABELS, 10)


def test_a_value_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        small().clients[0][0] = 1


# --- who has what ------------------------------------------------------------------------------------------------


def printed(partition: Partition, most: int = 10) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(partition, most))
    return console.export_text()


def test_the_table_shows_the_first_clients_and_all_in_summary() -> None:
    partition = make_partition("shards:2", LABELS, 25, 0, "toy")
    text = printed(partition, most=4)
    assert "5000 samples of toy among 25 clients" in text
    assert "label_shards, shards_per_client 2, seed 0" in text
    assert "21 more" in text
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    classes = (partition.counts(LABELS) > 0).sum(1)
    assert ["min", "200", str(classes.min())] in rows
    assert ["max", "200", str(classes.max())] in rows
    assert f"distance from the classes of all: {distances(partition.counts(LABELS)).mean():.3f}" in text
    bare = printed(iid(100, 3))
    assert "33" in bare
    assert "total-variation" not in bare
    many = np.arange(200) % 100
    assert "median" in printed(make_partition("iid", many, 4))


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (5, 10), (40, 10), (41, 10), (1000, 10), (20, 100)])
def test_figures_of_few_and_many(clients: int, classes: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    partition = make_partition("dirichlet:0.3:1", np.arange(5000) % classes, clients, 0, "toy")
    assert "dirichlet, alpha 0.3" in figure(partition).get_suptitle()
    save_figure(partition, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["p.png"]


def test_figures_that_cannot_be_drawn_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = make_partition("iid", LABELS, 3)
    with pytest.raises(ConfigError, match=r"expected a file name that ends in .png, .svg or .pdf, got p.txt"):
        save_figure(partition, "p.txt")
    with pytest.raises(ConfigError, match=r"does not know the classes; say so with partition.of\(labels\)"):
        save_figure(iid(10, 2), tmp_path / "p.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"needs matplotlib: pip install 'cutlayer\[report\]'"):
        save_figure(partition, tmp_path / "p.png")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    make = ["--data", "digits", "--clients", "10", "--how", "dirichlet:0.5", "--seed", "0", "--out", "parts.json"]
    assert main(["partition", *make, "--plot", "parts.svg"]) == 0
    made = capsys.readouterr().out.splitlines()
    assert "1437 samples of digits among 10 clients" in made[0]
    assert (tmp_path / "parts.svg").stat().st_size > 1000
    train, _ = load("digits")
    assert Partition.load("parts.json") == make_partition("dirichlet:0.5", train.labels, 10, 0, "digits")
    assert main(["partition", "--show", "parts.json", "--data", "digits"]) == 0
    assert capsys.readouterr().out.splitlines() == made[:-2]
    for arguments, words in (
        (make, "parts.json exists already; remove it, or choose another name"),
        ([], "expected --data with a data set to divide, or --show with a partition's file"),
        (["--show", "parts.json", "--out", "x.json"], "leave out --out or --show"),
        (["--show", "parts.json", "--data", "digits", "--train-samples", "9"], "of 1437 samples, the data set has 9"),
        (["--data", "digits", "--how", "zipf"], "unknown partition 'zipf'; known: iid, "),
    ):
        assert main(["partition", *arguments]) == 2
        assert words in capsys.readouterr().err
