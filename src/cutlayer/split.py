"""2. The cut: one network in two halves, at a named layer."""

from __future__ import annotations

import copy
import inspect
import operator
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

from torch import fx, nn

from cutlayer.errors import ConfigError


@dataclass(eq=False)
class Halves:
    """The two halves of a network: `server(client(inputs))` is what the network computes.

    `split` makes them from a network; a user with two modules of their own constructs this directly.

    Attributes:
        client: from the inputs to the tensor at the cut, float [B, ...].
        server: from the tensor at the cut to the outputs.
        whole: the uncut network, for its structure; by default the two halves, one after the other.
    """

    client: nn.Module
    server: nn.Module
    whole: nn.Module | None = None

    def __post_init__(self) -> None:
        self._separate = self.whole is None
        if self.whole is None:
            # A copy now: after training, a module that keeps what it computed cannot be copied any more.
            parts = OrderedDict(client=copied(self.client), server=copied(self.server))
            self.whole = nn.Sequential(parts)

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
        # What the network holds but never calls is in neither half, so some may be missing, but none unexpected.
        if unexpected := merged.load_state_dict({**client, **server}, strict=False).unexpected_keys:
            raise ConfigError(
                f"the halves hold what the network does not: {', '.join(unexpected)}; was a half replaced?"
            )
        return merged.eval()


Copied = TypeVar("Copied", nn.Module, Halves)


def copied(value: Copied) -> Copied:
    """A deep copy of a module or of halves. Raises ConfigError for one that keeps a tensor with its graph."""
    try:
        return copy.deepcopy(value)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot copy {type(value).__name__}: {error}. If a module keeps a tensor that it computed, detach it "
            "there, or pass fresh modules"
        ) from error


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
    if cut == "" or cut not in dict(model.named_modules()):
        raise ConfigError(f"no layer {cut!r} to cut at; possible cuts: {', '.join(cut_points(model))}")
    whole = copied(model)
    graph, cut_node, client_nodes = _divide(whole, cut)

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
    # Copies, so that training a half changes neither the other half's nor the template's tensors.
    client = copy.deepcopy(fx.GraphModule(whole, client_graph, "ClientHalf"))
    server = copy.deepcopy(fx.GraphModule(whole, server_graph, "ServerHalf"))
    return Halves(client, server, whole)


def cut_points(model: nn.Module) -> list[str]:
    """The names of all layers of a network at which `split` works, in order."""
    model, points = copy.deepcopy(model), []
    for name, _ in model.named_modules():
        try:
            if name:
                _divide(model, name)
                points.append(name)
        except ConfigError:
            continue
    return points


def _divide(model: nn.Module, cut: str) -> tuple[fx.Graph, fx.Node, set[fx.Node]]:
    """The network's graph, the node to cut after, and the nodes before it. Raises ConfigError if it cannot be cut."""
    graph = _trace(model, cut)
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == cut]
    if len(calls) != 1:
        raise ConfigError(
            f"expected layer {cut!r} to be called once in a forward pass, it is called {len(calls)} times"
        )
    client_nodes = _ancestors(calls[0])
    _check_crossing(graph, cut, calls[0], client_nodes)
    _check_parameters(model, graph, cut, client_nodes)
    return graph, calls[0], client_nodes


def _trace(model: nn.Module, cut: str) -> fx.Graph:
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    graphs, mode = [], model.training
    for training in (True, False):
        try:
            graphs.append(_ToTheCut(cut).trace(model.train(training), concrete_args=defaults))
        except Exception as error:
            raise ConfigError(
                f"cannot trace the modules that contain {cut!r} with torch.fx: {error}. Cut elsewhere, or write the "
                "two halves as modules of your own and pass Halves(client, server)."
            ) from error
        finally:
            model.train(mode)
    if str(graphs[0]) != str(graphs[1]):
        raise ConfigError(
            f"the modules that contain {cut!r} compute something else in training than in evaluation, outside their "
            "submodules; use modules for that (nn.Dropout, say, not functional.dropout)"
        )
    needed = [
        n.name for n in graphs[0].nodes if n.op == "placeholder" and n.name.split("_")[0] not in defaults and n.users
    ]
    if len(needed) != 1:
        raise ConfigError(f"expected a network with one input, this one takes {needed}; pass Halves(client, server)")
    return graphs[0]


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
            if (node.op == "call_method" and node.target in ("size", "dim")) or node.target in (
                getattr,
                operator.getitem,
            ):
                what += ", perhaps a size: compute sizes from tensors after the cut"
            crossing.append(f"{what} (used by {', '.join(user.name for user in takers)})")
    if all(user.op == "output" for user in cut_node.users):
        raise ConfigError(f"nothing is left for the server after {cut!r}; cut earlier")
    if len(crossing) != 1:
        raise ConfigError(
            f"expected one tensor to cross a cut after {cut!r}, these {len(crossing)} would: {'; '.join(crossing)}. "
            "Cut where the paths have joined; cut_points(model) lists such layers."
        )


def _check_parameters(model: nn.Module, graph: fx.Graph, cut: str, client_nodes: set[fx.Node]) -> None:
    held: dict[str, dict[int, str]] = {"client": {}, "server": {}}
    trained = False
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
            trained = trained or (side == "client" and any(isinstance(t, nn.Parameter) for _, t in tensors))
    if not trained:
        raise ConfigError(f"nothing to train before {cut!r}: the client would send its raw data; cut later")
    if shared := [name for key, name in held["client"].items() if key in held["server"]]:
        raise ConfigError(
            f"a cut after {cut!r} would leave these in both halves: {', '.join(shared)}; no training could "
            "keep them equal without sending them. Cut elsewhere, or untie them."
        )
