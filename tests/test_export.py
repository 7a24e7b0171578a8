"""An exported policy says what it takes, acts like the policy in every format, and tells how long it takes."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from components import TRAINER_REGISTRY, UserError, export, load_policy
from components.acting import latency, programs
from components.acting.correction import CorrectedPolicy, Middle
from components.acting.inference import Inference
from components.acting.policy import Policy
from components.acting.policy_folder import _build_module
from components.contracts import needs_of
from components.data.features import describe_data
from components.data.normalisation import Normaliser
from components.datasets.episodes import build, from_columns
from conftest import ROOT

Script = Callable[..., Path]
ROWS = (1, 3, 7)
SMALL = {
    "unet1d": {"channels": [8], "groups": 2, "kernel": 3},
    "dit": {"width": 16, "layers": 1, "heads": 2},
    "act": {"width": 16, "layers": 1, "heads": 2},
    "mlp": {"hidden_dims": [8]},
    "transformer": {"width": 16, "layers": 1, "heads": 2},
}


def data(obs_steps: int = 1, action_steps: int = 8, pictures: bool = False, tasks: bool = False) -> dict[str, Any]:
    """What is known of recordings of a small robot; pictures are cut to their centre."""
    history, chunk = (obs_steps,) * (obs_steps > 1), (action_steps,) * (action_steps > 1)
    known: dict[str, Any] = {"observation.state": {"shape": (*history, 3), "dtype": "float32"}}
    known["observation.state"] |= {"stats": {"mean": [1.0, 2.0, 3.0], "std": [1.0, 2.0, 5.0]}}
    if pictures:
        known["observation.images.top"] = {"shape": (*history, 3, 40, 40), "dtype": "uint8"}
        known["observation.images.top"] |= {"stored_shape": (*history, 3, 48, 44)}
    known["action"] = {"shape": (*chunk, 2), "dtype": "float32", "names": ["lift", "turn"], "fps": 30.0}
    known["action"]["stats"] = {"mean": [10.0, 0.0], "std": [5.0, 1.0], "min": [0.0, -1.0], "max": [20.0, 1.0]}
    known |= {"action_is_pad": {"shape": chunk, "dtype": "bool"}} if chunk else {}
    return known | ({"task": {"shape": (), "dtype": "text", "values": ["lift", "turn"]}} if tasks else {})


def untrained(trainer: str, known: dict[str, Any], loss: str = "mse", **models: Any) -> Policy:
    """A policy with random weights; `models` are entries of the registry, or (entry, options)."""
    wanted = {**needs_of(TRAINER_REGISTRY[trainer]), **models}
    entries = {
        name: entry if isinstance(entry, tuple) else (entry, SMALL.get(entry, {})) for name, entry in wanted.items()
    }
    record = {name: {"name": entry, "options": options} for name, (entry, options) in entries.items()}
    described = {"trainer": {"name": trainer, "options": {}}, "loss": {"name": loss, "options": {}}, "models": record}
    torch.manual_seed(0)
    module = _build_module(described | {"own_policy": True, "plugins": []}, known, Path("policy.json")).eval()
    for parameter in module.parameters():  # some layers begin at zero
        parameter.data.normal_(0, 0.2)
    return Policy(module, Normaliser(known), known)


def file_of(policy: Policy, path: Path, **how: Any) -> tuple[programs.Program, dict[str, Any]]:
    export.export(policy, path, **how)
    return programs.FORMATS[path.suffix[1:]][1](path)


def test_a_small_dimension_is_not_hidden_by_a_large_one() -> None:
    known = data(1, 4)
    stats = {"mean": [1000.0, 0.0], "std": [100.0, 0.01], "min": [800.0, 0.0], "max": [1200.0, 0.1]}
    known["action"]["stats"] = stats  # millimetres, and a small turn
    policy = untrained("bc", known, policy="mlp")
    whole = export.Whole(policy)
    assert export.difference(policy, lambda batch: whole(batch) + torch.tensor([0.0, 1.0])) > 1
    assert export.difference(policy, lambda batch: whole(batch) + torch.tensor([0.1, 0.0])) < 1e-3
    assert export.difference(policy, lambda batch: whole(batch) + torch.tensor([40.0, 0.0])) > 0.09
    assert math.isnan(export.difference(policy, lambda batch: whole(batch) * math.nan))


def test_a_file_may_be_for_one_task_alone_also_for_a_new_wording() -> None:
    known, words = data(1, 4, tasks=True), ("cnn", {"language": "ngrams"})
    policy = untrained("bc", known, policy="mlp", encoder=words).configure(task="lift it")
    batch = export.example(policy, 3)
    chunk = export.Whole(policy)(batch)
    assert "task_index" not in batch and "tasks" not in export.description(policy)
    assert export.description(policy)["inference"]["task"] == "lift it"
    numbers = {key: value.numpy() for key, value in batch.items()}
    assert torch.equal(chunk, torch.from_numpy(policy.plan(numbers)))
    assert not torch.equal(chunk, torch.from_numpy(policy.plan(numbers | {"task": "turn"})))


def farthest(policy: Policy, program: programs.Program, rows: int) -> float:
    """Largest difference from what the policy plans, relative to its largest action or 1."""
    batch = export.example(policy, rows)
    with torch.no_grad():
        normalised = policy.normaliser(batch)
        action = policy.module(normalised["observation.state"] if policy.takes_tensor else normalised)
        eager, found = policy.normaliser.undo("action", action), program(batch)
    assert found.shape == (rows, *policy.spec["action"]["shape"]) and found.dtype == eager.dtype
    return float((eager - found).abs().max() / eager.abs().max().clamp(min=1))


SECTION = (
    (ROOT / "components" / "trainers" / "README.md").read_text().split("### Without this code\n")[1].split("\n#")[0]
)
BLOCKS = dict(zip(("pt2", "onnx"), re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL), strict=True))


def check_readme(
    kind: str, policy: Policy, program: programs.Program, about: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's lines call the file in `folder`."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(BLOCKS[kind], names)
    assert names["about"] == about and "noise" in names["batch"] and "components" not in BLOCKS[kind]
    assert not getattr(names["chunk"], "requires_grad", False)
    again = program({key: torch.as_tensor(value) for key, value in names["batch"].items()})
    chunk = torch.as_tensor(names["chunk"]).reshape(policy.spec["action"]["shape"])
    torch.testing.assert_close(chunk, again[0], rtol=0, atol=1e-6)


# ---- what a file says ----------------------------------------------------------------------------------------------


def test_a_file_says_what_its_numbers_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = data(2, 4, pictures=True, tasks=True)
    policy = untrained("flow", known, policy="dit", encoder=("cnn", {"channels": [4]}))
    policy.configure(action_steps=3, sampling_steps=1)
    program, found = file_of(policy, tmp_path / "policy.pt2")
    check_readme("pt2", policy, program, found, tmp_path, monkeypatch)
    known["observation.images.top"]["resized_from"] = [[480, 640]]
    assert "scaled by one factor" in export.meant(policy, "observation.images.top")["units"]
    inputs, (action,) = found["inputs"], found["outputs"].values()
    assert inputs["observation.state"] == {"shape": [2, 3], "dtype": "float32", "units": export.UNITS}
    top = {"shape": [2, 3, 48, 44], "dtype": "uint8", "units": "pixels 0 to 255, channels first"}
    assert inputs["observation.images.top"] == top
    assert inputs["task_index"]["dtype"] == "int64" and found["tasks"] == ["lift", "turn"]
    assert action["shape"] == found["action"] == [4, 2] and action["names"] == ["lift", "turn"]
    assert action["range"] == [[0.0, -1.0], [20.0, 1.0]] and action["units"] == export.UNITS
    assert found["rates"] == {"control_hz": 30.0, "action_steps": 3}
    assert found["inference"]["obs_steps"] == 2 and found["inference"]["action_steps"] == 3
    assert found["versions"]["torch"] == torch.__version__ and found["precision"] == "float32"
    assert export.description(policy, rate=50)["rates"]["control_hz"] == 50


def test_names_and_rate_of_recordings_are_kept() -> None:
    columns = {"observation.state": torch.randn(6, 3), "action": torch.randn(6, 2)}
    episodes = from_columns(columns, torch.tensor([6]), "recorded")
    episodes.names = {"action": ["lift", "turn"], "observation.state": ["of", "another", "width", "of four"]}
    episodes.stored = {"fps": 30}
    spec = describe_data(build(episodes, obs_steps=2, action_steps=8, validation=0), "recorded")
    assert "names" not in spec["observation.state"]
    assert (spec["action"]["names"], spec["action"]["fps"]) == (["lift", "turn"], 30.0)


def test_discrete_actions_are_numbers(tmp_path: Path, online: Callable[..., Path]) -> None:
    policy = load_policy(online(*toy.ONLINE_ALONE["dqn"], "--steps", 40))
    program, found = file_of(policy, tmp_path / "policy.pt2")
    assert found["outputs"]["action"] == {
        "shape": [], "dtype": "int64", "units": "number of the chosen action", "range": [0, 2]
    }  # fmt: skip
    assert all(farthest(policy, program, rows) == 0 for rows in ROWS)


# ---- formats -------------------------------------------------------------------------------------------------------


def test_bfloat16_is_half_the_weights_and_close(tmp_path: Path) -> None:
    policy = untrained("bc", data(), policy="mlp")
    before = {name: value.clone() for name, value in policy.module.named_parameters()}
    program, found = file_of(policy, tmp_path / "policy.bf16.pt2", bf16=True)
    stored = torch.export.load(tmp_path / "policy.bf16.pt2").state_dict
    assert {value.dtype for value in stored.values()} == {torch.bfloat16} and found["precision"] == "bfloat16"
    assert all(0 < farthest(policy, program, rows) <= export.TOLERANCE["bf16"] for rows in ROWS)
    assert all(torch.equal(value, before[name]) for name, value in policy.module.named_parameters())


def test_a_sampler_in_bfloat16_keeps_its_schedule_and_its_sums() -> None:
    policy = untrained("diffusion", data(), policy="unet1d")
    lower = export.Whole(policy, bf16=True)
    assert lower.module.alpha_bar.dtype == torch.float32 and torch.equal(
        lower.module.alpha_bar, policy.module.alpha_bar
    )
    assert 0 < export.difference(policy, lower) <= export.TOLERANCE["bf16"]


def test_bfloat16_is_refused_where_actions_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(export.TOLERANCE, "bf16", 1e-6)
    with pytest.raises(UserError, match="differ by .* of their range; nothing is written"):
        export.export(untrained("bc", data(), policy="mlp"), tmp_path / "policy.pt2", bf16=True)
    assert not list(tmp_path.iterdir())


def test_a_residual_policy_is_not_taken_for_the_one_that_it_corrects(tmp_path: Path) -> None:
    one = untrained("bc", data(1, 1), policy="mlp")
    both: Any = CorrectedPolicy(one, one, Middle([-1, -1], [1, 1], 0.1))
    with pytest.raises(UserError, match="is no single program; the frozen one alone is exported from its folder"):
        export.export(both, tmp_path / "policy.pt2")


def onnx_of(policy: Policy, folder: Path) -> tuple[programs.Program, dict[str, Any]]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    return file_of(policy, folder / "policy.onnx")


def check_onnx(policy: Policy, folder: Path) -> dict[str, Any]:
    program, found = onnx_of(policy, folder)
    assert all(farthest(policy, program, rows) <= 1e-4 for rows in ROWS)
    return found


def test_onnx_acts_alike_and_names_its_inputs(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    known = data(2, 4, pictures=True, tasks=True)
    policy = untrained("bc", known, "nll", policy=("gru", {"hidden": 8, "head": "mixture"}), encoder="nature_cnn")
    found = check_onnx(policy, tmp_path)
    session = runtime.InferenceSession(str(tmp_path / "policy.onnx"))
    assert [one.name for one in session.get_inputs()] == list(found["inputs"]) == list(export.example(policy, 1))
    assert json.loads(session.get_modelmeta().custom_metadata_map["policy.json"]) == found
    assert found == json.loads(json.dumps(export.description(policy)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "network", "settings"),
    [
        ("act", ("act", SMALL["act"] | {"experts": 3}), {}),
        ("diffusion", "unet1d", {"sampler": "ddpm", "sampling_steps": 1}),
        ("bc", ("mlp", {"hidden_dims": [8], "head": "codebook", "codes": 4}), {"sampler": "sample"}),
    ],
)  # of bc and flow, the tests before and after
def test_every_imitation_trainer_has_an_onnx_form(
    tmp_path: Path, trainer: str, network: Any, settings: dict[str, Any]
) -> None:
    check_onnx(untrained(trainer, data(1, 4), policy=network).configure(**settings), tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime$"):
        export.export(untrained("bc", data(), policy="mlp"), tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


# ---- as the README says --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_readme_calls_an_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = untrained("flow", data(2, tasks=True), policy="dit").configure(action_steps=3, sampling_steps=1)
    check_readme("onnx", policy, *onnx_of(policy, tmp_path), tmp_path, monkeypatch)


def test_the_commands_of_the_readme_go_together() -> None:
    lines = [
        line.split("#")[0].split() for line in SECTION.splitlines() if line.startswith("python -m components.export")
    ]
    assert len(lines) == 4
    for line in lines:
        export.check_args(export.parse(export.Args, line[3:], export.Args(run="runs/x", policy=Inference())))


# ---- latency -------------------------------------------------------------------------------------------------------


def test_latency_in_steps_of_the_robot() -> None:
    ms = latency.Latency(median=10.0, p95=14.0, calls=100)
    assert latency.meaning(ms, 30.0, 4) == "at 30 Hz a plan takes 0.42 steps: --policy.delay 1"
    assert [latency.delay(33.3, 30), latency.delay(33.4, 30), latency.delay(100, 50)] == [1, 2, 5]
    assert latency.meaning(ms, 100.0, 1).endswith(
        "--policy.delay 2; longer than the 1 that are executed of it, so the robot would wait"
    )
    assert [line.split(" a ")[0] for line in latency.meaning(ms, None, 4).splitlines()] == [
        f"at {rate} Hz" for rate in latency.RATES
    ]


def test_calls_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(latency, "MOST_CALLS", 3)
    found = latency.measure({name: lambda name=name: called.append(name) for name in "ab"})
    assert "".join(called) == "a" * latency.WARM_UP + "b" * latency.WARM_UP + "ababab"
    assert found["a"].calls == 3 and 0 < found["a"].median <= found["a"].p95


def test_check_measures_the_file_that_is_there(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "MOST_CALLS", 3)
    run = script("--trainer", "bc", "--steps", 1, "--dataset.action-steps", 4)
    asked = [str(run), "--check", "--rate", "50"]
    assert export.main(asked) == 0
    file = run / "policy" / "policy.pt2"
    written = file.stat().st_mtime_ns
    out = capsys.readouterr().out
    assert re.search(
        r"one observation to a plan, 3 calls each in turn, cpu, 1 thread:\n  policy +median [\d.e-]+ ms", out
    )
    assert re.search(r"  policy.pt2 +median [\d.e-]+ ms, 95 % within [\d.e-]+ ms, [\d.]+x as fast as the policy\n", out)
    assert "  at 50 Hz a plan takes " in out and "--policy.delay 1" in out
    assert export.main(asked) == 0 and file.stat().st_mtime_ns == written
    with pytest.raises(
        UserError, match="holds another policy, or other inference settings; remove it, or export it anew"
    ):
        export.main([*asked, "--policy.action-steps", "2"])
    file.write_bytes(b"none")
    with pytest.raises(UserError, match="damaged, or no exported policy; remove it"):
        export.main(asked)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bf16", "--format", "onnx"), "--bf16 with --format onnx"),
        (("--out", "policy.onnx"), "--out policy.onnx: with --format pt2 its name must end in .pt2"),
        (("--out", "policy.pt2", "--format", "pt2", "onnx"), "--out policy.pt2 is one file"),
        (("--rate", "0"), "--rate 0.0 must be above 0"),
        (("--licence", "mit"), "--private and --licence are for --to-hub USER/NAME"),
        (("--to-hub", "a/b", "--check"), "--to-hub a/b uploads what was exported before; export first, without it"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        export.check_args(args := export.parse(export.Args, ["a", *words], export.Args(run="a", policy=Inference())))
        export.destination(tmp_path, export.Chosen(tmp_path, 1, ""), args, "pt2")
