"""
Makes rl_zoo3 know DPPO: PyTorch calls ``activate`` at the end of ``import torch``, in every program of an environment that
this package is installed in. So this module imports neither PyTorch nor this package, and nothing here may raise.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The modules of rl_zoo3 that DPPO is registered with, and what they have when they have run. All scripts import the first.
TARGETS = {"rl_zoo3.utils": "ALGOS", "rl_zoo3.exp_manager": "ExperimentManager"}


def _register() -> None:
    try:
        from sb3_dppo.zoo import register

        register()
    except Exception as error:
        print(f"sb3-dppo could not register itself with rl_zoo3: {error!r}", file=sys.stderr)


class _RegisteringLoader:
    """Runs a module as its own loader would and then registers DPPO."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


class _RunningModule(ModuleType):
    """
    A module that was running when PyTorch was imported, usually by that module: DPPO is registered when the module has run,
    as soon as another one asks for what it has.
    """

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in TARGETS.values():
            self.__class__ = ModuleType  # type: ignore[assignment]
            _register()
        return value


class _ZooFinder:
    """Finds nothing but the modules of rl_zoo3 after which DPPO must be registered."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in TARGETS:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not cls)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)  # type: ignore[assignment]
        return spec


def activate() -> None:
    """
    Register DPPO as soon as rl_zoo3 is imported, or now if it has been. Does nothing without rl_zoo3, or when called again.
    """
    if _ZooFinder in sys.meta_path:
        return
    sys.meta_path.insert(0, _ZooFinder)  # type: ignore[arg-type]
    loaded = {name: sys.modules[name] for name in TARGETS if isinstance(sys.modules.get(name), ModuleType)}
    for name, module in loaded.items():
        if not hasattr(module, TARGETS[name]):
            module.__class__ = _RunningModule
    if any(hasattr(module, TARGETS[name]) for name, module in loaded.items()):
        _register()
