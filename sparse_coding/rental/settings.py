"""The constants of vastai_utils.py."""

from dataclasses import dataclass

from sparse_coding.config import require_flag


@dataclass(frozen=True)
class Config:
    # the machine
    gpu_names: tuple[str, ...] = ("RTX 3090", "RTX 4090")  # as vast.ai writes them: any of these
    n_gpus: int = 1  # of one machine
    disk_gb: float = 30.0  # of one machine; fixed for its life, and billed for all of it
    image: str = "pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime"  # of torch as requirements.txt
    image_gb: float = 4.0  # of the image, packed: some hosts bill its traffic
    min_cuda: float = 12.6  # CUDA that the driver must know: that of the image
    min_reliability: float = 0.98  # of the host, as vast.ai measures it
    min_inet_mbps: float = 100.0  # downwards, in Mbit/s
    need_gpu: bool = True  # refuse a machine whose torch computes on no GPU
    interruptible: bool = False  # bid for machines that may be taken away; cheaper

    # money, in dollars: what may be spent has no default
    max_dph: float | None = None  # per hour and machine, disk included
    max_total: float | None = None  # of the whole run, the worst case counted
    max_hours: float = 2.0  # after which a machine ends itself
    hours: float = 0.5  # that a machine is expected to take: for the expected price only
    results_gb: float = 0.5  # that are fetched from one machine: for the price only
    yes: bool = False  # accept the price without being asked
    dry_run: bool = False  # everything up to the purchase

    # the run
    run: str = ""  # its name; default: made from the command, or the newest of rentals/
    instances: int = 1  # machines, one shard on each
    shard: int = 0  # that a command is for, from 1; 0: all
    send_env: tuple[str, ...] = ()  # names of secrets (HF_TOKEN, ...) to send over ssh; see README
    ssh_key: str = "rentals/id_ed25519"  # made when there is none
    follow: bool = False  # logs: go on
    discard: bool = False  # destroy: without fetching first
    all: bool = False  # reap: every machine of ours, whatever its run and deadline

    # patience: a machine that takes longer is given up, and another one is rented
    start_minutes: float = 15.0  # until it is listed and has loaded its image, each
    lost_minutes: float = 5.0  # in which it runs but can't be reached, or is exited or offline
    attempts: int = 3  # machines per shard that may fail
    pull_minutes: float = 5.0  # between two fetches of checkpoints
    poll_seconds: float = 10.0  # between two looks at the machines
    api_spacing: float = 1.0  # times the intervals that vast.ai documents; 0 on loopback

    def check(self) -> None:
        """Raises UserError for a constant out of its range."""
        for name in ("n_gpus", "instances", "attempts"):
            require_flag(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_hours", "hours", "poll_seconds"):
            require_flag(self, name, getattr(self, name) > 0, "above 0")
        for name in ("max_dph", "max_total"):
            value = getattr(self, name)
            require_flag(self, name, value is None or value > 0, "above 0")
        require_flag(self, "disk_gb", self.disk_gb >= 8, "at least 8, the least that vast.ai rents")
        require_flag(self, "shard", self.shard >= 0, "from 1, or 0 for all")
        require_flag(self, "api_spacing", self.api_spacing >= 0, "at least 0")
