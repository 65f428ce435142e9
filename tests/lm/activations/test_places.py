"""Activations in memory are those on disk, and nothing of them is on disk; where they fit nowhere,
that is said with what is needed and what is free."""

from dataclasses import replace

import pytest
import torch
from builders.lm import DISK, all_rows, harvester_of, recipe_of, tiny_target

from sparse_coding.config import UserError
from sparse_coding.files import write_json
from sparse_coding.lm.activations import harvest, places
from sparse_coding.lm.activations.harvest import Harvester
from sparse_coding.lm.activations.places import InMemory, Place, device_with_room
from sparse_coding.lm.activations.store import Store
from sparse_coding.lm.recipe import LanguageRecipe, require_memory, with_activations
from sparse_coding.sweep.cells import row_path
from sparse_coding.sweep.grid import Cell, make_grid
from sparse_coding.sweep.training import Task

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WIDTH = 40
MEMORY = Place("memory", max_disk_gb=0.0)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(harvest, "CHUNK_BYTES", 100 * 16 * WIDTH * 2)


def cells() -> list[Cell]:
    return make_grid(WIDTH, seeds=range(1), l1_exps=range(-8, -6), size_exps=range(2))


def trained(task: Task, n_steps: int) -> Task:
    for step in range(n_steps):
        task.ensemble.step_(task.batch_at(step))
    return task


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_training_from_memory_gives_the_bits_of_training_from_disk(root, tmp_path, dtype):
    target = tiny_target(root, store_dtype=dtype)
    run = dict(folder=tmp_path / "run", cells=cells())
    computed = recipe_of(target, shuffle_gb=0.0001)
    held = with_activations(computed, target, MEMORY, **run)
    assert isinstance(held.chunks, InMemory)
    assert [path.name for path in target.folder.iterdir()] == ["text"]
    stored = with_activations(computed, target, DISK, **run)
    assert isinstance(stored.chunks, Store)
    assert held.chunks.rows == stored.chunks.rows
    assert torch.equal(all_rows(held.chunks), all_rows(stored.chunks))
    assert held.chunks.load(0).dtype == getattr(torch, dtype)
    assert held.statistics.scale == stored.statistics.scale
    tasks = [trained(recipe.prepare(cells()), 60) for recipe in (held, stored)]
    for name, tensor in tasks[0].ensemble.state().items():
        assert torch.equal(tensor, tasks[1].ensemble.state()[name]), name
    rows = [[row for row, _ in task.evaluate()] for task in tasks]
    assert str(rows[0]) == str(rows[1])  # NaN included


def test_training_leaves_rows_in_memory_as_they_are(root, tmp_path):
    target = tiny_target(root)
    recipe = with_activations(
        recipe_of(target), target, MEMORY, folder=tmp_path / "run", cells=cells()
    )
    before = all_rows(recipe.chunks)
    trained(recipe.prepare(cells()), 20)
    assert torch.equal(all_rows(recipe.chunks), before)


def test_nothing_is_harvested_into_memory_for_a_run_that_has_all_its_cells(root, tmp_path):
    target = tiny_target(root)
    recipe, run = recipe_of(target), dict(folder=tmp_path, cells=cells())
    for cell in cells():
        write_json(tmp_path / row_path(cell), {})
    assert with_activations(recipe, target, MEMORY, **run) is recipe


# --- what fits where ---


def on_gpu(harvester: Harvester) -> Harvester:
    """As it would be if its model were on a GPU: enough for what only asks where it is."""
    return replace(harvester, lm=replace(harvester.lm, device=GPU))


@pytest.fixture
def free(monkeypatch) -> dict[torch.device, float]:
    """Bytes that are free by device, to be set."""
    found: dict[torch.device, float] = {}
    monkeypatch.setattr(places, "free_memory", found.__getitem__)
    return found


def test_a_gpu_keeps_what_fits_beside_training_the_host_the_rest(root, free):
    harvester = on_gpu(harvester_of(tiny_target(root)))
    needed = harvester.n_bytes
    for of_gpu, of_host, device in (
        (needed + 1000, 0, GPU),
        (needed + 999, needed, CPU),
        (0, needed, CPU),
    ):
        free |= {GPU: of_gpu, CPU: of_host}
        assert device_with_room(harvester, training=1000) == device
    free |= {GPU: needed + 999, CPU: needed - 1}
    with pytest.raises(UserError) as refusal:
        device_with_room(harvester, training=1000)
    gb, n = f"{needed / 1e9:.2f} GB", sum(harvester.rows)
    assert str(refusal.value) == (
        f"--activations-in memory: {n:,} activations need {gb}, free beside training are {gb} of "
        f"the cuda, {gb} of the cpu: use --activations-in disk or fewer --n-tokens"
    )


def test_a_cpu_keeps_what_fits_beside_the_largest_autoencoder(root, free, tmp_path):
    recipe = recipe_of(tiny_target(root))
    needed, largest = recipe.chunks.n_bytes, max(recipe.memory([c.kind]) for c in cells())
    run = dict(folder=tmp_path, cells=cells(), fresh=False)
    free[CPU] = needed + largest
    require_memory(recipe, MEMORY, **run)
    free[CPU] = needed + largest - 1
    require_memory(recipe, DISK, **run)
    with pytest.raises(UserError, match=r"--activations-in memory: .* need"):
        require_memory(recipe, MEMORY, **run)
    for cell in cells():
        write_json(tmp_path / row_path(cell), {})
    require_memory(recipe, MEMORY, **run)  # nothing is left to train
    with pytest.raises(UserError, match=r"--activations-in memory: .* need"):
        require_memory(recipe, MEMORY, **run | {"fresh": True})


def test_on_a_gpu_all_cells_are_to_be_trained_beside_activations(root, free, tmp_path):
    recipe = recipe_of(tiny_target(root))
    held_out = replace(recipe.held_out, lm=replace(recipe.held_out.lm, device=GPU))
    recipe = LanguageRecipe(on_gpu(recipe.chunks), held_out, recipe.optimisation, {})
    together = recipe.memory([cell.kind for cell in cells()])
    free |= {GPU: recipe.chunks.n_bytes + together, CPU: 0}
    run = dict(folder=tmp_path, cells=cells(), fresh=False)
    require_memory(recipe, MEMORY, **run)
    free[GPU] -= 1
    with pytest.raises(UserError, match="use --activations-in disk"):
        require_memory(recipe, MEMORY, **run)
