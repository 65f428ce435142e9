"""What the commands of vastai_utils.py are told."""

from typing import Protocol


class Settings(Protocol):
    """The fields of vastai_utils.py's Config, where each has its meaning and default."""

    gpu_names: tuple[str, ...]
    n_gpus: int
    disk_gb: float
    image: str
    image_gb: float
    min_cuda: float
    min_reliability: float
    min_inet_mbps: float
    need_gpu: bool
    interruptible: bool
    max_dph: float | None
    max_total: float | None
    max_hours: float
    hours: float
    results_gb: float
    yes: bool
    dry_run: bool
    run: str
    instances: int
    shard: int
    send_env: tuple[str, ...]
    ssh_key: str
    follow: bool
    discard: bool
    all: bool
    start_minutes: float
    lost_minutes: float
    attempts: int
    pull_minutes: float
    poll_seconds: float
    api_spacing: float
