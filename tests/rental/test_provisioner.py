"""Money before paperwork: machines end although the disk here is full."""

import errno
from itertools import count
from pathlib import Path

import pytest
from builders.vast.server import FakeVast

from sparse_coding.config import pick
from sparse_coding.rental.controller import Controller, Job
from sparse_coding.rental.market import Label, Market, Terms
from sparse_coding.rental.provisioner import MachineLost, Provisioner
from sparse_coding.rental.records import Ledger, RentalError, ShardRecord
from sparse_coding.rental.remote import Remote, Stopped
from vastai_utils import Config

pytest.importorskip("vastai")
OFFERS = [{"gpu_name": "RTX 3090", "dph_base": 0.1, "min_bid": 0.05, "machine_id": i}
          for i in range(5)]  # fmt: skip
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def lab(monkeypatch, tmp_path):
    with FakeVast(tmp_path / "lab", offers=OFFERS, sandboxes=False) as lab:
        monkeypatch.setenv("VAST_URL", lab.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield lab


@pytest.fixture
def provisioner(lab, tmp_path) -> Provisioner:
    terms = pick(Terms, Config(max_dph=0.5, start_minutes=0.01, attempts=2))
    market = Market(lab.api_key, spacing=0.0)
    return Provisioner(market, "run", terms, Ledger(tmp_path, 1, 9.0), 0.01, 0.001)


def fill_disk(monkeypatch, from_call: int = 1) -> None:
    """No record can be written any more, from so many on."""
    calls, save = count(1), Ledger.save

    def full(self, record):
        if next(calls) >= from_call:
            raise FULL
        save(self, record)

    monkeypatch.setattr(Ledger, "save", full)


def rented(provisioner: Provisioner, lab: FakeVast) -> ShardRecord:
    """The record of a shard with a machine, and one of a stray beside it."""
    (record,) = provisioner.ledger.shards
    provisioner.order(record)
    label = Label("run", 1, 7, int(record.current.expires))
    lab.market.create(103, {"label": str(label), "image": "image"})
    assert len(lab.live()) == 2
    return record


def controller_of(provisioner: Provisioner, record: ShardRecord, folder: Path) -> Controller:
    """Of the shard, with a job that needs no GPU."""
    job = Job([], {}, "outputs/run", folder, [], b"", need_gpu=False)
    return Controller(provisioner, record, job, key=folder / "key")


def test_a_machine_and_its_strays_end_though_nothing_can_be_noted(provisioner, lab, monkeypatch):
    record = rented(provisioner, lab)
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        provisioner.end(record, "done")
    assert lab.live() == []
    assert record.current is None


def test_the_end_of_one_that_fails_keeps_no_stray(provisioner, lab, monkeypatch):
    record = rented(provisioner, lab)
    lab.fault(method="DELETE", path=f"/instances/{record.current.id}/", action="500")
    with pytest.raises(RentalError, match=f"destroy instance {record.current.id} "):
        provisioner.end(record, "done")
    assert lab.live() == [record.current.id]


def test_a_machine_that_got_too_dear_is_lost_though_that_can_not_be_noted(
    provisioner, lab, monkeypatch
):
    lab.behave(price_factor=6.0)
    (record,) = provisioner.ledger.shards
    provisioner.order(record)
    fill_disk(monkeypatch)
    with pytest.raises(MachineLost, match="above --max-dph"):
        provisioner.locate(record)


@pytest.mark.parametrize("price", ["NaN", "-1", '"x"', "1e999"])
def test_a_machine_whose_price_is_none_is_lost(provisioner, lab, price):
    (record,) = provisioner.ledger.shards
    provisioner.order(record)
    label = lab.ledger()[0]["label"]
    row = f'{{"id": {record.current.id}, "label": "{label}", "dph_total": {price}}}'
    lab.fault(path="/v1/instances/", action="object", body=f'{{"instances": [{row}]}}')
    with pytest.raises(MachineLost, match=r"\$nan/h, above --max-dph"):
        provisioner.locate(record)
    assert provisioner.ledger.committed() < 1


@pytest.mark.parametrize("from_call", range(1, 8))
@pytest.mark.parametrize("fate", [{"price_factor": 6.0}, {"stuck": "loading"}], ids=str)
def test_a_disk_that_is_full_from_a_record_on_keeps_no_machine(
    provisioner, lab, monkeypatch, tmp_path, from_call, fate
):
    lab.behave(**fate)
    fill_disk(monkeypatch, from_call)
    (record,) = provisioner.ledger.shards
    controller = controller_of(provisioner, record, tmp_path)
    with pytest.raises((OSError, RentalError)):
        controller.complete()
    assert lab.live() == []


def test_results_that_are_home_keep_no_machine_though_that_can_not_be_noted(
    provisioner, lab, monkeypatch, tmp_path
):
    record = rented(provisioner, lab)
    controller = controller_of(provisioner, record, tmp_path)
    monkeypatch.setattr(Controller, "pull", lambda self: None)
    monkeypatch.setattr(Controller, "work", lambda self: self.finish({"exit": 0}))
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        controller.complete()
    assert lab.live() == []


def test_a_last_pull_that_finds_no_room_lets_the_machine_end(
    provisioner, lab, monkeypatch, tmp_path
):
    record = rented(provisioner, lab)
    controller = controller_of(provisioner, record, tmp_path)

    def no_room(self) -> None:
        raise FULL

    monkeypatch.setattr(Controller, "pull", no_room)
    monkeypatch.setattr(Controller, "work", lambda self: self.check_stop())
    controller.phase = "running"
    controller.remote = Remote(1, (), tmp_path, tmp_path / "key", provisioner.stop)
    provisioner.stop.set()
    with pytest.raises(Stopped):
        controller.complete()
    assert lab.live() == []
