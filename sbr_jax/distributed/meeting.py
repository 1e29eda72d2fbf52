"""Finds where the processes of a job meet: from the user or from the machine.

``off`` is one process. ``HOST:PORT,N,I`` is process I of N, and process 0 listens at
HOST:PORT. ``auto`` asks Cloud TPU and SLURM, and is one process if neither has more.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from sbr_jax.typing import UserError

PORT = 8476
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
CHIPS = ("/dev/accel0", "/dev/vfio/0")
_EXPLICIT = re.compile(r"(\[[^]]+\]|[^:,\s]+):(\d{1,5}),(\d+),(\d+)")


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where processes meet, how many there are, and which one this is.

    Attributes:
      host: the host of process 0.
      port: the port at which process 0 listens.
      count: number of processes.
      index: index of this one.
      names: names of the hosts by process, if known.
    """

    host: str
    port: int
    count: int
    index: int
    names: tuple[str, ...] = ()

    def name(self, index: int) -> str:
        """A name for a process that has not arrived yet."""
        known = f" ({self.names[index]})" if index < len(self.names) else ""
        return f"process {index}{known}"


def find(option: str) -> Meeting | None:
    """The meeting that ``--distributed`` names; None for a single process.

    >>> find("off"), find("tpu-0:8476,1,0")
    (None, None)
    >>> found = find("10.0.0.2:8476,4,3")
    >>> found.host, found.port, found.count, found.index
    ('10.0.0.2', 8476, 4, 3)
    >>> find("10.0.0.2:8476,4,4")
    Traceback (most recent call last):
    sbr_jax.typing.UserError: --distributed 10.0.0.2:8476,4,4: expected a process from \
0 to 3, got 4
    """
    if option == "off":
        return None
    found = _found(os.environ) if option == "auto" else _said(option)
    if found is None or found.count == 1:
        return None
    if not 0 <= found.index < found.count:
        raise UserError(
            f"--distributed {option}: expected a process from 0 to {found.count - 1}, "
            f"got {found.index}"
        )
    return found


def _said(option: str) -> Meeting:
    match = _EXPLICIT.fullmatch(option)
    if match is None or int(match[2]) > 65535 or int(match[3]) < 1:
        raise UserError(
            f"--distributed {option}: expected auto, off or HOST:PORT,N,I such as "
            f"10.0.0.2:{PORT},4,0 (process 0 of 4, which listens at 10.0.0.2)"
        )
    host = match[1].strip("[]")
    return Meeting(host, int(match[2]), int(match[3]), int(match[4]))


def _found(environment: Mapping[str, str]) -> Meeting | None:
    if environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        raise UserError(
            "--distributed auto: expected one slice, found "
            f"{environment['MEGASCALE_NUM_SLICES']}: say --distributed HOST:PORT,N,I"
        )
    return _of_variables(environment) or _of_metadata() or slurm(environment)


def _of_variables(environment: Mapping[str, str]) -> Meeting | None:
    """The workers of a TPU slice under Kubernetes."""
    names = environment.get("TPU_WORKER_HOSTNAMES", "")
    index = environment.get("TPU_WORKER_ID", "")
    if not names or not index.isdigit():
        return None
    hosts = tuple(names.split(","))
    return Meeting(hosts[0], PORT, len(hosts), int(index), hosts)


def _of_metadata() -> Meeting | None:
    """The workers of a TPU slice of virtual machines, from the metadata server."""
    if not any(Path(chip).exists() for chip in CHIPS):
        return None
    try:
        index, workers = map(
            _attribute, ("agent-worker-number", "worker-network-endpoints")
        )
    except OSError:  # Not a Cloud TPU.
        return None
    hosts = tuple(worker.split(":")[2] for worker in workers.split(","))
    return Meeting(hosts[0], PORT, len(hosts), int(index), hosts)


def _attribute(name: str) -> str:
    import urllib.request  # Slow to load and rarely needed.

    asked = urllib.request.Request(
        METADATA + name, headers={"Metadata-Flavor": "Google"}
    )
    with urllib.request.urlopen(asked, timeout=5) as answer:
        return answer.read().decode()


def slurm(environment: Mapping[str, str]) -> Meeting | None:
    """The tasks of a SLURM step; the port depends on the job, so two do not clash.

    >>> found = slurm({"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[03-04,9],x",
    ...                "SLURM_NTASKS": "4", "SLURM_PROCID": "2"})
    >>> found.host, found.count, found.index
    ('gpu03', 4, 2)
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if not all(environment.get(name) for name in names):
        return None
    job, nodes, count, index = (environment[name] for name in names)
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    host = "".join(part or "" for part in first.groups()) if first else nodes
    return Meeting(host, 61440 + int(job) % 4096, int(count), int(index))
