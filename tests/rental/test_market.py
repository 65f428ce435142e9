"""The market, against a server that speaks the documented API."""

import json
import math
import re
import time

import pytest
from builders.vast.server import FakeVast

from sparse_coding.config import UserError
from sparse_coding.rental.market import (
    INTERVALS,
    BadAnswer,
    Instance,
    Label,
    Market,
    Offer,
    Refused,
    Unavailable,
)

pytest.importorskip("vastai")
OFFERS = [{"gpu_name": "RTX 3090", "dph_base": price} for price in (0.3, 0.1, 0.2)]
OFFER = {"id": 5, "machine_id": 7, "gpu_name": "RTX 3090", "num_gpus": 1, "dph_total": 0.25,
         "storage_cost": 0.36, "inet_up_cost": 0.02, "inet_down_cost": 0.01, "min_bid": 0.1,
         "duration": 86400 * 3}  # fmt: skip
ON_DEMAND = dict(disk_gb=40, interruptible=False)


@pytest.fixture
def lab(monkeypatch, tmp_path):
    with FakeVast(tmp_path / "lab", offers=OFFERS, sandboxes=False) as lab:
        monkeypatch.setenv("VAST_URL", lab.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("sparse_coding.rental.market.TIMEOUT", 0.5)
        monkeypatch.setattr("sparse_coding.rental.market.TRIES", 4)
        yield lab


@pytest.fixture
def market(lab) -> Market:
    return Market(lab.api_key, spacing=0.0)


def buy(market: Market, label: str = "sae1/run/1/a1/exp=9") -> int | None:
    offer = market.offers({}, **ON_DEMAND)[0]
    return market.buy(offer, image="image", disk_gb=20, label=label, onstart="true")


# --- labels, offers, instances ---


def test_a_label_is_read_back_as_it_was_written():
    label = Label("replicate-1a2b", 3, 2, 1790000000)
    assert str(label) == "sae1/replicate-1a2b/3/a2/exp=1790000000"
    assert Label.parse(str(label)) == label


@pytest.mark.parametrize("text", [None, "", "mine", "sae1/x", "sae2/x/1/a1/exp=1", "sae1/x/1/a1/"])
def test_other_labels_are_none_of_ours(text):
    assert Label.parse(text) is None


def test_the_disk_is_priced_by_the_month_and_taken_out_of_the_total():
    offer = Offer.of_row(OFFER, **ON_DEMAND)
    assert offer.rates.disk == pytest.approx(0.36 * 40 / 720)  # $/GB/month, 30 days
    assert offer.rates.gpu == pytest.approx(0.25 - 0.02)
    assert (offer.rates.hourly, offer.days_left, offer.bid) == (pytest.approx(0.25), 3, 0)


def test_an_interruptible_offer_costs_a_fifth_more_than_the_lowest_bid_and_the_disk():
    offer = Offer.of_row(OFFER, disk_gb=40, interruptible=True)
    assert offer.bid == pytest.approx(1.2 * 0.1)
    assert offer.rates.hourly == pytest.approx(1.2 * 0.1 + 0.02)


@pytest.mark.parametrize("name", ["id", "dph_total", "storage_cost", "inet_up_cost", "gpu_name"])
def test_an_offer_without_its_price_is_refused(name):
    with pytest.raises(BadAnswer, match=name):
        Offer.of_row({k: v for k, v in OFFER.items() if k != name}, **ON_DEMAND)


def test_an_instance_of_nulls_is_one_that_is_being_made():
    instance = Instance.of_row({"id": 3, "label": None, "actual_status": None, "ports": None})
    assert (instance.status, instance.endpoints, instance.label) == ("created", (), None)


def test_ssh_is_tried_directly_first_then_through_the_proxy():
    row = {"id": 3, "public_ipaddr": " 1.2.3.4", "ports": {"22/tcp": [{"HostPort": "40022"}]},
           "ssh_host": "ssh5.vast.ai", "ssh_port": 10022}  # fmt: skip
    assert Instance.of_row(row).endpoints == (("1.2.3.4", 40022), ("ssh5.vast.ai", 10022))


ROW = {"id": 3, "label": "sae1/run/1/a1/exp=9", "actual_status": "running"}
DIRECT = {"public_ipaddr": "1.2.3.4", "ports": {"22/tcp": [{"HostPort": "40022"}]}}


@pytest.mark.parametrize("host", [
    "1.2.3.4\n  ProxyCommand touch /tmp/x", "1.2.3.4\nHost *", "-oProxyCommand=x", "%h", "a b",
    '"', "a;b", "$(x)", "é.de", 300 * "a", ["1.2.3.4"], {"a": 1}, 7.5, True, "", "::1 x",
])  # fmt: skip
def test_what_is_no_address_never_gets_to_ssh(host, tmp_path):
    for row in ({**DIRECT, "public_ipaddr": host}, {"ssh_host": host, "ssh_port": 22}):
        endpoints = Instance.of_row(ROW | row).endpoints
        assert [h for h, _ in endpoints if not re.fullmatch(r"[A-Za-z0-9.]+", h)] == []


@pytest.mark.parametrize("port", ["22\n  ProxyCommand x", "-1", 0, 65536, "٢٢", 22.5, [22], "0x16"])
def test_what_is_no_port_never_gets_to_ssh(port):
    mapped = {"public_ipaddr": "1.2.3.4", "ports": {"22/tcp": [{"HostPort": port}]}}
    for row in (mapped, {"ssh_host": "a.b", "ssh_port": port}):
        assert Instance.of_row(ROW | row).endpoints == ()


@pytest.mark.parametrize("ports", [[], "x", 7, {"22/tcp": "x"}, {"22/tcp": []}, {"22/tcp": [None]}])
def test_an_odd_list_of_ports_hides_no_instance(ports):
    row = ROW | DIRECT | {"ports": ports, "ssh_host": "::1", "ssh_port": 22}
    assert Instance.of_row(row | {"ssh_host": "a.b"}).endpoints == (("a.b", 22),)


@pytest.mark.parametrize("label", [
    "sae1/../1/a1/exp=9", "sae1/./1/a1/exp=9", "sae1/.x/1/a1/exp=9", "sae1/a\n/1/a1/exp=9",
    "sae1/x/99999/a1/exp=9", "sae1/x/1/a1/exp=" + 5000 * "9", "sae1/x/٣/a1/exp=9", 7, ["x"],
])  # fmt: skip
def test_a_label_that_names_no_run_is_none_of_ours(label):
    assert Instance.of_row(ROW | {"label": label}).label is None


@pytest.mark.parametrize("price", ["NaN", "x", -1, float("nan"), float("inf"), 10**400, [1], {}],
                         ids=range(8))  # fmt: skip
def test_what_is_no_price_is_none(price):
    assert math.isnan(Instance.of_row(ROW | {"dph_total": price}).dph_total)
    with pytest.raises(BadAnswer):
        Offer.of_row(OFFER | {"dph_total": price}, **ON_DEMAND)


def test_texts_of_the_service_are_one_line_without_control_characters():
    odd = "a\x1b[2J\x07b\r\nc\u202ed" + 900 * "x"
    row = ROW | {"status_msg": odd, "gpu_name": odd, "actual_status": "running\x1b[2J"}
    instance = Instance.of_row(row)
    assert instance.status == "unknown"
    offer = Offer.of_row(OFFER | {"gpu_name": odd, "geolocation": odd}, **ON_DEMAND)
    for text in (instance.message, instance.gpu_name, offer.gpu_name, offer.place):
        assert text.startswith("a [2J b c d")
        assert len(text) <= 200


# --- buying and ending ---


def test_offers_come_cheapest_first_priced_for_the_disk(market):
    small, large = (market.offers({}, disk_gb=gb, interruptible=False) for gb in (10, 200))
    assert [o.rates.gpu for o in small] == pytest.approx([0.1, 0.2, 0.3])
    assert large[0].rates.disk == pytest.approx(20 * small[0].rates.disk)
    assert large[0].rates.gpu == pytest.approx(small[0].rates.gpu)


@pytest.mark.parametrize("action", ["act+504", "act+hang", "act+short", "500", "503", "drop"])
def test_a_purchase_is_sent_once_whatever_becomes_of_its_answer(lab, market, action):
    lab.fault(method="PUT", path="/asks/", action=action)
    began = time.monotonic()
    assert buy(market) is None
    assert time.monotonic() - began < 3
    assert sum(r["path"].startswith("/api/v0/asks/") for r in lab.requests()) == 1
    assert len(lab.live()) == action.startswith("act+")


@pytest.mark.parametrize("status", ["404", "410", "400"])
def test_a_refused_order_made_no_instance(lab, market, status):
    lab.fault(method="PUT", path="/asks/", action=status)
    with pytest.raises(Refused, match=status):
        buy(market)


def test_an_order_that_came_too_fast_is_sent_again(lab, market):
    lab.fault(method="PUT", path="/asks/", action="429", first=2)
    assert buy(market) in lab.live()


def test_a_key_that_may_not_buy_is_an_error_of_the_user(lab, market):
    lab.fault(method="PUT", path="/asks/", action="403")
    with pytest.raises(UserError, match="refuses to sell"):
        buy(market)


def test_a_destroy_is_repeated_until_it_is_taken_and_twice_is_no_error(lab, market):
    number = buy(market)
    lab.fault(method="DELETE", path="/instances/", action="503", first=3)
    market.destroy(number)
    assert lab.live() == []
    market.destroy(number)
    market.destroy(4711)


def test_an_odd_answer_does_not_mean_that_the_ssh_key_is_attached(lab, market):
    number = buy(market)
    lab.fault(path="/ssh/", action="null", first=2)
    market.attach_key(number, "ssh-ed25519 AAAA us")
    assert lab.market.contracts[number].keys == ["ssh-ed25519 AAAA us"]


def test_a_key_that_is_refused_does_not_mean_that_instances_are_gone(lab, market):
    number = buy(market)
    market.sdk.client.api_key = "wrong"
    for call in (market.exists, market.destroy):
        with pytest.raises(UserError, match="refuses the key"):
            call(number)
    assert lab.live() == [number]


# --- answers of any shape ---


def test_only_instances_with_a_label_of_ours_are_listed_over_all_pages(lab, market):
    for i in range(30):
        lab.add_offer(machine_id=100 + i, dph_base=0.01)
        buy(market, f"sae1/run/{i + 1}/a1/exp=9" if i % 2 else "somebody else's")
    found = market.instances()
    assert sorted(i.label.shard for i in found) == list(range(2, 31, 2))
    assert sum(r["path"] == "/api/v1/instances/" for r in lab.requests()) == 2


@pytest.mark.parametrize("answer", ["null", "object", "empty", "html", "410", "truncated"])
def test_an_odd_list_is_never_an_empty_one(lab, market, answer):
    buy(market)
    lab.fault(path="/api/v1/instances/", action=answer, first=2)
    assert len(market.instances()) == 1
    lab.fault(path="/api/v1/instances/", action=answer)
    with pytest.raises(Unavailable, match="no usable answer to list"):
        market.instances()


@pytest.mark.parametrize("body", [
    "[" * 100_000, '{"instances": [' + 5000 * "9" + "]}",
    '{"instances": [{"id": "3/../4", "label": "sae1/"}]}',
    '{"instances": [{"label": "sae1/x/1/a1/exp=9"}]}', '{"instances": {"id": 3}}', "NaN", "7",
    '{"instances": [{"label": "sae1/", "id": 1.5}]}', '{"instances": [], "next_token": "x"}',
    '{"instances": [], "next_token": NaN}', '{"instances": [], "next_token": [1]}',
], ids=range(11))  # fmt: skip
def test_a_list_of_another_shape_is_an_error_of_the_service(lab, market, body):
    lab.fault(path="/api/v1/instances/", action="object", body=body)
    with pytest.raises(Unavailable):
        market.instances()


def test_a_list_of_ever_new_pages_has_an_end(market, monkeypatch):
    pages = iter(range(10**9))

    def answer(params: dict) -> dict:
        return {"instances": [], "next_token": str(next(pages))}

    monkeypatch.setattr(market.sdk, "show_instances_v1", answer)
    with pytest.raises(Unavailable, match="has no end"):
        market.instances()
    assert next(pages) <= 10_000


@pytest.mark.parametrize("credit", ['"x"', "[]", "null", "-1", "1e999"])
def test_a_credit_that_is_none_is_no_crash(lab, market, credit):
    lab.fault(path="/users/", action="object", body=f'{{"credit": {credit}}}')
    assert not market.credit() > 0


@pytest.mark.parametrize("answer", ["null", "object", "html", "500"])
def test_an_odd_answer_about_one_instance_does_not_mean_that_it_is_gone(lab, market, answer):
    number = buy(market)
    lab.fault(path=f"/instances/{number}/", action=answer)
    with pytest.raises(Unavailable):
        market.exists(number)
    lab.clear_faults()
    assert market.exists(number)
    market.destroy(number)
    assert not market.exists(number)
    lab.fault(path=f"/instances/{number}/", action="404", body="{}")  # documents: null or 404
    assert not market.exists(number)


def test_offers_without_a_price_are_no_offers(lab, market):
    body = json.dumps({"offers": [{"id": 1, "machine_id": 2, "gpu_name": "RTX 3090"}]})
    lab.fault(path="/bundles/", action="object", body=body)
    with pytest.raises(Unavailable, match="an offer without 'storage_cost'"):
        market.offers({}, **ON_DEMAND)


def test_a_quota_that_is_used_up_is_said_at_once(lab, market):
    lab.fault(path="/bundles/", action="429", body='{"error": "search_quota_exceeded"}')
    with pytest.raises(UserError, match="wait until tomorrow"):
        market.offers({}, **ON_DEMAND)


def test_our_own_mistakes_are_not_taken_for_the_services(market):
    with pytest.raises(ZeroDivisionError):
        market._ask("list", lambda: 1 / 0)


def test_calls_to_one_endpoint_keep_their_distance(lab):
    market = Market(lab.api_key, spacing=0.1)
    began = time.monotonic()
    for _ in range(3):
        market.instances()
    assert time.monotonic() - began > 2 * 1.2 * 0.1 * INTERVALS["list"]
