"""What crosses a cut: tensors whose values the server half uses.

If it asks only for a tensor's shape, type or device, the tensor need not cross: a stand-in made from the activations at
the cut answers. What follows from such facts alone, a mask of ones for instance, is computed on both sides.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from cutlayer.errors import ConfigError

ATTRIBUTES = {"shape", "dtype", "device", "ndim"}
METHODS = {"size", "dim", "ndimension", "numel", "new_zeros", "new_ones", "new_full"}
METHODS_LIKE = {"type_as", "expand_as", "view_as", "reshape_as", "to"}
"""Of these a tensor answers as the argument, not as the one that is called."""
FUNCTIONS = {torch.zeros_like, torch.ones_like, torch.full_like}
DRAWS = ("rand", "drop", "bernoulli", "normal", "multinomial", "empty")
BATCHES = (2, 3, 5)
"""Batch sizes at which shapes are looked at."""


@dataclass
class Crossing:
    """What the server half is made of.

    Attributes:
        nodes: the calls it makes, some of which the client half makes as well.
        tensors: tensors from before the cut that it uses, each with the calls that use it.
        asked: tensors from before the cut of which it asks only shape, type or device, with the calls that ask.
    """

    nodes: set[fx.Node]
    tensors: dict[fx.Node, list[fx.Node]] = field(default_factory=lambda: defaultdict(list))
    asked: dict[fx.Node, list[fx.Node]] = field(default_factory=lambda: defaultdict(list))


def crossing(model: nn.Module, graph: fx.Graph, client_nodes: set[fx.Node]) -> Crossing:
    """What crosses if these nodes are the client's."""
    known = _from_facts(model, graph)
    server = [n for n in graph.nodes if n not in client_nodes and n.op not in ("placeholder", "output")]
    found, waiting = Crossing(set(server)), [*server, graph.output_node()]
    while waiting:
        node = waiting.pop()
        for parent in node.all_input_nodes:
            if parent in found.nodes:
                continue
            if parent in known or parent.op == "get_attr":
                found.nodes.add(parent)
                waiting.append(parent)
            else:
                (found.asked if asks_facts(node, parent) else found.tensors)[parent].append(node)
    found.asked = {node: users for node, users in found.asked.items() if node not in found.tensors}
    return found


def asks_facts(node: fx.Node, of: fx.Node) -> bool:
    """Whether a call depends on a tensor's shape, type and device alone, not on its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ATTRIBUTES
    place = 1 if node.op == "call_method" and node.target in METHODS_LIKE else 0
    if place == 0 and node.target not in (METHODS if node.op == "call_method" else FUNCTIONS):
        return False
    others = [*node.args[:place], *node.args[place + 1 :], *node.kwargs.values()]
    found: list[fx.Node] = []
    fx.map_arg(others, found.append)
    return len(node.args) > place and node.args[place] is of and of not in found


def _from_facts(model: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Nodes that follow from shapes, types, devices and constants alone, the same on both sides."""
    changed: set[fx.Node] = set()  # in place: a copy of the node would miss that
    for node in graph.nodes:
        if _writes(node):
            changed |= ancestors(node)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            if not isinstance(operator.attrgetter(node.target)(model), nn.Parameter):
                found.add(node)
        elif (
            node.op in ("call_function", "call_method")
            and node not in changed
            and _repeatable(node)
            and all(parent in found or asks_facts(node, parent) for parent in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _writes(node: fx.Node) -> bool:
    name = _name(node)
    return node.op in ("call_function", "call_method") and (
        (name.endswith("_") and not name.endswith("__"))
        or node.target is operator.setitem
        or "out" in node.kwargs
        or node.kwargs.get("inplace") is True
    )


def _repeatable(node: fx.Node) -> bool:
    """Whether a call gives the same again: one of PyTorch's or Python's own, and not random."""
    home = getattr(node.target, "__module__", None) or "torch"
    known = node.op == "call_method" or home.split(".")[0] in ("torch", "_operator", "builtins", "math")
    return known and not any(word in _name(node) for word in DRAWS)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found, waiting = {node}, [node]
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


# --- stand-ins ---


@dataclass(frozen=True)
class Likeness:
    """Shape and type of a tensor for any batch size.

    Attributes:
        dims: each dimension as (factor, constant): it is factor * batch + constant.
        dtype: of the tensor.
    """

    dims: tuple[tuple[int, int], ...]
    dtype: torch.dtype


def stand_in(activations: Tensor, dims: tuple[tuple[int, int], ...], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape and type beside the activations at the cut, without values that mean anything."""
    batch = activations.shape[0]
    return activations.new_zeros((), dtype=dtype).expand([factor * batch + constant for factor, constant in dims])


def likenesses(model: nn.Module, asked: Iterable[fx.Node], example: Tensor | None, cut: str) -> dict[fx.Node, Likeness]:
    """Shape and type of the tensors that are asked for them, seen in passes with batches of different size."""
    nodes = list(asked)
    if not nodes:
        return {}
    if example is None:
        names = ", ".join("the network's input" if node.op == "placeholder" else node.name for node in nodes)
        raise ConfigError(
            f"after {cut!r} the network asks for shape or type of {names}, from before the cut. So that they can be "
            "worked out, give `split` a batch of inputs: split(model, layer, example=inputs)"
        )
    seen = [_seen(model, nodes, _batch(example, size)) for size in BATCHES]
    return {node: _likeness(node, [values[place] for values in seen]) for place, node in enumerate(nodes)}


def _batch(example: Tensor, size: int) -> Tensor:
    if not isinstance(example, Tensor) or example.dim() == 0 or len(example) == 0:
        raise ConfigError("example: expected a batch of the network's inputs, a tensor [batch, ...]")
    return torch.cat([example] * -(-size // len(example)))[:size]


def _seen(model: nn.Module, nodes: list[fx.Node], inputs: Tensor) -> list[Tensor]:
    graph, copies = fx.Graph(), {}
    needed = set().union(*(ancestors(node) for node in nodes))
    source = nodes[0].graph
    for node in source.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in nodes])
    device = next((parameter.device for parameter in model.parameters()), inputs.device)
    mode, values = model.training, []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            values = fx.Interpreter(model.eval(), graph=graph).run(inputs.to(device))
    except Exception as error:
        raise ConfigError(f"the network does not take the example, {list(inputs.shape)}: {error}") from error
    finally:
        model.train(mode)
    if not all(isinstance(value, Tensor) for value in values):
        raise ConfigError("expected tensors before the cut, got other values; pass Halves(client, server)")
    return values


def _likeness(node: fx.Node, values: list[Tensor]) -> Likeness:
    first, second, third = values
    dims = []
    for sizes in zip(first.shape, second.shape, third.shape, strict=True):
        factor = sizes[1] - sizes[0]
        constant = sizes[0] - BATCHES[0] * factor
        if sizes[2] != factor * BATCHES[2] + constant:
            raise ConfigError(f"{node.name}: its shape does not follow from the batch size: {[*sizes]} for {BATCHES}")
        dims.append((factor, constant))
    return Likeness(tuple(dims), first.dtype)
