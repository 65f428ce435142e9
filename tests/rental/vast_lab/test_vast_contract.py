"""What the vastai package sends, against what the service documents: names and types of keys.

The tables are facts transcribed by hand from the service's OpenAPI pages of August 2026; where the
package sends what they do not document, the difference is pinned, so that a new release of either
shows up here.
"""

import json
import re

import pytest
from vast_lab_helpers import sdk
from vast_server import FakeVast

NUMBER = (int, float)
FILTERS = set(
    re.findall(
        r"\w+",
        """
    verified rentable rented gpu_name reliability num_gpus gpu_ram duration machine_id
    dlperf_per_dphtotal dph_total flops_per_dphtotal geolocation gpu_arch dlperf cuda_max_good
    inet_down inet_up inet_down_cost inet_up_cost driver_version compute_cap cpu_arch has_avx
    cpu_cores cpu_cores_effective cpu_ghz cpu_ram datacenter external disk_bw disk_space bw_nvlink
    gpu_max_power gpu_max_temp gpu_mem_bw gpu_total_ram gpu_frac gpu_display_active
    direct_port_count host_id id min_bid mobo_name pci_gen pcie_bw storage_cost static_ip
    total_flops os_version ubuntu_version verification vms_enabled
""",
    )
)
OPERATORS = {"eq", "neq", "gt", "lt", "gte", "lte", "in", "notin"}
SEARCH = {"limit": int, "type": str, "order": list, "allocated_storage": NUMBER}
TYPES = {"ondemand", "on-demand", "bid", "reserved"}
CREATE = {
    "image": str, "template_hash_id": str, "label": str, "disk": NUMBER, "runtype": str,
    "target_state": str, "price": NUMBER, "env": (dict, str), "cancel_unavail": bool, "vm": bool,
    "onstart": str, "args": list, "args_str": str, "use_jupyter_lab": bool, "jupyter_dir": str,
    "python_utf8": bool, "lang_utf8": bool, "force": bool, "user": str, "image_login": str,
    "volume_info": dict,
}  # fmt: skip
LIST = {"limit", "after_token", "order_by", "select_cols", "select_filters"}
# Documented with one spelling, sent with another; a server that went by its documents would choke.
UNDOCUMENTED = {"create": {"client_id", "extra"}, "show": {"owner"}}
RUNTYPES = {"ssh", "jupyter", "args", "ssh_proxy", "ssh_direct", "jupyter_proxy", "jupyter_direct"}
SENT_RUNTYPE = "ssh_direc ssh_proxy"  # not among RUNTYPES, nor is ssh_direc a word of theirs


@pytest.fixture
def sent(monkeypatch):
    """Calls the SDK against the lab and returns the request that arrived."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeVast(sandboxes=False, offers=[{}]) as lab:
        vast = sdk(lab)

        def call(name: str, *args, **kwargs) -> dict:
            getattr(vast, name)(*args, **kwargs)
            entry = lab.requests()[-1]
            return entry | {"body": json.loads(entry["body"]) if entry["body"] else None}

        yield call


@pytest.mark.parametrize("query", [
    "gpu_name=RTX_4090 num_gpus=1 reliability>0.98 duration>=1 disk_space>=20 cuda_max_good>=12.4",
    {"gpu_name": {"in": ["RTX 4090", "RTX 3090"]}, "inet_down": {"gte": 100}, "dph_total":
     {"lte": 0.5}},
])  # fmt: skip
def test_a_search_sends_documented_filters_only(sent, query):
    request = sent("search_offers", query, type="bid", order="dph_total", limit=5, storage=20.0)
    body = request["body"]
    assert (request["method"], request["path"]) == ("POST", "/api/v0/bundles/")
    for name, value in body.items():
        if name in SEARCH:
            assert isinstance(value, SEARCH[name])
        else:
            assert name in FILTERS
            assert set(value) <= OPERATORS
    assert body["type"] in TYPES
    assert body["order"] == [["dph_total", "asc"]]
    assert {"verified", "rentable", "external"} <= set(body)


def test_a_string_query_sends_numbers_as_strings_and_a_dict_raw_values(sent):
    body = sent("search_offers", "num_gpus=1 duration>=2 gpu_ram>=24 gpu_name=RTX_4090")["body"]
    assert body["num_gpus"] == {"eq": "1"}
    assert body["duration"] == {"gte": 2 * 86400.0}  # days to seconds
    assert body["gpu_ram"] == {"gte": 24_000.0}  # GB to MB
    assert body["gpu_name"] == {"eq": "RTX 4090"}
    assert body["allocated_storage"] == 5.0  # priced for 5 GB unless told
    assert "rented" not in body
    body = sent("search_offers", {"duration": {"gte": 2}})["body"]
    assert body["duration"] == {"gte": 2}
    assert body["rented"] == {"eq": False}  # a default of dict queries only
    assert body["order"] == [["score", "desc"]]


def test_a_purchase_sends_documented_keys_but_for_two(sent):
    request = sent(
        "create_instance", 101, image="a/b", disk=20, label="x", env={"A": "1"}, onstart_cmd="true",
        ssh=True, direct=True, cancel_unavail=True, bid_price=0.2,
    )  # fmt: skip
    assert (request["method"], request["path"]) == ("PUT", "/api/v0/asks/101/")
    body = {name: value for name, value in request["body"].items() if value is not None}
    assert set(request["body"]) - set(CREATE) == UNDOCUMENTED["create"]
    for name in set(body) & set(CREATE):
        assert isinstance(body[name], CREATE[name]), name
    assert (body["price"], body["onstart"], body["env"]) == (0.2, "true", {"A": "1"})
    assert body["runtype"] == SENT_RUNTYPE
    assert SENT_RUNTYPE not in RUNTYPES
    assert len(body["label"]) <= 256


def test_an_on_demand_purchase_sends_no_price(sent):
    assert sent("create_instance", 101, image="a/b")["body"]["price"] is None


def test_the_list_sends_documented_parameters_as_json(sent):
    order = [{"col": "id", "dir": "asc"}]
    params = {"select_filters": {"label": {"eq": "x/y=1"}}, "order_by": order, "limit": 25}
    request = sent("show_instances_v1", params)
    assert (request["method"], request["path"]) == ("GET", "/api/v1/instances/")
    assert set(request["query"]) <= LIST
    assert json.loads(request["query"]["select_filters"]) == {"label": {"eq": "x/y=1"}}
    assert sent("show_instances")["path"] == "/api/v1/instances/"


@pytest.mark.parametrize(("name", "args", "method", "path", "body"), [
    ("show_instance", (1001,), "GET", r"/api/v0/instances/1001/", None),
    ("destroy_instance", (1001,), "DELETE", r"/api/v0/instances/1001/", {}),
    ("stop_instance", (1001,), "PUT", r"/api/v0/instances/1001/", {"state": "stopped"}),
    ("start_instance", (1001,), "PUT", r"/api/v0/instances/1001/", {"state": "running"}),
    ("label_instance", (1001, "x"), "PUT", r"/api/v0/instances/1001/", {"label": "x"}),
    ("logs", (1001,), "PUT", r"/api/v0/instances/request_logs/1001/", {}),
    ("show_ssh_keys", (), "GET", r"/api/v0/ssh/", None),
    ("create_ssh_key", ("ssh-rsa A",), "POST", r"/api/v0/ssh/", {"ssh_key": "ssh-rsa A"}),
    ("attach_ssh", (1001, "ssh-rsa A"), "POST", r"/api/v0/instances/1001/ssh/",
     {"ssh_key": "ssh-rsa A"}),
    ("change_bid", (1001, 0.3), "PUT", r"/api/v0/instances/bid_price/1001/",
     {"client_id": "me", "price": 0.3}),
    ("show_user", (), "GET", r"/api/v0/users/current/?", None),
])  # fmt: skip
def test_the_other_calls_send_what_is_documented(sent, name, args, method, path, body):
    sent("create_instance", 101, image="a/b", bid_price=0.2)
    request = sent(name, *args)
    assert request["method"] == method
    assert re.fullmatch(path, request["path"])
    assert request["body"] == body
    assert set(request["query"]) <= UNDOCUMENTED["show"]


def test_charges_ask_for_days_and_a_format(sent):
    request = sent("show_invoices_v1", charges=True, start_date="2026-08-01", end_date="2026-08-02")
    assert request["path"] == "/api/v0/charges/"
    assert set(request["query"]) == {"select_filters", "latest_first", "limit", "format"}
    day = json.loads(request["query"]["select_filters"])["day"]
    assert day == {"gte": 1785542400, "lte": 1785628800}
