"""Meeting the other processes of this start of a run, and not what an earlier one has left behind.

torchrun restarts a failed run on the same key-value store (torch 2.11 to 2.13, `TORCH_DISABLE_SHARE_RDZV_TCP_STORE`
unset), where the addresses of dead processes still stand; and the nodes count restarts differently. So the first rank
collects a name that each process has made up, and says who is in; only when everyone has found its own name in that
list do they go on, under a prefix of their own.
"""

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_PAUSE = 0.05  # seconds between two looks


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """A store that only the processes of this start use, this one's rank, and how many there are.

    Raises ValueError where the environment lacks what torchrun sets, TimeoutError where others don't come.
    """
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    meeting = _convene(store, size, timeout) if rank == 0 else _attend(store, rank, timeout)
    return PrefixStore(f"run/{meeting}", store), rank, size


def _convene(store: Store, size: int, timeout: timedelta) -> str:
    """The first rank's part: say who is in until all the others have agreed."""
    deadline = time.monotonic() + timeout.total_seconds()
    names: dict[str, str] = {}
    while time.monotonic() < deadline:
        present = {str(r): store.get(f"here/{r}").decode() for r in range(1, size) if store.check([f"here/{r}"])}
        if len(present) == size - 1 and present != names:
            names, meeting = present, uuid.uuid4().hex
            store.set("meeting", json.dumps({"id": meeting, "names": names}))
        if names and store.add(f"agreed/{meeting}", 0) == size - 1:
            store.set(f"begin/{meeting}", "")
            return meeting
        time.sleep(_PAUSE)
    missing = [r for r in range(1, size) if str(r) not in present]
    raise TimeoutError(f"ranks {missing or 'unknown'} did not come within {timeout}")


def _attend(store: Store, rank: int, timeout: timedelta) -> str:
    """Another rank's part: say that it is here, and agree to a list that has it."""
    deadline, name, agreed = time.monotonic() + timeout.total_seconds(), uuid.uuid4().hex, ""
    store.set(f"here/{rank}", name)
    while time.monotonic() < deadline:
        meeting = json.loads(store.get("meeting")) if store.check(["meeting"]) else {"id": "", "names": {}}
        if meeting["names"].get(str(rank)) == name and meeting["id"] != agreed:
            agreed = meeting["id"]
            store.add(f"agreed/{agreed}", 1)
        if agreed and store.check([f"begin/{agreed}"]):
            return agreed
        time.sleep(_PAUSE)
    raise TimeoutError(f"rank 0 did not come within {timeout}")
