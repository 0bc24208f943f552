"""Ray that cannot be started, or has too little, is one line that says what to do."""

from types import SimpleNamespace
from typing import Any

import pytest

from minllama.distributed.ray_cluster import check_resources, start_ray
from minllama.errors import MinllamaError


@pytest.mark.parametrize("kind", [Exception, ConnectionError, RuntimeError, ValueError])
def test_ray_that_does_not_start_is_one_line(kind: type[Exception]) -> None:
    def init(**_: Any) -> None:
        raise kind("The current node timed out during startup.\nIts logs are elsewhere.")

    with pytest.raises(MinllamaError) as caught:
        start_ray(SimpleNamespace(init=init))
    assert str(caught.value) == (
        "Ray cannot be started (The current node timed out during startup); check RAY_ADDRESS, or "
        "unset it to start Ray on this machine"
    )


def test_workers_that_no_machine_has_room_for_are_refused() -> None:
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0})
    words = {"workers": "replicas", "worker": "replica"}
    check_resources(ray, 4, cpus=1, gpus=0, **words)
    with pytest.raises(MinllamaError, match="5 replicas of 1 CPUs need more than the 4 CPUs"):
        check_resources(ray, 5, cpus=1, gpus=0, **words)
    with pytest.raises(MinllamaError, match="give fewer --replicas or --replica-gpus"):
        check_resources(ray, 1, cpus=1, gpus=1, **words)
