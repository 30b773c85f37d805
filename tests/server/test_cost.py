"""What a batch costs, from the table of its bundle."""

from engines.bundle.bucket import Bucket
from server.cost import batch_cost
from tests.server.manifests import make_manifest

BUCKET = Bucket(64, 64)


def test_cost_is_that_of_the_measured_stages() -> None:
    cost = batch_cost(make_manifest(), BUCKET, 4, ["eager"])
    assert cost is not None
    assert [cost(1), cost(3), cost(8)] == [6 * 30, 6 * 50, 6 * 100]


def test_first_backend_that_was_measured_counts() -> None:
    manifest = make_manifest()
    faster = [row.model_copy(update={"backend": "aotinductor", "ms": row.ms / 2}) for row in manifest.latency]
    both = manifest.model_copy(update={"latency": [*manifest.latency, *faster]})

    def ms_of(*backends: str) -> float | None:
        cost = batch_cost(both, BUCKET, 1, backends)
        return None if cost is None else cost(1)

    assert ms_of("aotinductor", "eager") == 45
    assert ms_of("tensorrt", "eager") == 90
    assert ms_of("tensorrt") is None
    assert ms_of() is None


def test_size_that_the_bundle_does_not_have_has_no_cost() -> None:
    assert batch_cost(make_manifest(), Bucket(96, 96), 4, ["eager"]) is None
    assert batch_cost(make_manifest(), Bucket(64, 64, 9), 4, ["eager"]) is None
