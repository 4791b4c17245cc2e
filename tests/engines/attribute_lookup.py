"""Look up paths such as `config.get_timing_cache().serialize` in a TensorRT module, in a separate process.

    python attribute_lookup.py MODULE < JSON     {"roots": {variable: class}, "paths": [path]}
    -> JSON, as the last line                    {path: {"missing", "types", "keywords"}}

`missing` is the first part of the path that does not exist, as `Class.name`, or null. `types` are the names of the
TensorRT class of the path's value and of its bases, empty if it is unknown or not a TensorRT class. `keywords` are the
parameter names of the call that the path ends in, or null if they are unknown.
"""

import importlib
import inspect
import json
import re
import sys
from types import ModuleType
from typing import Any

# Classes that the bindings' signatures give by their C++ name.
CPP_NAMES = {"IParserError": "ParserError"}


class Lookup:
    """Looks up attributes of the classes and instances of `module`.

    `trtp` is its submodule `plugin`, which may be missing. `roots` maps variables to classes; the signatures in
    docstrings give the types that methods and properties return. Attributes of other values, such as a list, are not
    checked.
    """

    def __init__(self, module: ModuleType, roots: dict[str, str]) -> None:
        self._module = module
        self._roots = roots

    def find(self, path: str) -> dict[str, Any]:
        root, *steps = re.findall(r"\w+|\(\)", path)
        value: Any = self._module
        cls: type | None = None
        if root == "trtp":
            try:
                value = importlib.import_module(f"{self._module.__name__}.plugin")
            except ImportError:
                return {"missing": "trt.plugin", "types": [], "keywords": None}
        if root in self._roots:
            value, cls = None, getattr(self._module, self._roots[root], None)
            if cls is None:
                return {"missing": f"trt.{self._roots[root]}", "types": [], "keywords": None}
        keywords = None
        for step in steps:
            owner = cls if cls is not None else value
            if owner is None:
                break
            if step == "()":
                keywords = self._keywords(value)
                value, cls = None, self._returned(value)
            elif not hasattr(owner, step):
                return {"missing": f"{getattr(owner, '__name__', owner)}.{step}", "types": [], "keywords": None}
            else:
                attribute = getattr(owner, step)
                is_value = cls is not None and isinstance(attribute, property)
                value, cls = (None, self._returned(attribute.fget)) if is_value else (attribute, None)
        types = [] if cls is None else [base.__name__ for base in cls.__mro__]
        return {"missing": None, "types": types, "keywords": keywords}

    def _returned(self, function: Any) -> type | None:
        if isinstance(function, type):
            return function
        found = re.search(r"-> (?:[\w.:]*\W)?(\w+)$", function.__doc__ or "", re.MULTILINE)
        name = found.group(1) if found is not None else ""
        cls = getattr(self._module, CPP_NAMES.get(name, name), None)
        return cls if isinstance(cls, type) else None

    def _keywords(self, function: Any) -> list[str] | None:
        documented = function.__init__ if isinstance(function, type) else function
        signatures = re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> ", documented.__doc__ or "", re.MULTILINE)
        if signatures:
            return sorted({name for signature in signatures for name in re.findall(r"(\w+): ", signature)})
        return sorted(inspect.signature(documented).parameters) if inspect.isfunction(documented) else None


def main() -> None:
    request = json.load(sys.stdin)
    lookup = Lookup(importlib.import_module(sys.argv[1]), request["roots"])
    found = {path: lookup.find(path) for path in request["paths"]}
    # On its own line: TensorRT's plugin module prints to stdout that it is experimental.
    print(f"\n{json.dumps(found)}")


if __name__ == "__main__":
    main()
