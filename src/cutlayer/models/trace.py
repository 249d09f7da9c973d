"""A network as a graph of calls, from its one input to its one output tensor, for `split`."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cutlayer.errors import ConfigError


class _ToTheCut(fx.Tracer):
    """Traces only the modules that contain the cut; all others stay whole, so they need not be traceable."""

    def __init__(self, cut: str, *, buffers: bool) -> None:
        super().__init__()
        self.cut = cut
        self.proxy_buffer_attributes = buffers  # so that a part of a buffer may depend on an input's size

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self.cut.startswith(f"{module_qualified_name}.")

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        try:
            self.path_of_module(m)
        except NameError:  # made in `forward`, as in nn.ReLU()(x)
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        # Called as users call it, with its input alone, so that all other arguments have their defaults. A signature
        # that `fx` reads from the code instead would be wrong for a decorated `forward`.
        inputs = self.create_proxy("placeholder", "inputs", (), {})
        return lambda network, inputs: network.forward(inputs), [self.root, inputs]


def trace(model: nn.Module, cut: str) -> fx.Graph:
    """The calls that a network makes, with the modules that contain the layer `cut` taken apart.

    The graph has one placeholder, the network's first argument, and its output is one tensor. Raises ConfigError.
    """
    _check_signature(model)
    graphs, mode = [], model.training
    for training in (True, False):
        try:
            graphs.append(_traced_unchanged(model.train(training), cut))
        except Exception as error:
            raise ConfigError(
                f"cannot trace the modules that contain {cut!r} with torch.fx: {_why(error)}. Cut elsewhere, "
                "or write the two halves as modules of your own and pass Halves(client, server)."
            ) from error
        finally:
            model.train(mode)
    if str(graphs[0]) != str(graphs[1]):
        raise ConfigError(
            f"the modules that contain {cut!r} compute something else in training than in evaluation, outside their "
            "submodules; use modules for that (nn.Dropout, say, not functional.dropout)"
        )
    graph = graphs[0]
    _choose_output(graph)
    return graph


def _why(error: Exception) -> str:
    """What is wrong, with a simple change of the network that mends it, if there is one."""
    pattern = r"(\w+)\(\) (takes 1 positional argument but|received an invalid combination of arguments - got \(Proxy,)"
    found = re.match(pattern, str(error))
    if found is None or not hasattr(torch, found[1]):
        return str(error)
    first = str(error).split(", but expected", 1)[0]
    return f"{first}. Write the sizes as one tuple, as in torch.{found[1]}((x.shape[0], 1))"


def _traced_unchanged(model: nn.Module, cut: str) -> fx.Graph:
    """As `_traced`. A write to a buffer is done while tracing, and not in the graph: it is undone, and refused."""
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        graph = _traced(model, cut)
    finally:
        written = []
        for name, buffer in model.named_buffers():
            if name in before and not _equal(buffer, before[name]):
                written.append(name)
                buffer.data = before[name]
    if written:
        raise ConfigError(f"its forward writes to {', '.join(written)}, which the halves would not do")
    return graph


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype or one.is_meta:
        return one.shape == other.shape and one.dtype == other.dtype
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _traced(model: nn.Module, cut: str) -> fx.Graph:
    try:
        return _ToTheCut(cut, buffers=False).trace(model)
    except Exception as first:  # whatever a network of the user's own says of a tracer's proxies
        try:
            return _ToTheCut(cut, buffers=True).trace(model)
        except Exception:
            raise first from None


def drop_unused(graph: fx.Graph) -> None:
    """Leave out sizes and fields that are asked for and then not used: they are no use of their tensor."""
    for node in reversed(graph.nodes):
        if not node.users and node.target in (getattr, operator.getitem, "size", "dim"):
            graph.erase_node(node)


def _check_signature(model: nn.Module) -> None:
    """Raise ConfigError unless `forward` can be called with one argument."""
    parameters = inspect.signature(model.forward).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in needed]
    if len(needed) > 1 or by_name or all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters):
        raise ConfigError(
            f"expected a network with one input, {type(model).__name__}.forward takes {needed}: it is called with its "
            "first argument alone, all others need a default. Pass Halves(client, server)"
        )


def _choose_output(graph: fx.Graph) -> None:
    """Make the network's output one tensor: if it returns several things, the only tensor, or that named logits."""
    output = graph.output_node()
    returned = output.args[0]
    fields = _fields(returned)
    if fields is None:
        return
    output.args = (_chosen(fields, fx.Node),)
    if isinstance(returned, fx.Node):
        graph.erase_node(returned)


def output_tensor(returned: Any) -> Tensor:
    """Of what an uncut network returned, the tensor that its server half returns."""
    if isinstance(returned, Tensor):
        return returned
    if is_dataclass(returned) and not isinstance(returned, Mapping):
        return _chosen(vars(returned), Tensor)
    return _chosen(returned._asdict() if hasattr(returned, "_asdict") else _fields(returned) or {}, Tensor)


def _chosen(fields: Mapping[Any, Any], kind: type) -> Any:
    values = {name: value for name, value in fields.items() if value is not None}
    chosen = values.get("logits", next(iter(values.values())) if len(values) == 1 else None)
    if not isinstance(chosen, kind):
        raise ConfigError(
            "expected a network that returns one tensor, or an output with one named logits; this one returns "
            f"{list(values) or 'something else'}. Wrap it in a module whose forward returns what the loss takes"
        )
    return chosen


def _fields(returned: Any) -> Mapping[Any, Any] | None:
    """What a network returns, by name or place; None for a single value."""
    if isinstance(returned, fx.Node):
        made = returned.target  # an output object that is no mapping is in the graph as the call that makes it
        if not isinstance(made, type) or not (is_dataclass(made) or hasattr(made, "_fields")):
            return None
        return {**dict(zip(getattr(made, "_fields", ()), returned.args, strict=False)), **returned.kwargs}
    if isinstance(returned, tuple | list):
        return dict(enumerate(returned))
    return returned if isinstance(returned, Mapping) else {}
