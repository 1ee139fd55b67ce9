"""What is told of the processes of a run, and of a launcher that started too few."""

from __future__ import annotations

import pytest

from tutelage.setup.launcher import Layout, launcher_warning

ACCELERATE_CPU = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
"""What `accelerate launch --num_processes 2 --cpu` sets for the one process that it starts."""


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (ACCELERATE_CPU, "accelerate launch"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS is 4"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2"),
    ],
)
def test_a_process_that_should_be_several_is_a_warning(
    environment: dict[str, str], named: str
) -> None:
    warning = launcher_warning(1, environment)
    assert warning is not None
    assert named in warning
    assert "torchrun" in warning
    assert launcher_warning(2, environment) is None


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},  # torchrun
        {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "True"},  # accelerate, one
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"},
    ],
)
def test_one_process_that_is_meant_to_be_one_is_none(environment: dict[str, str]) -> None:
    assert launcher_warning(1, environment) is None


def test_a_layout_in_words() -> None:
    assert str(Layout(1, 1, "fsdp2", "none")) == "1 process"
    assert str(Layout(4, 2, "fsdp2", "none")) == "4 processes, 2 hosts, fsdp2"
    assert str(Layout(2, 1, "none", "tp")) == "2 processes, 1 host, teacher tp"


def test_the_manifest_keeps_every_layout_that_took_steps() -> None:
    two, four = Layout(2, 1, "none", "none"), Layout(4, 2, "fsdp2", "none")
    first = two.record(None, 1)
    assert first["num_processes"] == 2
    assert two.record(first, 5) == first  # nothing changed
    later = four.record(first, 5)
    assert [(x["first_step"], x["num_processes"]) for x in later["layouts"]] == [(1, 2), (5, 4)]
    assert later["num_hosts"] == 2
    # The steps from 3 on are taken again, by others.
    again = two.record(later, 3)
    assert [(x["first_step"], x["num_processes"]) for x in again["layouts"]] == [(1, 2)]
    assert two.record({"layouts": [7, {"first_step": None}]}, 1) == first  # edited by hand
