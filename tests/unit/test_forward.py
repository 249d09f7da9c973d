"""Networks whose `forward` has more than one argument, asks for sizes, or returns more than a tensor."""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cutlayer import ConfigError, Training, cut_points, fit, impossible_cuts, split


class Network(nn.Module):
    """Two layers, and a forward that is set from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)


def network(forward: Callable) -> nn.Module:
    torch.manual_seed(0)
    return type("Made", (Network,), {"forward": forward})()


def optional(self: Any, x: Tensor, attn_mask: Tensor | None = None, flag: bool = True, scale: float = 1.5) -> Tensor:
    x = self.first(x)
    if attn_mask is not None:
        x = x * attn_mask
    if not flag:
        raise AssertionError("flag lost its default")
    return self.second(x) * scale


def by_keyword(self: Any, x_in: Tensor, *, is_causal: bool = False, x_in_scale: float = 2.0) -> Tensor:
    return self.second(self.first(x_in) * x_in_scale) * (0 if is_causal else 1)


def variadic(self: Any, x: Tensor, *rest: Tensor, **more: Any) -> Tensor:
    assert not rest
    assert not more
    return self.second(self.first(x))


def all_optional(self: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected one of the two")
    return self.second(self.first(input_ids if input_ids is not None else inputs_embeds))


def decorated(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapper


def module_made_on_the_way(self: Any, x: Tensor) -> Tensor:
    return self.second(nn.ReLU()(self.first(x)))


FORWARDS = [optional, by_keyword, variadic, all_optional, decorated(optional), module_made_on_the_way]


def check(model: nn.Module, cut: str, inputs: Tensor, example: Tensor | None = None) -> None:
    """The halves compute what the network computes, for batches of any size."""
    halves = split(model, cut, example)
    for batch in (1, 2, len(inputs)):
        outputs = model(inputs[:batch])
        outputs = outputs if isinstance(outputs, Tensor) else logits_of(outputs)
        assert torch.equal(halves.server(halves.client(inputs[:batch])), outputs)
    assert halves.merged().state_dict().keys() == model.state_dict().keys()


def logits_of(outputs: Any) -> Tensor:
    if isinstance(outputs, tuple) and not hasattr(outputs, "logits"):
        return outputs[0]
    return outputs["logits"] if isinstance(outputs, dict) else outputs.logits


@pytest.mark.parametrize("forward", FORWARDS)
def test_other_arguments_have_their_defaults(forward: Callable) -> None:
    model = network(forward)
    check(model, "first", torch.randn(5, 4))
    data = TensorDataset(torch.randn(10, 4), torch.randint(0, 3, (10,)))
    assert len(fit(split(model, "first"), data, data, training=Training(epochs=2, batch_size=4)).history.losses) == 2


def two_inputs(self: Any, x: Tensor, mask: Tensor) -> Tensor:
    return self.second(self.first(x) * mask)


def input_by_keyword(self: Any, *, x: Tensor) -> Tensor:
    return self.second(self.first(x))


@pytest.mark.parametrize(("forward", "named"), [(two_inputs, r"\['x', 'mask'\]"), (input_by_keyword, r"\['x'\]")])
def test_a_second_input_is_refused(forward: Callable, named: str) -> None:
    with pytest.raises(ConfigError, match=f"one input, Made.forward takes {named}"):
        split(network(forward), "first")


# --- what is returned ---


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class Named(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Record(OrderedDict):
    """As the outputs of `transformers`."""


def dataclass_output(self: Any, x: Tensor) -> Output:
    hidden = self.first(x)
    return Output(self.second(hidden), hidden)


def mapping_output(self: Any, x: Tensor) -> dict[str, Any]:
    hidden = self.first(x)
    return Record(loss=None, logits=self.second(hidden), hidden_states=(hidden,))


def named_tuple_output(self: Any, x: Tensor) -> Named:
    hidden = self.first(x)
    return Named(self.second(hidden), hidden)


def tuple_of_one(self: Any, x: Tensor) -> tuple[Tensor]:
    return (self.second(self.first(x)),)


@pytest.mark.parametrize("forward", [dataclass_output, mapping_output, named_tuple_output, tuple_of_one])
def test_the_server_half_returns_the_logits_of_an_output(forward: Callable) -> None:
    model = network(forward)
    check(model, "first", torch.randn(5, 4))
    data = TensorDataset(torch.randn(10, 4), torch.randint(0, 3, (10,)))
    history = fit(split(model, "first"), data, data, training=Training(epochs=2, batch_size=4)).history
    assert history.merged["accuracy"] == pytest.approx(history.test("accuracy"))


def test_an_output_without_an_obvious_tensor_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x)
        return {"boxes": hidden, "classes": self.second(hidden)}

    with pytest.raises(ConfigError, match=r"returns \['boxes', 'classes'\]. Wrap it"):
        split(network(forward), "first")


# --- what is asked of tensors before the cut ---


class Layer(nn.Module):
    """Attention with an additive mask, and not traceable: it looks at sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.query(x) @ x.transpose(1, 2)
        if mask is not None:
            assert mask.shape == (len(x), 1, x.shape[1])
            scores = scores + mask
        return x + scores.softmax(-1) @ self.value(x)


class Encoder(nn.Module):
    """Tokens [B, T], an optional mask, and a forward in the manner of BERT's."""

    def __init__(self, body: Callable) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(9, 8), nn.ModuleList(Layer() for _ in range(3))
        self.register_buffer("positions", torch.randn(1, 16, 8), persistent=False)
        self.head, self.body = nn.Linear(8, 3), body

    def forward(self, tokens: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
        return self.body(self, tokens, mask)


def default_mask(self: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    batch, length = tokens.size()
    if mask is None:
        mask = torch.ones((batch, length), device=tokens.device)
    x = self.embed(tokens) + self.positions[:, :length]
    additive = (1.0 - mask[:, None, :].to(dtype=x.dtype)) * -1e9
    for layer in self.layers:
        x = layer(x, additive)
    return self.head(x.mean(1))


def type_only(self: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    embedded = self.embed(tokens)
    x = embedded
    for layer in self.layers:
        x = layer(x).to(embedded.dtype)
    return self.head(x.mean(1)).to(device=tokens.device)


def shape_at_the_end(self: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    x = embedded = self.embed(tokens)
    for layer in self.layers:
        x = layer(x)
    x = x.flatten(1).view_as(embedded).view(tokens.shape[0], tokens.size(1), -1)
    return self.head((x * torch.ones_like(tokens).unsqueeze(-1)).mean(1))


@pytest.mark.parametrize("body", [default_mask, type_only, shape_at_the_end])
@pytest.mark.parametrize("cut", ["layers.0", "layers.1"])
def test_sizes_types_and_devices_do_not_cross(body: Callable, cut: str) -> None:
    torch.manual_seed(0)
    model, tokens = Encoder(body), torch.randint(0, 9, (7, 6))
    check(model, cut, tokens, example=tokens[:1])
    assert cut in cut_points(model, tokens)
    training = Training(epochs=2, batch_size=4)
    data = TensorDataset(tokens, torch.randint(0, 3, (7,)))  # the last batch is smaller
    assert len(fit(split(model, cut, tokens), data, data, training=training).history.losses) == 2


def test_without_an_example_the_error_asks_for_one() -> None:
    with pytest.raises(ConfigError, match=r"shape or type of .*the network's input, .*example=inputs"):
        split(Encoder(default_mask), "layers.0")
    with pytest.raises(ConfigError, match="the network does not take the example"):
        split(Encoder(default_mask), "layers.0", torch.randn(2, 6))


def test_a_mask_that_comes_from_the_values_would_cross() -> None:
    def body(self: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
        x, hidden = self.embed(tokens), (tokens == 0)[:, None, :] * -1e9
        for layer in self.layers:
            x = layer(x, hidden)
        return self.head(x.mean(1))

    with pytest.raises(ConfigError, match=r"these 2 would: mul \(used by layers_1, layers_2\); layers_0"):
        split(Encoder(body), "layers.0", torch.randint(0, 9, (7, 6)))


def test_a_mask_that_is_changed_or_drawn_is_not_made_twice() -> None:
    def changed(self: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
        x, own = self.embed(tokens), torch.zeros((tokens.shape[0], 1, tokens.shape[1]))
        own.masked_fill_(tokens[:, None, :] == 0, -1e9)
        return self.head(self.layers[1](self.layers[0](x, own), own).mean(1))

    def drawn(self: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
        x, own = self.embed(tokens), torch.rand((tokens.shape[0], 1, tokens.shape[1]))
        return self.head(self.layers[1](self.layers[0](x, own), own).mean(1))

    for body in (changed, drawn):
        with pytest.raises(ConfigError, match=r"would: .*layers_0"):
            split(Encoder(body), "layers.0", torch.randint(0, 9, (7, 6)))


# --- reasons ---


def test_a_network_that_cannot_be_cut_says_why() -> None:
    def residual(self: Any, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x[:, :3]

    reasons = impossible_cuts(network(residual))
    assert "the network's input (used by getitem)" in reasons["first"]
    assert "nothing is left" not in reasons["second"]
    with pytest.raises(ConfigError, match=r"(?s)can be cut after none of its 2 layers.*first: .*the network's input"):
        cut_points(network(residual))
    assert list(impossible_cuts(network(optional))) == ["second"]


def test_a_layer_that_returns_an_object_is_refused() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Output:
            return Output(self.linear(x))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.second = Inner(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.inner(x).logits)

    with pytest.raises(ConfigError, match="returns not a tensor but an object, of which logits"):
        split(Outer(), "inner")
    assert cut_points(Outer()) == ["inner.linear"]
