"""Makes `lm_eval --model engram` known to versions of lm_eval that don't look for plugins (up to 0.4.13).

Python imports this whenever it starts, by `engram_lm_eval.pth`, so it does next to nothing: it waits for the import of
`lm_eval.models`, the harness's list of models, and adds a line to it. Later versions find the entry point in
pyproject.toml by themselves: then this folder can go.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder


class Registrar:
    """Finds `lm_eval.models` as Python would, and adds to the list when it is there."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """For `lm_eval.models` alone, and once."""
        if name != "lm_eval.models":
            return None
        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: object) -> None:
                run(module)
                from lm_eval.api.registry import model_registry

                if "engram" not in model_registry:
                    model_registry.register("engram", target="engram.interop.harness:EngramHarness")

            spec.loader.exec_module = run_and_register
        return spec


sys.meta_path.insert(0, Registrar)
