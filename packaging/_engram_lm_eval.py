"""Makes `lm_eval --model engram` known to lm_eval, which up to 0.4.13 looks for no plugins.

Python imports this whenever it starts, by `engram_lm_eval.pth`, so it does next to nothing: it waits for the import of
`lm_eval.models`, the harness's list of models, and adds a line to it. A version that finds the entry point in
pyproject.toml by itself makes this folder superfluous.
"""

import sys


class Registrar:
    """Finds `lm_eval.models` as Python would, and adds to the list when it has been imported."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> object:
        """For `lm_eval.models` alone."""
        if name != "lm_eval.models":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: object) -> None:
                run(module)
                register()

            spec.loader.exec_module = run_and_register
        return spec


def register() -> None:
    """Add our model to the list, as the entry point that later versions may find and add again; versions before 0.4.10
    have no such list and are left alone."""
    from importlib.metadata import EntryPoint

    from lm_eval.api import registry

    models = getattr(registry, "model_registry", None)
    if models is not None and "engram" not in models:
        models.register("engram", target=EntryPoint("engram", "engram.interop.harness:EngramHarness", "lm_eval.models"))


sys.meta_path.insert(0, Registrar)
