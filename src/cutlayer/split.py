"""2. The cut: one network in two halves, at a named layer."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

from torch import fx, nn

from cutlayer.errors import ConfigError


@dataclass(eq=False)
class Halves:
    """The two halves of a network: `server(client(inputs))` is what the network computes.

    `split` makes them from a network; a user with two modules of their own constructs this directly.

    Attributes:
        client: from the inputs to the tensor at the cut, float [B, ...].
        server: from the tensor at the cut to the outputs.
        whole: a copy of the uncut network, for its structure; None for halves that never were one.
    """

    client: nn.Module
    server: nn.Module
    whole: nn.Module | None = None

    def merged(self) -> nn.Module:
        """The uncut network, of its original class, with the halves' present weights; on the CPU.

        For halves that never were one network it is an `nn.Sequential` of copies with names `client` and `server`.
        """
        if self.whole is None:
            halves = OrderedDict(client=copy.deepcopy(self.client), server=copy.deepcopy(self.server))
            return nn.Sequential(halves).cpu()
        merged = copy.deepcopy(self.whole)
        # Not strict: what the network holds but never calls is in neither half.
        merged.load_state_dict({**self.client.state_dict(), **self.server.state_dict()}, strict=False)
        return merged.train(self.server.training)


class _ToTheCut(fx.Tracer):
    """Traces only the modules that contain the cut; all others stay whole, so they need not be traceable."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.cut = cut

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self.cut.startswith(f"{module_qualified_name}.")


def split(model: nn.Module, cut: str) -> Halves:
    """Cut a network after the module named `cut` (as in `model.named_modules()`).

    The modules that contain the cut must be traceable with `torch.fx`; all others are taken as they are. The halves
    hold copies, under the original names; the model is left alone.

    Raises:
        ConfigError: there is no such module, it is not called exactly once, or more than one tensor would cross; the
            message lists what would cross, or the cuts that are possible.
    """
    names = dict(model.named_modules())
    if cut not in names or cut == "":
        raise ConfigError(f"no layer {cut!r} to cut at; possible cuts: {', '.join(cut_points(model))}")
    whole = copy.deepcopy(model)
    graph = _trace(whole, cut)
    cut_node = _cut_node(graph, cut)
    client_nodes = _ancestors(cut_node)
    _check_crossing(graph, cut, cut_node, client_nodes)

    client_graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in client_nodes:
            copies[node] = client_graph.node_copy(node, copies.__getitem__)
    client_graph.output(copies[cut_node])

    server_graph = fx.Graph()
    copies = {cut_node: server_graph.placeholder("activations")}
    for node in graph.nodes:
        constant = node.op == "get_attr" and any(user not in client_nodes for user in node.users)
        if constant or (node not in client_nodes and node.op not in ("placeholder", "output")):
            copies[node] = server_graph.node_copy(node, copies.__getitem__)
        if node.op == "output":
            server_graph.output(fx.map_arg(node.args[0], copies.__getitem__))
    client = fx.GraphModule(whole, client_graph, "ClientHalf")
    server = fx.GraphModule(whole, server_graph, "ServerHalf")
    _check_parameters(client, server, cut)
    # Copies, so that training a half changes neither the other half's nor the template's tensors.
    return Halves(copy.deepcopy(client), copy.deepcopy(server), whole)


def cut_points(model: nn.Module) -> list[str]:
    """The names of all layers of a network at which `split` works, in order."""
    points = []
    for name, _ in model.named_modules():
        try:
            if name:
                split(model, name)
                points.append(name)
        except ConfigError:
            continue
    return points


def _trace(model: nn.Module, cut: str) -> fx.Graph:
    graphs = []
    for training in (True, False):
        copied = copy.deepcopy(model).train(training)
        try:
            graphs.append(_ToTheCut(cut).trace(copied))
        except Exception as error:
            raise ConfigError(
                f"cannot trace the modules that contain {cut!r} with torch.fx: {error}. Cut elsewhere, or write the "
                "two halves as modules of your own and pass Halves(client, server)."
            ) from error
    if str(graphs[0]) != str(graphs[1]):
        raise ConfigError(
            f"the modules that contain {cut!r} compute something else in training than in evaluation, outside their "
            "submodules; use modules for that (nn.Dropout, say, not functional.dropout)"
        )
    needed = [n.name for n in graphs[0].nodes if n.op == "placeholder" and not n.args]
    if len(needed) != 1:
        raise ConfigError(f"expected a network with one input, this one takes {needed}; pass Halves(client, server)")
    return graphs[0]


def _cut_node(graph: fx.Graph, cut: str) -> fx.Node:
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == cut]
    if len(calls) != 1:
        raise ConfigError(
            f"expected layer {cut!r} to be called once in a forward pass, it is called {len(calls)} times"
        )
    return calls[0]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def _check_crossing(graph: fx.Graph, cut: str, cut_node: fx.Node, client_nodes: set[fx.Node]) -> None:
    crossing = []
    for node in graph.nodes:
        takers = [user for user in node.users if user not in client_nodes]
        if node.op == "get_attr" or not takers:
            continue
        if node in client_nodes or node.op == "placeholder":
            what = "the network's input" if node.op == "placeholder" else f"{node.name}"
            crossing.append(f"{what} (used by {', '.join(user.name for user in takers)})")
    if cut_node not in graph.nodes or all(user.op == "output" for user in cut_node.users):
        raise ConfigError(f"nothing is left for the server after {cut!r}; cut earlier")
    if len(crossing) != 1:
        raise ConfigError(
            f"expected one tensor to cross a cut after {cut!r}, these {len(crossing)} would: {'; '.join(crossing)}. "
            "Cut where the paths have joined; cut_points(model) lists such layers."
        )


def _check_parameters(client: nn.Module, server: nn.Module, cut: str) -> None:
    if not any(True for _ in client.parameters()):
        raise ConfigError(f"nothing to train before {cut!r}: the client would send its raw data; cut later")
    theirs = {id(parameter) for parameter in server.parameters()}
    shared = [name for name, parameter in client.named_parameters() if id(parameter) in theirs]
    if shared:
        raise ConfigError(
            f"a cut after {cut!r} would leave these parameters in both halves: {', '.join(shared)}; no training could "
            "keep them equal without sending them. Cut elsewhere, or untie them."
        )
