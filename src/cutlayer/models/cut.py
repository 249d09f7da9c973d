"""The cut: one network in two halves, at a named layer."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, fx, nn

from cutlayer.errors import ConfigError
from cutlayer.models.apart import check_apart
from cutlayer.models.auxiliary import SelfTraining
from cutlayer.models.crossing import Crossing, Likeness, ancestors, crossing, likenesses, stand_in
from cutlayer.models.trace import drop_unused, trace


@dataclass(eq=False)
class Halves:
    """The two halves of a network: `server(client(inputs))` is what the network computes.

    `split` makes them from a network; a user with two modules of their own constructs this directly.

    Attributes:
        client: from the inputs to the tensor at the cut, float [B, ...].
        server: from the tensor at the cut to the outputs.
        whole: the uncut network, for its structure; by default the two halves, one after the other.

    Raises:
        ConfigError: the halves share a tensor.
    """

    client: nn.Module
    server: nn.Module
    whole: nn.Module | None = None

    def __post_init__(self) -> None:
        check_apart(self.client, self.server)
        self._separate = self.whole is None
        if self.whole is None:
            # A copy now: after training, a module that stores what it computed cannot be copied any more.
            parts = OrderedDict(client=copied(self.client), server=copied(self.server))
            self.whole = nn.Sequential(parts)

    def __repr__(self) -> str:
        """Short: classes and sizes."""
        sides = (f"{side}={_size(getattr(self, side))}" for side in ("client", "server"))
        return f"Halves({', '.join(sides)})"

    def merged(self) -> nn.Module:
        """The uncut network, of its original class, with the halves' present weights; on the CPU, in eval mode.

        For halves that never were one network it is an `nn.Sequential` with the names `client` and `server`.
        """
        client, server = self.client.state_dict(), self.server.state_dict()
        if self._separate:
            client, server = (
                {f"{side}.{k}": v for k, v in state.items()} for side, state in (("client", client), ("server", server))
            )
        assert self.whole is not None  # made at the latest in __post_init__
        merged = copy.deepcopy(self.whole).cpu()
        # What the network holds but never calls is in neither half, so some may be missing, but none unexpected. Of
        # constants that the network does not save, `fx` makes buffers that are saved.
        unexpected = merged.load_state_dict({**client, **server}, strict=False).unexpected_keys
        if unexpected := [name for name in unexpected if not _is_constant(merged, name)]:
            raise ConfigError(
                f"the halves hold what the network does not: {', '.join(unexpected)}; was a half replaced?"
            )
        return merged.eval()


def _is_constant(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(operator.attrgetter(name)(model), Tensor)
    except AttributeError:
        return False


def _size(half: nn.Module) -> str:
    return f"<{type(half).__name__}, {sum(p.numel() for p in half.parameters()):,} parameters>"


def is_frozen(half: nn.Module) -> bool:
    """Whether no gradients are of use to a half: none of its parameters requires any, or it trains by itself."""
    return isinstance(half, SelfTraining) or not any(parameter.requires_grad for parameter in half.parameters())


Copied = TypeVar("Copied", nn.Module, Halves)


def copied(value: Copied) -> Copied:
    """A deep copy of a module or of halves. Raises ConfigError for one that stores a tensor with its graph."""
    try:
        return copy.deepcopy(value)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot copy {type(value).__name__}: {error}. If a module stores a tensor that it computed, detach it "
            "there, or pass fresh modules"
        ) from error


def split(model: nn.Module, cut: str, example: Tensor | None = None) -> Halves:
    """Cut a network after the module named `cut` (as in `model.named_modules()`).

    The network is called with its first argument alone; all others have their defaults. The modules that contain the
    cut must be traceable with `torch.fx`; all others are taken as they are. The halves hold copies, under the original
    names; the model is left alone. If the network returns an output object, such as those of `transformers`, the
    server half returns its only tensor, or that named `logits`.

    Args:
        model: the network.
        cut: name of the layer.
        example: a batch of inputs [B, ...], needed only if the server half asks for shapes or types of tensors from
            before the cut.

    Raises:
        ConfigError: there is no such module, it is not called exactly once, or more than one tensor would cross; the
            message lists what would cross, or the cuts that are possible.
    """
    if cut == "" or cut not in dict(model.named_modules()):
        try:
            points = cut_points(model, example)
        except ConfigError as error:
            raise ConfigError(f"no layer {cut!r} to cut at, and {error}") from None
        raise ConfigError(f"no layer {cut!r} to cut at; possible cuts: {', '.join(points)}")
    whole = copied(model)
    division = _divide(whole, cut, example)
    graph, cut_node, client_nodes = division.graph, division.cut, division.client

    client_graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in client_nodes:
            copies[node] = client_graph.node_copy(node, copies.__getitem__)
    client_graph.output(copies[cut_node])

    server_graph = fx.Graph()
    activations = server_graph.placeholder("activations")
    copies = {cut_node: activations}
    for node, like in division.asked.items():
        copies[node] = server_graph.call_function(stand_in, (activations, like.dims, like.dtype))
    for node in graph.nodes:
        if node in division.server:
            copies[node] = server_graph.node_copy(node, copies.__getitem__)
    server_graph.output(fx.map_arg(graph.output_node().args[0], copies.__getitem__))
    # Copies, so that training a half changes neither the other half's nor the template's tensors.
    client = copy.deepcopy(fx.GraphModule(whole, client_graph, "ClientHalf"))
    server = copy.deepcopy(fx.GraphModule(whole, server_graph, "ServerHalf"))
    return Halves(client, server, whole)


def cut_points(model: nn.Module, example: Tensor | None = None) -> list[str]:
    """The names of all layers of a network at which `split` works, in order. Raises ConfigError if there is none.

    `impossible_cuts` says of the others why it does not.
    """
    reasons = _reasons(model, example)
    points = [name for name, reason in reasons.items() if reason is None]
    if not points:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in _telling(reasons).items())
        raise ConfigError(
            f"{type(model).__name__} can be cut after none of its {len(reasons)} layers; "
            f"impossible_cuts(model) says of each why, among them{listed or ': none'}"
        )
    return points


def impossible_cuts(model: nn.Module, example: Tensor | None = None) -> dict[str, str]:
    """Why a network cannot be cut, for each layer at which `split` does not work, in order."""
    return {name: reason for name, reason in _reasons(model, example).items() if reason is not None}


def _reasons(model: nn.Module, example: Tensor | None) -> dict[str, str | None]:
    model = copied(model)
    reasons: dict[str, str | None] = {}
    for name, _ in model.named_modules():
        try:
            if name:
                _divide(model, name, example)
                reasons[name] = None
        except ConfigError as error:
            reasons[name] = str(error)
    return reasons


def _telling(reasons: Mapping[str, str | None]) -> dict[str, str]:
    """The first layers with reasons that differ in more than the layer's name, at most five."""
    found: dict[str, tuple[str, str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            found.setdefault(reason.replace(repr(name), ""), (name, reason))
    return dict(list(found.values())[:5])


@dataclass(frozen=True, eq=False)
class _Division:
    """A network's graph, the node to cut after, each side's nodes, and the tensors that the server asks facts of."""

    graph: fx.Graph
    cut: fx.Node
    client: set[fx.Node]
    server: set[fx.Node]
    asked: dict[fx.Node, Likeness]


def _divide(model: nn.Module, cut: str, example: Tensor | None) -> _Division:
    """Raises ConfigError if the network cannot be cut there."""
    graph = trace(model, cut)
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == cut]
    if len(calls) != 1:
        raise ConfigError(
            f"expected layer {cut!r} to be called once in a forward pass, it is called {len(calls)} times"
        )
    if fields := {str(user.args[1]) for user in calls[0].users if user.target is getattr} - {*dir(Tensor)}:
        raise ConfigError(
            f"layer {cut!r} returns not a tensor but an object, of which {', '.join(sorted(fields))} is used; cut "
            "after a layer inside it, or after it, that returns a tensor"
        )
    drop_unused(graph)
    client_nodes = ancestors(calls[0])
    found = crossing(model, graph, client_nodes)
    found.asked.pop(calls[0], None)
    _check_crossing(graph, cut, calls[0], found)
    _check_parameters(model, graph, cut, client_nodes)
    return _Division(graph, calls[0], client_nodes, found.nodes, likenesses(model, found.asked, example, cut))


def _check_crossing(graph: fx.Graph, cut: str, cut_node: fx.Node, found: Crossing) -> None:
    if graph.output_node().args[0] is cut_node:
        raise ConfigError(f"nothing is left for the server after {cut!r}; cut earlier")
    if set(found.tensors) != {cut_node}:
        crossing = []
        for node in (node for node in graph.nodes if node in found.tensors):
            what = "the network's input" if node.op == "placeholder" else node.name
            crossing.append(f"{what} (used by {', '.join(n.name for n in graph.nodes if n in found.tensors[node])})")
        raise ConfigError(
            f"expected one tensor to cross a cut after {cut!r}, these {len(crossing)} would: {'; '.join(crossing)}. "
            "Cut where the paths have joined; cut_points(model) lists such layers."
        )


def _check_parameters(model: nn.Module, graph: fx.Graph, cut: str, client_nodes: set[fx.Node]) -> None:
    held: dict[str, dict[int, str]] = {"client": {}, "server": {}}
    trained: set[str] = set()
    for node in graph.nodes:
        sides = [("client", node in client_nodes), ("server", node not in client_nodes)]
        if node.op == "get_attr":
            sides = [
                (side, any((user in client_nodes) == (side == "client") for user in node.users)) for side, _ in sides
            ]
        for side in [side for side, there in sides if there]:
            if node.op == "call_module":
                module = model.get_submodule(node.target)
                tensors = [*module.named_parameters(node.target), *module.named_buffers(node.target)]
            elif node.op == "get_attr":  # a constant, such as a mask, may be in both halves; a parameter may not
                tensor = operator.attrgetter(node.target)(model)
                tensors = [(node.target, tensor)] if isinstance(tensor, nn.Parameter) else []
            else:
                tensors = []
            held[side] |= {id(tensor): name for name, tensor in tensors}
            trained |= {side for _, tensor in tensors if isinstance(tensor, nn.Parameter)}
    if "server" not in trained:
        raise ConfigError(f"nothing to train is left for the server after {cut!r}; cut earlier")
    if "client" not in trained:
        raise ConfigError(f"no parameters before {cut!r}: the client would send its raw data; cut later")
    if shared := [name for key, name in held["client"].items() if key in held["server"]]:
        raise ConfigError(
            f"a cut after {cut!r} would leave these in both halves: {', '.join(shared)}; no training could "
            "keep them equal without sending them. Cut elsewhere, or untie them."
        )
