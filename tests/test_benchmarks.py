"""The command that uses a GPU's minutes: its queue, what it keeps, its table; and a rehearsal of all of its jobs."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, command

BENCHMARKS = ROOT / "tests" / "benchmarks"
sys.path.append(str(BENCHMARKS))

import on_gpu  # noqa: E402
from gpu_jobs import JOBS, Job, Pair, Side, Unit  # noqa: E402
from gpu_table import markdown  # noqa: E402

DEVICE = {"device": "A card", "torch": "2.11", "commit": "abc"}
# What moves the clock, in seconds a turn; one that raises in turn 30.
SIDES = """
import sys, time
{torch}
from clock import Clock
clock = Clock(learned=3)
for turn in range(10**9):
    clock.tick()
    time.sleep({seconds})
    if turn == {end}:
        raise ValueError("a side that fails")
"""
# In the place of torch, whose import takes a second, as much of it as the clock needs without a GPU.
INSTEAD_OF_TORCH = """
from contextlib import nullcontext
from types import SimpleNamespace as Some
profiler = Some(ProfilerActivity=Some(CPU=0), profile=lambda activities: nullcontext(Some(events=list)))
cuda = Some(is_available=lambda: False, is_initialized=lambda: False)
sys.modules["torch"] = Some(cuda=cuda, profiler=profiler, nn=Some(Module=object))
"""


@pytest.fixture(autouse=True)
def no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of this repository are not known here."""
    monkeypatch.setattr(on_gpu, "RESULTS", tmp_path / "results")


def make_bench(tmp_path: Path, minutes: float = 5.0, **options: Any) -> on_gpu.Bench:
    defaults = {"rehearse": False, "again": False, "rounds": 2, "seconds": 0.05, "wheels": None, "peers": tmp_path}
    out = tmp_path / "out"
    return on_gpu.Bench(argparse.Namespace(**(defaults | options), minutes=minutes, out=out), DEVICE)


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """Two units: in the first ours is faster than its peer, in the second it raises in the midst of being measured."""

    def side(name: str, seconds: float, end: int = -1, repository: str = "") -> Side:
        torch = "import torch" if repository else INSTEAD_OF_TORCH
        (tmp_path / f"{name}.py").write_text(SIDES.format(seconds=seconds, end=end, torch=torch))
        return Side((str(tmp_path / f"{name}.py"),), warm_up=2, repository=repository)

    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "COMMIT").write_text("123\n")
    slow, fast = side("slow", 0.004, repository="repo"), side("fast", 0.001)
    sound = Unit("job", "sound", "turns", {"ours": fast, "peer": slow}, [Pair("ours", "peer", 1.0, 9.0)], 1.0)
    fails = {"breaks": side("breaks", 0.001, end=30), "again": fast}
    broken = Unit("job", "broken", "turns", fails, [Pair("breaks", None, why="x"), Pair("again", "breaks")], 1.0)
    return [Job("job", lambda toy: [sound, broken], 1.0)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[on_gpu.Bench]:
    made = make_bench(tmp_path)
    yield made
    made.finish()


def test_the_queue_keeps_what_is_made_and_a_failure_costs_its_own_rows(
    bench: on_gpu.Bench, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run(jobs)
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "gpu_a_card.json").read_text())}
    assert set(rows) == {"ours / peer", "again"}
    row = rows["ours / peer"]
    assert 1.5 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] < 9
    assert row["reached"] and row["peer_commit"] == "123" and row["rounds"] == 2 and row["commit"] == "abc"
    assert 100 < row["peer_per_s"] < 250 and row["learned"] == 3 and row["host_ms"] == pytest.approx(1.2, abs=0.8)
    assert rows["again"]["peer"] is None and "failed" in rows["again"]["why"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "ValueError: a side that fails" in log and "breaks has ended with 1" in log
    assert "| 1x; 9x |" in markdown(bench.made)

    # What is known is not made again, in the same folder or from the results, unless it is asked for.
    started: list[str] = []
    monkeypatch.setattr(on_gpu.Bench, "measure", lambda self, units: started.extend(unit.name for unit in units))
    make_bench(tmp_path).run(jobs)
    assert started == ["broken"]
    (tmp_path / "results").mkdir()
    (tmp_path / "out" / "gpu_a_card.json").rename(tmp_path / "results" / "gpu_a_card.json")
    make_bench(tmp_path).run(jobs)
    make_bench(tmp_path, again=True).run(jobs)
    assert started == ["broken"] * 2 + ["sound", "broken"]
    (tmp_path / "repo" / "COMMIT").write_text("124\n")
    make_bench(tmp_path).run(jobs)
    assert started[4:] == ["sound", "broken"]


def test_only_what_fits_is_started(tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def measure(self: on_gpu.Bench, units: list[Unit]) -> None:
        """As long as estimated."""
        started.extend(unit.name for unit in units)
        self.ends -= 1.0 + sum(unit.estimate for unit in units)

    monkeypatch.setattr(on_gpu.Bench, "measure", measure)
    for seconds in (1.5, 2.5, 3.5):  # two for the first unit, three for both
        make_bench(tmp_path, minutes=(on_gpu.ENDING + seconds) / 60).run(jobs)
        started.append("|")
    assert started == ["|", "sound", "|", "sound", "broken", "|"]
    assert "broken: left out" in (tmp_path / "out" / "log.txt").read_text()


def test_a_side_that_hangs_ends_with_the_time(tmp_path: Path, jobs: list[Job]) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text("import time; time.sleep(1000)")
    unit = Unit("job", "hangs", "turns", {"hangs": Side((str(hangs),))}, [Pair("hangs", None)], 0.1)
    bench = make_bench(tmp_path, minutes=(on_gpu.ENDING + 2) / 60)
    bench.run([Job("job", lambda toy: [unit], 0.1)])
    bench.finish()
    assert "NOT MADE: hangs: the time is over" in (tmp_path / "out" / "table.md").read_text()


def test_a_job_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--only", "nothing", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main()
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_the_table_in_the_readme_beside_it_is_made_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "RESULTS", ROOT / "tests" / "results")
    rows = list(on_gpu.stored())
    assert rows and not any("rehearsal" in row for row in rows)
    assert all(row["why"] for row in rows if row["peer"] is None or row.get("reached") is False)
    assert markdown(rows).strip() in (BENCHMARKS / "README.md").read_text()


BOTH_WAYS = ("cql", "fql", "sac", "diffusion unet1d")  # a unit of each script and kind of networks


def rehearsed(job: Job) -> Job:
    """A job whose other units leave out sides that differ in a word which is the same for all: --compile or bf16."""

    def wanted(unit: Unit, pair: Pair) -> bool:
        return unit.name in BOTH_WAYS or not ("compiled" in pair.ours or "bf16" in pair.ours)

    def units(toy: bool) -> list[Unit]:
        return [unit._replace(pairs=[pair for pair in unit.pairs if wanted(unit, pair)]) for unit in job.units(toy)]

    return job._replace(units=units)


@pytest.mark.slow
def test_a_rehearsal_runs_all_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours alone, at toy size, on the CPU; the compiler stands back, which takes minutes here."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    jobs = [rehearsed(job) for job in JOBS]
    monkeypatch.setattr(on_gpu, "JOBS", jobs)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--rehearse", "--out", str(tmp_path)])
    assert on_gpu.main() == 0, (tmp_path / "log.txt").read_text()
    rows = json.loads((tmp_path / "gpu_cpu.json").read_text())
    expected = {pair.ours for job in jobs for unit in job.units(True) for pair in unit.pairs}
    assert {row["name"].partition(", its environment")[0] for row in rows if "tests" not in row} == expected
    assert all("no checkout" in row["why"] for row in rows if "tests" not in row)
    assert [row["tests"] for row in rows if "tests" in row]
    assert all(row["operations"] > 0 for row in rows if "host_ms" in row)


@pytest.mark.slow
def test_offline_updates_measure_our_trainers(tmp_path: Path) -> None:
    """As the scripts build them, two updates each."""
    options = ("--rounds", 1, "--updates", 2, "--only", "td3_bc", "iql", "rebrac")
    done = command(sys.executable, BENCHMARKS / "offline_updates.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("td3_bc", "iql", "rebrac"):
        assert f"{name}, medium" in done.stdout
