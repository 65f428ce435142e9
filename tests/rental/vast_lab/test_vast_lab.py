"""The lab's API, driven by the real vastai package: shapes, limits, queries, pages, keys."""

import time

import pytest
from vast_lab_helpers import buy, call, refused, sdk, until_running
from vast_server import FakeVast


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def lab():
    """The API alone: no processes, quick."""
    offers = [{"dph_base": 0.1 * n, "min_bid": 0.05 * n} for n in (3, 1, 2)]
    with FakeVast(sandboxes=False, offers=offers) as lab:
        yield lab


@pytest.fixture
def vast(lab):
    return sdk(lab)


# --- offers ---


def test_a_search_filters_orders_and_limits_as_the_sdk_asks(lab, vast):
    found = vast.search_offers("gpu_name=RTX_4090 num_gpus=1 dph_total<0.25", order="dph_total")
    assert [row["id"] for row in found] == [102, 103]
    assert [r["id"] for r in vast.search_offers({}, order="dph_total-", limit=2)] == [101, 103]
    lab.add_offer(gpu_name="H100 SXM", reliability=0.9, duration=3600.0, external=True)
    assert vast.search_offers("gpu_name=H100_SXM") == []  # external ones are left out by default
    found = vast.search_offers("gpu_name=H100_SXM external=true reliability>=0.9")
    assert found[0]["reliability"] == 0.9
    assert vast.search_offers("gpu_name=H100_SXM external=true duration>1") == []  # days


@pytest.mark.parametrize(("operator", "value", "ids"), [
    ("eq", 102, [102]), ("neq", 102, [101, 103]), ("gt", 102, [103]), ("gte", 102, [102, 103]),
    ("lt", 102, [101]), ("lte", 102, [101, 102]), ("in", [101, 103], [101, 103]),
    ("notin", [101, 103], [102]),
])  # fmt: skip
def test_every_operator_of_a_query(vast, operator, value, ids):
    assert [row["id"] for row in vast.search_offers({"id": {operator: value}}, order="id")] == ids


@pytest.mark.parametrize("query", [
    "cuda_max_good>=12.4", "disk_space>=100", "inet_down>=500", "inet_up>=500", "rentable=true",
    "verified=true", "geolocation in [Quebec_CA,CA]", "datacenter=false", "gpu_ram>=24",
    "direct_port_count>1", "compute_cap>=800", "cpu_ram>32", "static_ip=true",
    "reliability>0.98", "inet_down_cost<0.01", "min_bid<1", "cuda_vers>=12",
])  # fmt: skip
def test_usual_filters_are_known(vast, query):
    assert isinstance(vast.search_offers(query), list)


def test_an_unknown_field_of_a_query_is_an_error(vast):
    assert refused(vast.search_offers, {"gpu_colour": {"eq": "red"}}) == (400, "invalid_request")


def test_the_price_holds_the_storage_asked_for(vast):
    dear, cheap = (
        vast.search_offers({"id": {"eq": 102}}, storage=gb)[0]["dph_total"] for gb in (72, 5)
    )
    assert dear == pytest.approx(0.1 + 0.15 * 72 / 720)
    assert cheap == pytest.approx(0.1 + 0.15 * 5 / 720)


def test_a_search_for_bids_shows_the_lowest_bid_as_price(vast):
    offer = vast.search_offers({"id": {"eq": 102}}, type="bid", storage=0)[0]
    assert offer["is_bid"] is True
    assert offer["dph_base"] == offer["min_bid"] == 0.05


# --- buying ---


def test_buying_answers_with_contract_and_key_and_takes_the_offer_off_the_market(lab, vast):
    answer = vast.create_instance(102, image="a/b", disk=20, label="x")
    assert answer["success"] is True
    assert isinstance(answer["new_contract"], int)
    assert len(answer["instance_api_key"]) == 64
    assert 102 not in [row["id"] for row in vast.search_offers({})]
    assert refused(vast.create_instance, 102, image="a/b") == (404, "no_such_ask")
    vast.destroy_instance(answer["new_contract"])
    assert 102 in [row["id"] for row in vast.search_offers({})]


def test_an_offer_can_be_gone_though_a_search_still_shows_it(lab, vast):
    lab.change_offer(id=102, refuses=410)
    assert 102 in [row["id"] for row in vast.search_offers({})]
    assert refused(vast.create_instance, 102, image="a/b") == (410, "no_such_ask")
    assert lab.live() == []


def test_a_price_can_rise_between_search_and_purchase_or_on_the_instance(lab, vast):
    lab.change_offer(id=102, dph_base=0.9)
    assert vast.search_offers({"id": {"eq": 102}}, storage=0)[0]["dph_total"] == pytest.approx(0.9)
    lab.behave(price_factor=2.0)
    number = vast.create_instance(103, image="a/b", disk=8)["new_contract"]
    storage = 0.15 * 8 / 720
    assert vast.show_instance(number)["dph_total"] == pytest.approx(2 * 0.2 + storage)


@pytest.mark.parametrize(("request_", "error"), [
    ({"image": None}, "invalid_args"), ({"disk": 5}, "invalid_args"),
    ({"label": "x" * 257}, "invalid_args"), ({"onstart_cmd": "x" * 4097}, "invalid_args"),
    ({"env": {"A": "x" * 257}}, "invalid_args"), ({"bid_price": 0.0001}, "invalid_price"),
])  # fmt: skip
def test_documented_limits_of_a_purchase_hold(lab, vast, request_, error):
    assert refused(vast.create_instance, 102, **{"image": "a/b", **request_}) == (400, error)
    assert lab.live() == []


def test_a_bid_below_the_lowest_waits_or_is_cancelled(lab, vast):
    arguments = {"image": "a/b", "bid_price": 0.01}
    assert refused(vast.create_instance, 102, cancel_unavail=True, **arguments)[0] == 410
    number = vast.create_instance(102, **arguments)["new_contract"]
    row = vast.show_instance(number)
    assert (row["is_bid"], row["actual_status"], row["intended_status"]) == (True, None, "running")
    vast.change_bid(number, 0.06)
    until_running(vast, number)
    assert refused(vast.change_bid, number, 99.0) == (400, "invalid_args")


# --- instances ---


def test_a_row_has_the_documented_fields_and_nulls_before_it_runs(lab, vast):
    lab.behave(load_s=0.05)
    number = buy(vast, label="l", env={"A": "1"}, onstart_cmd="true")
    early = vast.show_instance(number)
    assert early["actual_status"] in (None, "loading")
    assert early["ports"] is None
    row = until_running(vast, number)
    types = {
        "id": int, "label": str, "actual_status": str, "intended_status": str, "cur_state": str,
        "next_state": str, "status_msg": str, "ssh_host": str, "public_ipaddr": str, "ports": dict,
        "dph_total": float, "is_bid": bool, "min_bid": float, "machine_id": int,
        "start_date": float, "end_date": float, "disk_space": float, "disk_usage": float,
        "gpu_util": float, "image_runtype": str, "onstart": str, "gpu_name": str,
        "storage_cost": float, "extra_env": dict, "num_gpus": int, "verification": str,
    }  # fmt: skip
    assert {k: type(row[k]) for k in types} == types
    assert row["extra_env"] == {"A": "1"}  # made of a list of pairs by the SDK
    assert list(row["ports"]) == ["22/tcp"]
    raw = vast.show_instances_v1({})["instances"][0]
    assert raw["extra_env"] == [["A", "1"]]


def test_lists_come_in_pages_of_25_at_most(lab, vast):
    for n in range(60):
        lab.add_offer(id=1000 + n, dph_base=0.001)
        vast.create_instance(1000 + n, image="a/b", label=f"run/{n % 2}")
    first = vast.show_instances_v1({"limit": 100})
    assert (first["instances_found"], first["total_instances"]) == (25, 60)
    assert first["label_counts"] == {"run/0": 30, "run/1": 30}
    ids, token = [], None
    while True:
        page = vast.show_instances_v1({"limit": 25} | ({"after_token": token} if token else {}))
        ids += [row["id"] for row in page["instances"]]
        if not (token := page["next_token"]):
            break
    assert len(ids) == len(set(ids)) == 60
    assert len(vast.show_instances()) == 60
    assert len(vast.show_instances_v1({"limit": 0})["instances"]) == 5
    newest = vast.show_instances_v1({"order_by": [{"col": "id", "dir": "desc"}], "limit": 1})
    assert newest["instances"][0]["id"] == max(ids)
    columns = vast.show_instances_v1({"select_cols": ["id", "nothing"], "limit": 1})["instances"]
    assert columns == [{"id": min(ids), "nothing": None}]


def test_lists_filter_by_stored_columns_only(lab, vast):
    numbers = [buy(vast, label=label) for label in ("a", "b")]
    until_running(vast, numbers[1])
    for filters, expected in [
        ({"label": {"eq": "a"}}, numbers[:1]), ({"id": {"in": numbers}}, numbers),
        ({"actual_status": {"eq": "stopped"}}, []), ({"label": {"in": ["b"]}}, numbers[1:]),
    ]:  # fmt: skip
        rows = vast.show_instances_v1({"select_filters": filters})["instances"]
        assert [row["id"] for row in rows] == expected
    for bad in ({"select_filters": {"dph_total": {"lte": 1}}}, {"order_by": [{"col": "num_gpus"}]}):
        assert refused(vast.show_instances_v1, bad) == (400, "invalid_request")
    assert refused(vast.show_instances_v1, {"after_token": "?"}) == (400, "invalid_token")


def test_label_stop_start_and_destroy(lab, vast):
    number = buy(vast, label="old")
    until_running(vast, number)
    vast.label_instance(number, "new")
    vast.stop_instance(number)
    row = vast.show_instance(number)
    assert (row["label"], row["actual_status"], row["intended_status"]) == (
        "new", "stopped", "stopped")  # fmt: skip
    vast.start_instance(number)
    until_running(vast, number)
    assert vast.destroy_instance(number) == {"success": True}
    assert vast.show_instances() == []


def test_an_absent_instance_is_null_or_404_and_a_second_destroy_404(lab, vast):
    number = buy(vast)
    vast.destroy_instance(number)
    assert vast.show_instance(number) is None
    assert refused(vast.destroy_instance, number) == (404, "not_found")
    assert refused(vast.label_instance, number, "x") == (404, "no_such_instance")
    lab.set(absent="404")
    assert refused(vast.show_instance, number)[0] == 404


def test_several_are_destroyed_at_once(lab, vast):
    numbers = [buy(vast), buy(vast)]
    vast.destroy_instances(numbers)
    assert lab.live() == []


def test_a_destroyed_instance_may_linger_in_lists(lab, vast):
    lab.behave(lingers_s=0.4)
    number = buy(vast)
    vast.destroy_instance(number)
    assert vast.show_instance(number)["cur_state"] == "unloaded"
    assert lab.live() == []
    time.sleep(0.45)
    assert vast.show_instance(number) is None


def test_the_old_list_is_gone(lab, vast):
    answer = call(lab, "GET", "/api/v0/instances/", key=lab.api_key)
    assert answer.status_code == 410
    assert answer.json()["error"] == "deprecated_endpoint"


def test_logs_come_by_way_of_a_result_url_once_they_are_there(lab, vast):
    lab.set(logs_ready_s=0.4)
    number = buy(vast)
    began = time.monotonic()
    assert vast.logs(number, tail=10) == ""
    assert time.monotonic() - began > 0.4
    assert refused(vast.logs, 1)[0] == 404


def test_nothing_is_pending(vast):
    assert vast.show_pending_price_increases()["pending_price_increases"] == []
