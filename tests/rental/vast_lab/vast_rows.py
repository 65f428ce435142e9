"""Rows as the service shows them: offers, instances and charges, with the real ones' nulls."""

from vast_ledger import storage_per_hour
from vast_rental import Rental

DAY = 86400.0
DEAD_PORT = 1  # nobody listens there

# An offer as a test may leave it; everything that a query may name is here. MB, seconds, $/hour.
OFFER = {
    "bundle_id": 1, "bundled_results": None, "bw_nvlink": 0.0, "compute_cap": 890,
    "cpu_arch": "amd64", "cpu_cores": 32, "cpu_cores_effective": 16.0, "cpu_ghz": 3.0,
    "cpu_name": "Lab CPU", "cpu_ram": 64000, "credit_discount_max": 0.1, "cuda_max_good": 12.8,
    "direct_port_count": 100, "disk_bw": 2000.0, "disk_name": "lab disk", "disk_space": 500.0,
    "dlperf": 80.0, "dph_base": 0.36, "driver_version": "570.86.15", "driver_vers": 570086015,
    "duration": 30 * DAY, "end_date": None, "external": None, "geolocation": "Quebec, CA",
    "geolocode": 1, "gpu_arch": "nvidia", "gpu_display_active": False, "gpu_frac": 1.0,
    "gpu_lanes": 16, "gpu_max_power": 450.0, "gpu_max_temp": 90.0, "gpu_mem_bw": 1000.0,
    "gpu_name": "RTX 4090", "gpu_ram": 24564, "gpu_total_ram": 24564, "has_avx": 1, "host_id": 7,
    "hosting_type": 0, "hostname": None, "inet_down": 800.0, "inet_down_cost": 0.003,
    "inet_up": 600.0, "inet_up_cost": 0.004, "is_bid": False, "logo": "", "min_bid": 0.18,
    "mobo_name": "lab board", "num_gpus": 1, "os_version": "22.04", "ubuntu_version": "22.04",
    "pci_gen": 4.0, "pcie_bw": 24.0, "public_ipaddr": "127.0.0.1", "reliability": 0.995,
    "reliability2": 0.995, "rentable": True, "rented": False, "static_ip": True,
    "storage_cost": 0.15, "total_flops": 82.0, "verification": "verified", "vericode": 1,
    "vms_enabled": False, "webpage": None, "cluster_id": None, "time_remaining": "",
    "time_remaining_isbid": "", "resource_type": "gpu",
}  # fmt: skip

# What the lab keeps beside an offer and never shows.
HIDDEN = {
    "sales": 1,  # how often the offer can be bought; from the second on the instance hangs
    "second_stuck": True,
    "refuses": None,  # 404 or 410: still shown by a search, but gone when it is bought
    "stopped_storage_factor": 1.0,
    "behaviour": None,  # fields of Behaviour
}
COMPUTED = {"dph_total", "storage_total_cost", "dlperf_per_dphtotal", "flops_per_dphtotal", "score",
            "ask_contract_id", "verified", "datacenter", "id", "machine_id"}  # fmt: skip
SEARCHABLE = set(OFFER) | COMPUTED

# Columns stored on the contract itself: only they can be filtered and ordered by.
INSTANCE_SEARCHABLE = {
    "id", "label", "actual_status", "intended_status", "cur_state", "next_state", "gpu_name",
    "machine_id", "host_id", "verification", "start_date", "end_date", "image_uuid", "is_bid",
}  # fmt: skip
# Fields of the offer that an instance shows too.
COPIED = (
    "cpu_arch", "cpu_cores", "cpu_cores_effective", "cpu_name", "cpu_ram", "gpu_name", "gpu_arch",
    "gpu_ram", "gpu_frac", "gpu_lanes", "gpu_mem_bw", "bw_nvlink", "disk_name", "disk_bw",
    "direct_port_count", "static_ip", "geolocation", "verification", "host_id", "min_bid",
    "total_flops", "mobo_name", "pci_gen", "pcie_bw", "num_gpus", "webpage", "machine_id",
    "storage_cost", "inet_up", "inet_down", "inet_up_cost", "inet_down_cost", "reliability2",
    "hosting_type", "cuda_max_good", "driver_version", "bundle_id",
)  # fmt: skip


def new_offer(number: int, **fields) -> dict:
    """An offer as the lab keeps it: the service's fields and HIDDEN ones, nothing else."""
    known = {"id", "machine_id", *OFFER, *HIDDEN}
    if unknown := set(fields) - known:
        raise ValueError(f"offers have no {', '.join(sorted(unknown))}")
    return {"id": number, "machine_id": 10_000 + number, **OFFER, **HIDDEN, **fields}


def priced(offer: dict, storage_gb: float, kind: str) -> dict:
    """The row of a search: prices for this disk, on demand or as the lowest bid."""
    row = {name: value for name, value in offer.items() if name not in HIDDEN}
    base = offer["min_bid"] if kind == "bid" else offer["dph_base"]
    disk = storage_per_hour(offer["storage_cost"], storage_gb)
    total = base + disk
    return row | {
        "ask_contract_id": offer["id"], "dph_base": base, "dph_total": total,
        "storage_total_cost": disk, "dlperf_per_dphtotal": offer["dlperf"] / total,
        "flops_per_dphtotal": offer["total_flops"] / total, "score": offer["dlperf"] / total,
        "verified": offer["verification"] == "verified", "datacenter": offer["hosting_type"] == 1,
        "is_bid": kind == "bid", "search": hourly(base, disk), "instance": hourly(0.0, disk),
    }  # fmt: skip


def hourly(gpu: float, disk: float) -> dict[str, float]:
    """The nested price table of offers and instances."""
    return {"gpuCostPerHour": gpu, "diskHour": disk, "totalHour": gpu + disk,
            "discountTotalHour": 0, "discountedTotalPerHour": gpu + disk}  # fmt: skip


def instance_row(rental: Rental, now: float) -> dict:
    """The row of a contract."""
    offer, request = rental.offer, rental.request
    disk = storage_per_hour(offer["storage_cost"], rental.disk_gb)
    up = rental.status == "running"
    gpu = rental.gpu_per_h
    return {name: offer[name] for name in COPIED} | {
        "id": rental.number, "label": rental.shown_label(now),
        "actual_status": rental.status, "intended_status": rental.intended,
        "cur_state": rental.contract_state, "next_state": rental.intended,
        "status_msg": rental.message(), "is_bid": rental.bid is not None,
        "image_uuid": request.get("image"), "image_args": request.get("args") or [],
        "image_runtype": request.get("runtype") or "ssh_proxy", "onstart": request.get("onstart"),
        "extra_env": [[k, str(v)] for k, v in rental.env.items()], "jupyter_token": "lab",
        "template_id": None, "template_hash_id": request.get("template_hash_id"),
        "template_name": None, "public_ipaddr": "127.0.0.1" if rental.status else None,
        "local_ipaddrs": "127.0.0.1", "ssh_host": "127.0.0.1", "ssh_idx": "1",
        "ssh_port": (rental.port if rental.fate.proxy else DEAD_PORT) or None,
        "machine_dir_ssh_port": rental.port or None, "direct_port_start": -1, "direct_port_end": -1,
        "ports": rental.ports(), "start_date": rental.created, "end_date": rental.end_date,
        "uptime_mins": (now - rental.since) / 60 if up else None,
        "duration": max(0.0, rental.end_date - now), "cpu_util": 0.0,
        "gpu_util": 0.0 if up else None,
        "gpu_temp": 40.0 if up else None, "gpu_totalram": offer["gpu_total_ram"],
        "mem_limit": 64.0 if up else None, "mem_usage": 1.0 if up else None, "vmem_usage": None,
        "disk_space": rental.disk_gb, "disk_util": -1.0, "disk_usage": 0.1 if up else -1.0,
        "dph_base": gpu, "dph_total": gpu + disk, "search": hourly(gpu, disk),
        "instance": hourly(gpu if up else 0.0, disk), "storage_total_cost": disk, "dlperf": None,
        "dlperf_per_dphtotal": None, "flops_per_dphtotal": offer["total_flops"] / (gpu + disk),
        "score": None, "os_version": None, "rentable": True, "vram_costperhour": 0.0,
        "credit_balance": None, "credit_discount": None, "credit_discount_max": 0.1,
        "client_run_time": 1.0, "host_run_time": 30 * DAY, "external": False, "time_remaining": "",
        "time_remaining_isbid": "", "country_code": None, "volume_info": [],
    }  # fmt: skip


def charge_row(entry: dict, now: float) -> dict:
    """A contract's row of GET /api/v0/charges/, of a row of Ledger.entries()."""
    start, end = int(entry["created"]), int(entry["ended"] or now)
    days = max(1, round((end - start) / DAY))
    items = [
        {"start": start, "end": end, "type": kind, "source": None, "description": kind,
         "amount": round(entry[kind], 3), "metadata": {}, "items": []}
        for kind in ("gpu", "disk", "bwd", "bwu")
    ]  # fmt: skip
    return {
        "start": start, "end": end, "type": "instance", "source": f"instance-{entry['id']}",
        "description": f"Instance {entry['id']} Charges - {days} days",
        "amount": round(entry["total"], 3),
        "metadata": {} if entry["label"] is None else {"label": entry["label"]}, "items": items,
    }  # fmt: skip
