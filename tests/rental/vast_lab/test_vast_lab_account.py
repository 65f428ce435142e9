"""The lab's account side, driven by the real vastai package: money, keys, who may do what."""

import time

import pytest
from vast_lab_helpers import buy, call, refused, sdk, until_running, until_status
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


def test_the_account_is_there_with_and_without_slash(lab, vast):
    lab.set(credit=7.0)
    assert vast.show_user()["credit"] == 7.0
    for path in ("/api/v0/users/current", "/api/v0/users/current/"):
        assert call(lab, "GET", path, key=lab.api_key).json()["credit"] == 7.0


def test_charges_name_the_label_and_the_four_kinds(lab, vast):
    number = buy(vast, label="run/1")
    lab.traffic(id=number, down_gb=1000.0)
    row = vast.show_invoices_v1(charges=True, limit=1)["results"][0]
    assert (row["source"], row["metadata"]) == (f"instance-{number}", {"label": "run/1"})
    assert {item["type"]: item["amount"] for item in row["items"]}["bwd"] == 3.0
    assert [item["type"] for item in row["items"]] == ["gpu", "disk", "bwd", "bwu"]
    answer = call(lab, "GET", "/api/v0/charges/", key=lab.api_key)
    assert answer.status_code == 400


def test_ssh_keys_can_be_added_shown_and_attached(lab, vast):
    key = "ssh-ed25519 AAAAC3Nz lab"
    assert vast.create_ssh_key(key)["key"]["public_key"] == key
    assert [row["public_key"] for row in vast.show_ssh_keys()] == [key]
    assert vast.attach_ssh(buy(vast), key)["success"] is True
    assert refused(vast.create_ssh_key, "no key")[0] == 400
    lab.set(team=True)
    assert refused(vast.create_ssh_key, key) == (400, "team_ssh_keys_not_supported")


def test_a_missing_key_is_403_and_a_wrong_one_404(lab):
    assert refused(sdk(lab, key="wrong").show_user) == (404, "auth_error")
    assert refused(sdk(lab, key="wrong").destroy_instance, 1) == (404, "auth_error")
    assert call(lab, "GET", "/api/v1/instances/").status_code == 403


def test_an_instance_key_serves_its_own_instance_only(lab, vast):
    answer = vast.create_instance(102, image="a/b")
    own, other = answer["new_contract"], buy(vast)
    inside = sdk(lab, key=answer["instance_api_key"])
    for method, args in [
        (inside.destroy_instance, (other,)), (inside.stop_instance, (other,)),
        (inside.show_instances, ()), (inside.search_offers, ({},)), (inside.show_user, ()),
        (inside.label_instance, (own, "x")), (inside.create_instance, (103, "a/b")),
    ]:  # fmt: skip
        assert refused(method, *args) == (403, "not_authorized")
    until_running(vast, own)
    inside.stop_instance(own)
    until_status(vast, own, "stopped")
    inside.start_instance(own)
    inside.destroy_instance(own)
    assert [row["how"] for row in lab.ledger()] == ["by itself", None]
    assert refused(inside.destroy_instance, own) == (404, "auth_error")


def test_a_scoped_key_can_do_what_its_permissions_say():
    scopes = {"narrow": ["misc", "user_read", "instance_read", "instance_write"]}
    with FakeVast(sandboxes=False, offers=[{}], scoped_keys=scopes) as lab:
        vast = sdk(lab, key="narrow")
        number = buy(vast)
        assert vast.attach_ssh(number, "ssh-ed25519 AAAA lab")["success"]
        assert refused(vast.create_ssh_key, "ssh-ed25519 AAAA lab") == (403, "not_authorized")
        assert refused(vast.show_invoices_v1, charges=True) == (403, "not_authorized")
        vast.destroy_instance(number)


def test_documented_intervals_are_enforced_when_asked(lab, vast):
    lab.set(rate_limits=0.1)  # create: 0.45 s, and 1.2 s after a violation
    vast.create_instance(101, image="a/b")
    assert refused(vast.create_instance, 102, image="a/b")[0] == 429
    time.sleep(0.5)
    assert refused(vast.create_instance, 102, image="a/b")[0] == 429
    time.sleep(1.25)
    vast.create_instance(102, image="a/b")
    for _ in range(10):
        vast.search_offers({})
    assert refused(vast.search_offers, {})[1].startswith("API requests too frequent")


def test_the_search_quota_of_a_day_can_run_out(lab, vast):
    lab.set(search_quota=1)
    vast.search_offers({})
    assert refused(vast.search_offers, {}) == (429, "search_quota_exceeded")


def test_unknown_paths_and_settings_are_errors(lab):
    answer = call(lab, "GET", "/api/v0/nothing/", key=lab.api_key)
    assert answer.status_code == 404
    with pytest.raises(ValueError, match="no colour"):
        lab.add_offer(colour="red")
    with pytest.raises(ValueError, match="no outbid_after"):
        lab.behave(outbid_after=1)
    with pytest.raises(ValueError, match="'sometimes'"):
        lab.fault(path="", action="sometimes")
    with pytest.raises(ValueError, match="no offer"):
        FakeVast(offer=[])
