"""Coordinates several processes of one job: meeting, decisions and stopping.

Only process 0 decides, writes and prints. A single process passes through all of this
at no cost; nothing here loads JAX before there are other processes.
"""

from sbr_jax.distributed.agreement import current as current
from sbr_jax.distributed.agreement import decide as decide
from sbr_jax.distributed.agreement import is_first as is_first
from sbr_jax.distributed.agreement import joined as joined
from sbr_jax.distributed.agreement import open_log as open_log
from sbr_jax.distributed.agreement import require_same as require_same
from sbr_jax.distributed.agreement import should_stop as should_stop
from sbr_jax.distributed.errors import Ended as Ended
from sbr_jax.distributed.errors import Lost as Lost
from sbr_jax.distributed.errors import Terminated as Terminated
