"""`--config FILE`: a run's args.json, or a TOML of options, as if they had been typed."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import offline_trainer
import online_trainer
from components import REGISTRIES, UserError
from components.run.arguments import parse
from components.run.config_file import words_of

Script = Callable[..., Path]

TOML = """
steps = 20
batch-size = 16
eval_episodes = 0
normalise = ["action=scale"]
compile = false
[trainer]
name = "iql"
expectile = 0.9
[dataset]
name = "toy"
action_scale = 4.0
[model]
hidden_dims = [16]
[model.critic]
hidden-dims = [16, 8]
[model.value]
name = "v_ensemble"
hidden_dims = [4]
[augment]
shift = 2
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parsed(text: str, *options: object, of: Any = offline_trainer) -> Any:
    """The script's arguments with a TOML of this text."""
    Path("options.toml").write_text(text)
    return parse(of.Args, ["--config", "options.toml", *map(str, options)], REGISTRIES)


def test_a_toml_says_what_the_command_line_would() -> None:
    typed = "--trainer iql --trainer.expectile 0.9 --dataset toy --dataset.action-scale 4 --steps 30 --batch-size 16"
    typed += " --eval-episodes 0 --normalise action=scale --model.hidden-dims 16 --model.critic.hidden-dims 16 8"
    typed += " --model.value.hidden-dims 4 --augment.shift 2 --model value=v_ensemble"
    args, wanted = parsed(TOML, "--steps", 30), parse(offline_trainer.Args, typed.split(), REGISTRIES)
    assert asdict(args) == asdict(wanted) | {"model": args.model}
    assert args.given("batch-size") and args.given("trainer.expectile") and not args.given("seed")
    again = parse(offline_trainer.Args, args.argv, REGISTRIES)  # what is recorded, and parsed on a resume
    assert asdict(again) == asdict(args) and "--config" not in args.argv


def test_what_stands_beside_it_wins(capsys: pytest.CaptureFixture[str]) -> None:
    args = parsed(TOML, "--no-compile", "--trainer.expectile", 0.6, "--model", "critic=q_ensemble")
    again = parse(offline_trainer.Args, args.argv, REGISTRIES)
    assert (
        asdict(again) == asdict(args)
        and args.models["critic"][0] == "q_ensemble"
        and args.models["value"][0] == "v_ensemble"
    )
    assert args.trainer_options.expectile == 0.6 and args.model_options.critic.hidden_dims == (16, 8) and not args.notes
    args = parsed(TOML, "--trainer", "bc")
    assert args.model_options.policy.hidden_dims == (16,) and args.dataset_options.action_scale == 4
    (note,) = args.notes
    assert note.startswith("options.toml, with --trainer bc instead of its own; left out: ")
    for key in ("trainer.expectile", "model.critic.hidden_dims", "model.value.hidden_dims", "model value=v_ensemble"):
        assert key in note
    args = parsed("[model]\nname = 'mlp'\nhidden_dims = [3]", "--model", "resmlp")
    assert args.models["policy"][0] == "resmlp" and args.notes[0].endswith("left out: model.hidden_dims")
    args = parsed("steps = 77_000\n[dataset]\nname = 'toy'\nepisodes = 9", "--debug")  # small, whatever the file says
    assert args.debug and args.steps == 40 and args.batch_size == 32 and args.dataset_options.episodes == 9
    assert parsed("debug = true\nsteps = 7").steps == 7 and parsed("debug = true", "--no-debug").steps > 40
    assert parsed("seeds = [1, 2]", "--seed", 3).seeds == () and parsed("seed = 1", "--seeds", 2, 3).seeds == (2, 3)
    with pytest.raises(SystemExit):
        parsed(TOML, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.9)" in shown and "(default: 16 8)" in shown
    of_online = "[dataset]\nname = 'toy'\nratio = 0.25\n[trainer]\nname = 'rlpd'"
    assert parsed(of_online, of=online_trainer).dataset_ratio == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "unknown option --stepz; nearest: --steps"),
        ("batchsize = 3", "unknown option --batchsize; nearest: --batch-size"),
        ("zzzzzz = 3", "unknown option --zzzzzz; see --help"),
        ("steps = '3'", "steps is '3'; expected a whole number"),
        ("steps = true", "steps is True; expected a whole number"),
        ("steps = 0", "--steps 0 must be 1 or more"),
        ("freeze = 'encoder'", "freeze is 'encoder'; expected a list"),
        ("steps = 1979-05-27", "steps is datetime.date"),
        ("trainer = 'bcc'", "trainer is 'bcc'; nearest: bc"),
        ("trainer = 3", "trainer is 3; expected a text"),
        ("model = 'mpl'", "--model mpl: unknown model; nearest: mlp"),
        ("model = ['critic=mlp']", "the trainer has no model 'critic'"),
        ("[trainer]\nname = 'iql'\nexpectle = 1.0", "unknown option --trainer.expectle; nearest: --trainer.expectile"),
        (
            "[model.critic]\nhidden_dims = [3]",
            "unknown option --model.critic.hidden-dims; the trainer bc has no model 'critic'",
        ),
        ("[optimizer]\nschedule = 'cosin'", "optimizer.schedule is 'cosin'; expected one of 'constant', .*'cosine'"),
        ("steps = ", "no valid TOML .Invalid value"),
        ("x = " + "[" * 9999, "options.toml: "),
        ("resume = 'x'", "resume is for the command line"),
        ("batch-size = 2\nbatch_size = 3", "batch_size is there twice"),
        ("seed = 1\nseeds = [1, 2]", "seed and seeds; keep one"),
        ("plugins = ['os']", "needs plugins, .* add --plugins os"),
        (
            "[env]\nname = 'gymnasium'\nid = 'antigravity:X-v0'",
            "which imports the module antigravity; .*--plugins anti",
        ),
        ("run_dir = '/tmp/x'", "--run-dir '/tmp/x', outside of the working directory; .* add --run-dir again"),
        ("[dataset]\nname = 'lerobot'\ncache_dir = '..'", "--dataset.cache-dir '..', outside"),
    ],
)
def test_bad_options_in_a_file_are_one_line_that_names_it(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parsed(text)
    assert "\n" not in str(error.value) and "options.toml" in str(error.value)


def test_what_a_file_reaches_is_confirmed_on_the_command_line() -> None:
    assert parsed("plugins = ['colorsys']", "--plugins", "colorsys").plugins == ("colorsys",)
    assert parsed("run_dir = '/tmp/x'", "--run-dir", "/tmp/x").run_dir == "/tmp/x"
    assert parsed("run_dir = 'runs/x'").run_dir == "runs/x"
    assert parsed("[dataset]\nname = 'lerobot'").dataset_options.cache_dir.startswith("~")  # the default is ours


def test_files_that_are_no_options(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "half.json").write_text('{"args": {"seed": 1}}')
    (tmp_path / "words.txt").write_text("")
    for name, message in (
        ("none.toml", "no such file"),
        (".", "no run here"),
        ("words.txt", "expected an args.json of a run, or a TOML"),
        ("list.json", "list.json: damaged or incomplete: .*expected the args.json of a run"),
        ("half.json", "half.json: damaged or incomplete"),
    ):
        with pytest.raises(UserError, match=message):
            parse(offline_trainer.Args, ["--config", name], REGISTRIES)


def test_a_runs_record_makes_the_same_run_again(script: Script, tmp_path: Path) -> None:
    """Also where its file has gone: a run resumes by what it recorded, and another begins by that."""
    Path("options.toml").write_text(TOML.replace("shift = 2", ""))
    small = ("--plugins", "toy", "--steps", 10)
    first = script("--config", "options.toml", *small, folder="first")
    Path("options.toml").unlink()
    script("--resume", first, "--plugins", "toy", "--steps", 12)
    second = script("--config", first / "args.json", "--plugins", "toy", folder="second")
    third = script("--config", second, "--plugins", "toy", folder="third")
    records = [json.loads((run / "args.json").read_text())["args"] for run in (first, second, third)]
    for record, run in zip(records, (first, second, third), strict=True):
        assert record["run_dir"] == str(run) and record["config"] == ""
        record["run_dir"] = ""
    assert records[0] == records[1] == records[2] and records[0]["steps"] == 12
    assert len({(run / "policy" / "model.safetensors").read_bytes() for run in (first, second, third)}) == 1
    record = json.loads((first / "args.json").read_text())
    record["args"]["optimizer_options"]["lr"] = 0.5  # by hand, and not in its command line
    (first / "args.json").write_text(json.dumps(record))

    def options(*words: object) -> Any:
        return parse(offline_trainer.Args, ["--config", str(first), *map(str, words)], REGISTRIES)

    with pytest.raises(UserError, match=r"first/args.json needs plugins, .* add --plugins toy"):
        options()
    assert options("--plugins", "toy").optimizer_options.lr == 0.5
    other = options("--plugins", "toy", "--trainer", "bc")  # as its command with another trainer
    assert other.optimizer_options.lr != 0.5 and other.steps == 12 and "critic" not in other.models
    with pytest.raises(UserError, match=r"is of a run of offline_trainer.py; use it with that script"):
        parse(online_trainer.Args, ["--config", str(first), "--plugins", "toy"], REGISTRIES)
    with pytest.raises(UserError, match="--config is for new runs"):
        script("--resume", first, "--plugins", "toy", "--config", first)
    record["args"]["colour"] = "red"
    (first / "args.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"args.json: unknown option --colour"):
        options("--plugins", "toy")


def test_words_of_values() -> None:
    assert words_of("a.b", True, bool) == ["--a.b"] and words_of("a.b", False, bool) == ["--a.no-b"]
    assert words_of("b", False, bool) == ["--no-b"] and words_of("b", True, bool | None) == ["--b", "True"]
    assert words_of("x", -1e-07, float) == ["--x=-0.0000001"] and words_of("x", 1e-07, float) == ["--x", "1e-07"]
    assert words_of("x", [-0.5, 2], Any) == ["--x", "-0.5", "2"]
    for value in (None, {}, [], [[1]], ["--y"], [""], [float("-inf")]):
        assert words_of("x", value, Any) == []
