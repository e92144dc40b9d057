"""tools/simulate_scaling.py: what must hold whatever the numbers, and the table that it prints."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulate_scaling import Cluster, Work, ddp_bytes, ddp_step, fsdp_bytes, fsdp_step, main, size_of

STEPS = [ddp_step, fsdp_step]
COUNTS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
FREE = Cluster(8, math.inf, math.inf, 0.0, 0.0)

positive = st.floats(1e-3, 1e3)
shares = st.floats(0, 0.5)
clusters = st.builds(
    Cluster,
    per_node=st.sampled_from([1, 4, 8]),
    inside=positive.map(lambda x: x * 1e9),
    between=positive.map(lambda x: x * 1e9),
    inside_latency=st.floats(0, 1e-3),
    between_latency=st.floats(0, 1e-3),
)
works = st.builds(
    Work,
    step=positive,
    parameters=st.integers(10**6, 10**9),
    blocks=st.integers(1, 50),
    parameter_bytes=st.sampled_from([2, 4]),
    gradient_bytes=st.sampled_from([2, 4]),
    forward=shares,
    backward=shares,
    overlap=st.floats(0, 1),
)


@given(works, clusters)
def test_one_device_is_the_measured_step_and_more_are_never_faster(work: Work, cluster: Cluster) -> None:
    for step in STEPS:
        seconds = [step(work, cluster, count) for count in COUNTS]
        assert seconds[0] == work.step
        assert all(later >= earlier * (1 - 1e-9) for earlier, later in pairwise(seconds))


@given(works)
def test_links_without_limits_cost_nothing(work: Work) -> None:
    assert all(step(work, FREE, count) == work.step for step in STEPS for count in COUNTS)


@given(works)
def test_fsdp_moves_as_many_bytes_as_ddp_or_more(work: Work) -> None:
    """As long as a parameter has at least half the bytes of a gradient; then, bf16 and fp32, they are equal."""
    for count in COUNTS:
        assert fsdp_bytes(work, count) >= ddp_bytes(work, count)
    mixed = replace(work, parameter_bytes=2, gradient_bytes=4)
    assert fsdp_bytes(mixed, 8) == ddp_bytes(mixed, 8)


def test_fsdp_can_be_the_faster_one_all_the_same() -> None:
    """With as many bytes, it hides a part behind the forward pass too."""
    work, cluster = Work(step=0.1, parameters=10**8), Cluster(between=10e9)
    assert fsdp_step(work, cluster, 64) < ddp_step(work, cluster, 64)


def test_a_ring_by_hand() -> None:
    """A GB of gradients, nothing hidden, no latency: twice 7/8 of it inside, twice 3/4 of it between 4 nodes."""
    work = Work(step=1.0, parameters=250_000_000, overlap=0.0)
    cluster = Cluster(8, 100e9, 10e9, 0.0, 0.0)
    assert ddp_step(work, cluster, 8) == pytest.approx(1 + 2 * 7 / 8 / 100)
    assert ddp_step(work, cluster, 32) == pytest.approx(1 + 2 * 7 / 8 / 100 + 2 * 3 / 4 / 10)
    latency = replace(cluster, between_latency=1e-3)
    assert ddp_step(work, latency, 32) - ddp_step(work, cluster, 32) == pytest.approx(2 * 39 * 3 * 1e-3)  # 39 buckets


def test_hidden_communication_costs_its_last_bucket() -> None:
    work = Work(step=1.0, parameters=250_000_000)
    reduce = 2 * 7 / 8 / 300
    assert ddp_step(work, Cluster(inside_latency=0.0), 8) == pytest.approx(1 + reduce / 39)


@pytest.mark.parametrize("count", [0, 9, 12])
def test_devices_that_fill_no_nodes(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} devices; expected 1 to 8 or a multiple of 8"):
        Cluster().split(count)


def test_parameters_are_the_models() -> None:
    parameters, blocks = size_of("base")
    assert parameters > 84_531_584 + 4_326_912  # encoder and fusion (INTERFACES.md), and a decoder
    assert blocks == 2 + 2 + 11 + 4


def test_the_command_prints_assumptions_and_a_table(capsys: pytest.CaptureFixture) -> None:
    main(["--step=0.5", "--size=tiny", "--gradients=bf16", "--between=25", "--measured", "1:0.5", "16:0.625"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Assumed: a step of 0.5 s")
    assert "25 GB/s a node" in lines[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert rows[0] == [
        "GPUs",
        "nodes",
        *["DDP step", "efficiency", "FSDP step", "efficiency"],
        "measured step",
        "efficiency",
    ]
    assert [int(row[0]) for row in rows[1:]] == COUNTS
    assert rows[1][2:] == ["0.500 s", "100.0%"] * 3
    assert rows[5][1] == "2"
    assert rows[5][6:] == ["0.625 s", "80.0%"]
    assert rows[6][6:] == ["", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=0.5", "--measured", "8-0.53"], "measured is '8-0.53'; expected RANKS:SECONDS"),
        (["--step=0.5", "--measured", "12:0.53"], "12 devices; expected"),
        (["--step=0"], "expected a step above 0 s"),
        (["--step=1", "--size=giant"], "size is 'giant'; expected one of"),
        (["--step=1", "--between=0"], "bandwidths above 0"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
