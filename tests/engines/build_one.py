"""Build one engine with `engines.tensorrt`, in a separate process.

python build_one.py FLAVOUR GRAPH WEIGHTS_ROOT FOLDER [TIMING_CACHE] < NetworkSpec as JSON
-> JSON: what the builder reported, its facts, and the modules that were imported
"""

import dataclasses
import json
import sys
from pathlib import Path

from engines.tensorrt import EngineOptions, EngineRequest, build_engine
from moma_rt.bundle.engines import Flavour
from moma_rt.bundle.specs import NetworkSpec


def main() -> None:
    flavour, graph, weights_root, folder, *timing_cache = sys.argv[1:]
    options = EngineOptions(timing_cache=Path(timing_cache[0]) if timing_cache else None)
    spec = NetworkSpec.from_json(json.load(sys.stdin))
    reported: list[str] = []
    # Without a capability TensorRT-RTX chooses as it does under TensorRT's bindings, which cannot set one.
    request = EngineRequest(Flavour(flavour), (), Path(graph), Path(weights_root), spec, options)
    facts = build_engine(request, Path(folder), reported.append)
    modules = {name.partition(".")[0] for name in sys.modules}
    json.dump({"reported": reported, "facts": dataclasses.asdict(facts), "modules": sorted(modules)}, sys.stdout)


if __name__ == "__main__":
    main()
