"""The state of one contract; vast_market.Market changes it, vast_rows shows it."""

import secrets
import threading
import time

from vast_behaviour import Behaviour
from vast_instance import Sandbox


class Rental:
    """One contract, from creation to its end."""

    def __init__(self, number: int, offer: dict, request: dict, behaviour: Behaviour):
        self.number, self.offer, self.request, self.fate = number, offer, request, behaviour
        self.created, self.key = time.time(), secrets.token_hex(32)
        self.label, self.bid = request.get("label"), request.get("price")
        self.disk_gb = float(request.get("disk") or 8)
        self.env = dict(request.get("env") or {})
        self.gpu_per_h = (self.bid or offer["dph_base"]) * behaviour.price_factor
        contract_s = behaviour.ends_after_s or offer["duration"]
        self.end_date = self.created + contract_s
        self.status, self.intended, self.contract_state = None, "running", "running"
        self.since, self.port, self.starts = self.created, 0, 0
        self.turn = 0  # counts changes from outside; timers of earlier turns are void
        self.gone, self.ended = False, 0.0
        self.keys: list[str] = []  # attached to this instance
        self.box: Sandbox | None = None
        self.box_lock = threading.RLock()

    def listed(self, now: float) -> bool:
        """Whether lists show it: late after creation, or still after the end, if so ordered."""
        if self.gone:
            return now < self.ended + self.fate.lingers_s
        return now >= self.created + self.fate.listed_after_s

    def shown_label(self, now: float) -> str | None:
        return self.label if now >= self.created + self.fate.label_after_s else None

    def ports(self) -> dict | None:
        """The direct ports: of a running container that was asked and able to have any."""
        asked = "direc" in (self.request.get("runtype") or "")
        if self.status != "running" or not asked or not self.fate.direct:
            return None
        return {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(self.port)}]}

    def message(self) -> str | None:
        """status_msg as the service words it."""
        image = self.request.get("image")
        return {
            None: None, "loading": f"pulling image {image}",
            "running": f"success, running {image}/ssh", "exited": "error: container exited (1)",
        }.get(self.status, self.status)  # fmt: skip
