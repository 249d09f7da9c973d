import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import ConfigError, Halves, cut_points, split
from cutlayer.models.networks import make_model


class Attention(nn.Module):
    """A small transformer: embedding, positions, two encoder layers, mean over time, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.positions = nn.Parameter(torch.randn(1, 7, 16))
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x) + self.right(x))


class Switching(nn.Module):
    """Drops out by a function call, which a trace would fix in one mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(functional.dropout(self.first(x), 0.5, self.training))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.middle = nn.Linear(4, 4, bias=False), nn.ReLU()
        self.decode = nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.middle(self.encode(x)))


class Branching(nn.Module):
    """Not traceable as a whole: its inner module looks at the data."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), self.Inner(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


def same(model: nn.Module, halves: Halves, inputs: Tensor) -> None:
    """The halves compute what the model computes, in both modes, and hold its weights under their names."""
    for training in (False, True):
        model, merged = copy.deepcopy(model).train(training), halves.merged().train(training)
        halves.client.train(training)
        halves.server.train(training)
        outputs = []
        for compute in (model, merged, lambda x: halves.server(halves.client(x))):
            torch.manual_seed(0)
            outputs.append(compute(inputs))
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])
    client, server = halves.client.state_dict(), halves.server.state_dict()
    assert {**client, **server}.keys() == model.state_dict().keys()
    assert not {name for name, _ in halves.client.named_parameters()} & {n for n, _ in halves.server.named_parameters()}


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "resnet18"])
def test_networks_for_32x32(name: str) -> None:
    torch.manual_seed(0)
    model = make_model(name, (3, 32, 32), (0.5,) * 3, (0.25,) * 3, width=0.125)
    inputs = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    points = cut_points(model)
    assert "layer2" in points
    assert "normalize" not in points  # it would send raw images
    assert "head" not in points  # it would leave the server nothing
    for cut in points[:: max(1, len(points) // 4)]:
        same(model, split(model, cut), inputs)


@pytest.mark.parametrize("cut", ["embed", "blocks.0", "blocks.1", "norm"])
def test_a_transformer(cut: str) -> None:
    torch.manual_seed(0)
    model, tokens = Attention(), torch.randint(0, 20, (3, 7))
    if cut == "embed":
        # The positions are added after the cut, so they belong to the server.
        assert "positions" in split(model, cut).server.state_dict()
    same(model, split(model, cut), tokens)


def test_modules_beside_the_cut_need_not_be_traceable() -> None:
    torch.manual_seed(0)
    model = Branching()
    same(model, split(model, "first"), torch.randn(3, 4))


def test_a_server_half_that_begins_in_place_can_be_trained() -> None:
    from cutlayer import Training, fit

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randint(0, 2, (8,)))
    assert len(fit(split(model, "0"), data, training=Training(epochs=2, batch_size=4)).history.losses) == 2


@pytest.mark.parametrize(
    ("model", "cut", "message"),
    [
        (TwoPaths(), "left", r"these 2 would: the network's input \(used by right\); left \(used by add\)"),
        (TwoPaths(), "nothing", r"(?s)no layer 'nothing' to cut at, .*none of its 3 layers.*join: nothing is left"),
        (Tied(), "encode", r"in both halves: encode.weight"),
        (Switching(), "first", r"use modules for that \(nn.Dropout"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1", "nothing is left for the server after '1'"),
        (nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), "0", "would send its raw data"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "", "no layer '' to cut at; possible cuts: 0"),
    ],
)
def test_cuts_that_cannot_be_are_explained(model: nn.Module, cut: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(model, cut)


def test_a_cut_inside_a_residual_block_names_both_tensors() -> None:
    model = make_model("resnet18", (3, 32, 32), (0.5,) * 3, (0.25,) * 3, width=0.125)
    with pytest.raises(ConfigError, match=r"these 2 would: layer1 \(used by layer2_0_shortcut\); layer2_0_conv1"):
        split(model, "layer2.0.conv1")


def test_the_model_is_left_alone_and_merging_brings_the_weights_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = copy.deepcopy(model.state_dict())
    halves = split(model, "0")
    with torch.no_grad():
        halves.client.get_parameter("0.weight").fill_(1)
        halves.server.get_parameter("1.weight").fill_(2)
    merged = halves.merged()
    assert type(merged) is nn.Sequential
    assert (merged[0].weight == 1).all()
    assert (merged[1].weight == 2).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Shared(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Scaled(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def test_halves_that_share_a_tensor_are_refused() -> None:
    weight, scale = nn.Parameter(torch.eye(4)), torch.ones(4)
    part = nn.Parameter(weight.detach()[:2].T)  # another view of the same memory
    norm = nn.BatchNorm1d(4)
    pairs = [
        (Shared(weight), Shared(weight)),
        (Shared(weight), nn.Sequential(nn.ReLU(), Shared(part))),
        (Scaled(scale), Scaled(scale)),
        (nn.Sequential(nn.Linear(4, 4), norm), nn.Sequential(norm, nn.Linear(4, 4))),
    ]
    for client, server in pairs:
        with pytest.raises(ConfigError, match=r"the halves share .*no training could"):
            Halves(client, server)
    Halves(Shared(weight), copy.deepcopy(Shared(weight)))


def test_halves_whose_tensors_are_parts_of_one_flat_buffer() -> None:
    flat = torch.arange(32.0)
    first, second = (nn.Parameter(part.view(4, 4)) for part in flat.split(16))
    Halves(Shared(first), Shared(second))
    overlapping = nn.Parameter(flat[15:31].view(4, 4))
    with pytest.raises(ConfigError, match="the halves share"):
        Halves(Shared(first), Shared(overlapping))


class Counting(nn.Module):
    """Writes to a buffer in its own forward, beside the cut."""

    def __init__(self, *, replaces: bool) -> None:
        super().__init__()
        self.first, self.second, self.replaces = nn.Linear(4, 4), nn.Linear(4, 2), replaces
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.replaces:
            self.calls = self.calls + 1
        else:
            self.calls.add_(1)
        return self.second(self.first(x) / self.calls)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_forward_that_writes_to_a_buffer_is_refused(replaces: bool) -> None:
    network = Counting(replaces=replaces)
    with pytest.raises(
        ConfigError, match=r"forward writes to calls, which the halves would not .*Halves\(client, serv"
    ):
        split(network, "first")
    assert network.calls == 0


class Masking(nn.Module):
    """Makes its default mask from sizes, which `fx` takes only as one tuple."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.first, self.second, self.size = nn.Linear(4, 4), nn.Linear(4, 2), size

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = torch.ones(x.shape[0], 1, dtype=x.dtype) if self.size else torch.ones(x.shape[0], 1)
        return self.second(self.first(x) * mask)


@pytest.mark.parametrize("network", [Masking(), Masking(1)])
def test_sizes_that_are_not_one_tuple_are_named_with_the_way_to_write_them(network: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"Write the sizes as one tuple, as in torch\.ones\(\(x\.shape\[0\], 1\)\)"):
        split(network, "first")
