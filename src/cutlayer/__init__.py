"""Split learning with loss-based asynchronous exchange and 8-bit floating-point transfers.

halves = cutlayer.split(network, "layer2")
method = cutlayer.Method.of(cutlayer.Drop(threshold=0.05), codec="fp8")
result = cutlayer.fit(halves, train_data, test_data, method=method)
result.history, result.model
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError:
    # A device without PyTorch takes part with `cutlayer.device`, and has nothing else of this package.
    __all__: list[str] = []
else:
    from cutlayer.data.augment import CropFlip
    from cutlayer.data.partition import Partition, make_partition
    from cutlayer.errors import ConfigError, CutlayerError, DivergedError, RefusedError, StoreFullError
    from cutlayer.fleet import Fleet
    from cutlayer.memory.store import StoreOptions
    from cutlayer.method import Method, Metric, Task, Training, accuracy
    from cutlayer.models.cut import Halves, cut_points, impossible_cuts, split
    from cutlayer.models.optim import CustomOptimizer, Optimizer
    from cutlayer.planning.choice import Plan, plan
    from cutlayer.planning.plan import Energy, Limits
    from cutlayer.records.history import EpochRecord, History
    from cutlayer.regularize import Regularize
    from cutlayer.runs.choices import with_choices
    from cutlayer.runs.config import DataConfig, ModelConfig, RunConfig
    from cutlayer.runs.experiment import run_experiment
    from cutlayer.runs.export import load_model
    from cutlayer.runs.fit import Result, fit
    from cutlayer.runs.run import Run
    from cutlayer.schedule import (
        Always,
        Budget,
        Drift,
        Drop,
        Exchange,
        Fixed,
        Once,
        Periodic,
        Plateau,
        Schedule,
        Settle,
    )
    from cutlayer.stopping import Best, EarlyStopping

    __all__ = [
        "Always",
        "Best",
        "Budget",
        "ConfigError",
        "CropFlip",
        "CustomOptimizer",
        "CutlayerError",
        "DataConfig",
        "DivergedError",
        "Drift",
        "Drop",
        "EarlyStopping",
        "Energy",
        "EpochRecord",
        "Exchange",
        "Fixed",
        "Fleet",
        "Halves",
        "History",
        "Limits",
        "Method",
        "Metric",
        "ModelConfig",
        "Once",
        "Optimizer",
        "Partition",
        "Periodic",
        "Plan",
        "Plateau",
        "RefusedError",
        "Regularize",
        "Result",
        "Run",
        "RunConfig",
        "Schedule",
        "Settle",
        "StoreFullError",
        "StoreOptions",
        "Task",
        "Training",
        "accuracy",
        "cut_points",
        "fit",
        "impossible_cuts",
        "load_model",
        "make_partition",
        "plan",
        "run_experiment",
        "split",
        "with_choices",
    ]
