"""Ray, as labeling and serving use it: connect or start it, and check what it has.

`minllama classify --engine ray` and `minllama serve --replicas` call it.
"""

import logging
import os
from typing import Any

from minllama.errors import MinllamaError
from minllama.text import first_line


def start_ray(ray: Any, *, spare_cpus: int = 0) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine.

    Args:
        ray: the module.
        spare_cpus: that Ray shall count beyond this machine's own, for tasks that mostly wait;
            only where it is started.

    Raises:
        MinllamaError: Ray cannot be reached or started.
    """
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        settings["include_dashboard"] = False
        if spare_cpus:
            settings["num_cpus"] = spare_cpus + (os.cpu_count() or 1)
    try:
        ray.init(**settings)
    except Exception as error:  # a plain one where its processes are too slow to start
        raise MinllamaError(
            f"Ray cannot be started ({first_line(error)}); check RAY_ADDRESS, or unset it to start "
            "Ray on this machine"
        ) from error


def check_resources(
    ray: Any, n: int, *, cpus: float, gpus: float, workers: str, worker: str, other_cpus: int = 0
) -> None:
    """Refuse workers that the cluster has no place for, which Ray would wait for.

    Args:
        ray: the module, connected.
        n: number of workers.
        cpus, gpus: that each takes.
        workers: the option that gives their number, such as `actors`.
        worker: the beginning of the options of each, such as `actor`.
        other_cpus: that other tasks take.

    Raises:
        MinllamaError: says what there is.
    """
    has = ray.cluster_resources()
    for name, each, others in (("CPU", cpus, other_cpus), ("GPU", gpus, 0)):
        free = has.get(name, 0) - others
        if each * n > free:
            raise MinllamaError(
                f"{n} {workers} of {each:g} {name}s need more than the {free:g} {name}s that Ray "
                f"has for them; give fewer --{workers} or --{worker}-{name.lower()}s"
            )
