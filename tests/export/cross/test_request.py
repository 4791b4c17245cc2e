import dataclasses
import json

import pytest

from export.cross.request import from_json, to_json
from export.networks import NETWORKS
from export.packages import PackageRequest
from moma_rt.bundle.specs import Precision


@pytest.mark.parametrize("name", NETWORKS)
def test_a_request_is_the_same_after_json(tiny_checkpoint, tiny_geometry, name):
    request = PackageRequest(tiny_checkpoint, NETWORKS[name], tiny_geometry, Precision.FP16, 90, False)
    read = from_json(json.loads(json.dumps(to_json(request))))
    assert (read.network, read.geometry, read.precision, read.capability) == (
        request.network,
        tiny_geometry,
        Precision.FP16,
        90,
    )
    assert read.options == request.options
    assert read.inductor_configs() == request.inductor_configs()
    kinds = [
        {n: (t.dtype, t.shape, t.stride()) for n, t in r.structure().state_dict().items()} for r in (request, read)
    ]
    assert kinds[0] == kinds[1]
    assert kinds[0]


def test_a_partial_checkpoint(tiny_checkpoint, tiny_geometry):
    part = dataclasses.replace(tiny_checkpoint, language=None, vision=None, roles=frozenset({"vae"}))
    geometry = dataclasses.replace(tiny_geometry, language=None)
    request = PackageRequest(part, NETWORKS["vae_decoder"], geometry, Precision.BF16, 89, False)
    read = from_json(json.loads(json.dumps(to_json(request))))
    assert (read.checkpoint.language, read.checkpoint.roles, read.geometry) == (None, {"vae"}, geometry)


def test_weights_are_never_read(tiny_checkpoint, tiny_geometry):
    request = PackageRequest(tiny_checkpoint, NETWORKS["vae_decoder"], tiny_geometry, Precision.FP16, 90, False)
    text = json.dumps(to_json(request))
    with pytest.raises(RuntimeError, match="without weights"):
        from_json(json.loads(text)).checkpoint.vae.load()
    assert len(text) < 100_000
