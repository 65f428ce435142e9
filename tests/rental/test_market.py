"""The market, against a server that speaks the documented API."""

import json
import time

import pytest
from vast_server import FakeVast

from sparse_coding.config import UserError
from sparse_coding.rental.market import INTERVALS, Market, Refused, Unavailable

pytest.importorskip("vastai")
OFFERS = [{"gpu_name": "RTX 3090", "dph_base": price} for price in (0.3, 0.1, 0.2)]


@pytest.fixture
def lab(monkeypatch):
    with FakeVast(offers=OFFERS, sandboxes=False) as lab:
        monkeypatch.setenv("VAST_URL", lab.url)
        monkeypatch.setattr("sparse_coding.rental.market.TIMEOUT", 0.5)
        yield lab


@pytest.fixture
def market(lab) -> Market:
    return Market(lab.api_key, spacing=0.0)


def buy(market: Market, label: str = "sae1/run/1/a1/exp=9", **changes):
    offer = market.offers({}, disk_gb=20, interruptible=False)[0]
    terms = dict(image="image", disk_gb=20, label=label, onstart="true")
    return market.buy(offer, **terms | changes)


def test_offers_come_cheapest_first_priced_for_the_disk(market):
    small, large = (market.offers({}, disk_gb=gb, interruptible=False) for gb in (10, 200))
    assert [o.rates.gpu for o in small] == pytest.approx([0.1, 0.2, 0.3])
    assert large[0].rates.disk == pytest.approx(20 * small[0].rates.disk)
    assert large[0].rates.gpu == pytest.approx(small[0].rates.gpu)


def test_a_purchase_is_sent_once_whatever_becomes_of_its_answer(lab, market):
    lab.fault(method="PUT", path="/asks/", action="act+504")
    assert buy(market) is None
    assert sum(r["path"].startswith("/api/v0/asks/") for r in lab.requests()) == 1
    assert len(lab.live()) == 1


def test_a_purchase_that_never_answers_is_not_waited_for(lab, market):
    lab.fault(method="PUT", path="/asks/", action="act+hang")
    began = time.monotonic()
    assert buy(market) is None
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("status", ["404", "410", "400"])
def test_a_refused_order_made_no_instance(lab, market, status):
    lab.fault(method="PUT", path="/asks/", action=status)
    with pytest.raises(Refused, match=status):
        buy(market)


@pytest.mark.parametrize("status", ["500", "503"])
def test_after_an_error_of_the_service_there_may_be_an_instance(lab, market, status):
    lab.fault(method="PUT", path="/asks/", action=status)
    assert buy(market) is None


def test_an_order_that_came_too_fast_is_sent_again(lab, market):
    lab.fault(method="PUT", path="/asks/", action="429", first=2)
    assert buy(market) in lab.live()


def test_a_key_that_may_not_buy_is_an_error_of_the_user(lab, market):
    lab.fault(method="PUT", path="/asks/", action="403")
    with pytest.raises(UserError, match="refuses to sell"):
        buy(market)


def test_only_instances_with_a_label_of_ours_are_listed_over_all_pages(lab, market):
    for i in range(30):
        lab.add_offer(machine_id=100 + i, dph_base=0.01)
        buy(market, f"sae1/run/{i + 1}/a1/exp=9" if i % 2 else "somebody else's")
    found = market.instances()
    assert sorted(i.label.shard for i in found) == list(range(2, 31, 2))
    lists = [r for r in lab.requests() if r["path"] == "/api/v1/instances/"]
    assert len(lists) == 2


@pytest.mark.parametrize("answer", ["null", "object", "empty", "html", "410", "truncated"])
def test_an_odd_list_is_never_an_empty_one(lab, market, monkeypatch, answer):
    monkeypatch.setattr("sparse_coding.rental.market.TRIES", 3)
    buy(market)
    lab.fault(path="/api/v1/instances/", action=answer, first=2)
    assert len(market.instances()) == 1
    lab.fault(path="/api/v1/instances/", action=answer)
    with pytest.raises(Unavailable, match="no usable answer to list"):
        market.instances()


def test_an_odd_answer_about_one_instance_does_not_mean_that_it_is_gone(lab, market, monkeypatch):
    monkeypatch.setattr("sparse_coding.rental.market.TRIES", 2)
    number = buy(market)
    assert market.exists(number)
    for answer in ("null", "object", "html", "500"):
        lab.clear_faults()
        lab.fault(path=f"/instances/{number}/", action=answer)
        with pytest.raises(Unavailable):
            market.exists(number)
    lab.clear_faults()
    market.destroy(number)
    assert not market.exists(number)
    assert lab.live() == []


def test_a_destroy_is_repeated_until_it_is_taken_and_twice_is_no_error(lab, market):
    number = buy(market)
    lab.fault(method="DELETE", path="/instances/", action="503", first=3)
    market.destroy(number)
    assert lab.live() == []
    market.destroy(number)
    market.destroy(4711)


def test_a_key_that_is_refused_does_not_mean_that_instances_are_gone(lab, market):
    number = buy(market)
    market.sdk.client.api_key = "wrong"
    for call in (market.exists, market.destroy):
        with pytest.raises(UserError, match="refuses the key"):
            call(number)
    assert lab.live() == [number]


def test_our_own_mistakes_are_not_taken_for_the_services(market):
    with pytest.raises(ZeroDivisionError):
        market._ask("list", lambda: 1 / 0)


def test_calls_to_one_endpoint_keep_their_distance(lab):
    market = Market(lab.api_key, spacing=0.1)
    began = time.monotonic()
    for _ in range(3):
        market.instances()
    assert time.monotonic() - began > 2 * 1.2 * 0.1 * INTERVALS["list"]


def test_offers_without_a_price_are_no_offers(lab, market, monkeypatch):
    monkeypatch.setattr("sparse_coding.rental.market.TRIES", 2)
    body = json.dumps({"offers": [{"id": 1, "machine_id": 2, "gpu_name": "RTX 3090"}]})
    lab.fault(path="/bundles/", action="object", body=body)
    with pytest.raises(Unavailable, match="an offer without 'storage_cost'"):
        market.offers({}, disk_gb=9, interruptible=False)
