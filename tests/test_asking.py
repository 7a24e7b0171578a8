"""What the command line answers: `--help`, `--list`, whose an option is, the reader of a path, plugins from files."""

import json
import multiprocessing
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tyro

import offline_trainer
import online_trainer
from components import DATASET_BUILDER_REGISTRY, REGISTRIES, UserError, evaluate, export, report
from components.datasets import convert, inspect, label
from components.datasets.recognise import recognise
from components.run import arguments, command_line
from components.run.help import COLUMN, options_in
from components.run.reading import read_args
from conftest import FIXTURES, difference, in_this_process, weights

Script = Callable[..., Path]
SECTIONS = ["Components", "Training", "Evaluation", "Saving", "Tracking"]


def shown(main: Callable[[list[str]], int], *words: str) -> Callable[[pytest.CaptureFixture[str]], str]:
    """What a command prints before it exits with 0."""

    def read(capsys: pytest.CaptureFixture[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        assert not stop.value.code
        return capsys.readouterr().out

    return read


def sections(page: str) -> dict[str, str]:
    """Title -> text, of a page of help."""
    parts = re.split(r"^(\S.*):$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# ---- --help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [offline_trainer, online_trainer])
def test_help_is_in_groups_and_says_how_it_follows(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(script.main, "--help")(capsys)
    head = page[: page.index("Components:")]
    assert head.startswith(f"usage: python {script.__name__}.py [OPTIONS]\n") and head.count("\n") < 15
    for word in ("Help follows --trainer, --dataset, --model", " --help, or --list", "--model policy="):
        assert word in " ".join(head.split()), word
    groups = sections(page)
    assert list(groups)[:5] == SECTIONS
    for prefix, title in (("eval-", "Evaluation"), ("save-", "Saving"), ("keep-", "Saving"), ("track", "Tracking")):
        found = {t for t, text in groups.items() if re.search(rf"^  --{prefix}", text, re.MULTILINE)}
        assert found == {title}, prefix
    chosen = [title for title in groups if title.split()[0] in ("Trainer", "Dataset", "Model", "Optimizer", "Loss")]
    assert len(chosen) >= 5 and "Environment" in list(groups)[-2]
    for field in fields(script.Args):
        if not field.name.endswith("_options") and field.name not in ("augment", "policy"):
            name = field.name.replace("_", "-").replace("dataset-ratio", "dataset.ratio")
            assert len(re.findall(rf"^  --{name}[ ,]", page, re.MULTILINE)) == 1, name
    assert "fp16" not in page and "(default: '')" not in page


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_help_is_wrapped_anew(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line is as full as the screen allows, whatever the lines of a docstring were, and no fuller."""
    monkeypatch.setenv("COLUMNS", str(columns))
    page = shown(offline_trainer.main, "--trainer", "act", "--dataset", "lerobot", "--help")(capsys)
    lines, width = page.splitlines(), min(columns, 120)
    assert max(map(len, lines)) <= width
    assert "pays for long runs, and says from which step on." in " ".join(page.split())
    indent = " " * (COLUMN if columns > 70 else 8)
    for line, after in zip(lines, lines[1:], strict=False):
        if line.startswith(indent) and after.startswith(indent):
            word = after.strip() if after.strip().startswith("(default:") else after.split()[0]
            assert len(line) + 1 + len(word) > width, line


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (offline_trainer, ("--trainer", "hiql")),
        (offline_trainer, ("--trainer", "diffusion", "--dataset", "mixture", "--env", "pusht", "--loss", "huber")),
        (online_trainer, ("--trainer", "ppo", "--optimizer", "sgd")),
    ],
)
def test_help_shows_what_tyro_takes(script: Any, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is made from the dataclasses, so it is compared with the options that tyro finds there.

    Of these, tyro is shown those that the words name: each of them must be known when it is named alone.
    """
    kept: list[Any] = []
    real = command_line._tyro
    monkeypatch.setattr(command_line, "_tyro", lambda values, argv: kept.append(values) or real(values, argv))
    args = arguments.parse(script.Args, list(words), REGISTRIES)
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        texts: list[str] = []
        patch.setattr(sys.stdout, "write", texts.append)
        tyro.cli(script.Args, args=["--help"], default=kept[-1])
    theirs = set(re.findall(r"--[a-z][\w.-]*", re.sub(r"(?m)^ {5,}.*$", "", "".join(texts)))) - {"--help"}
    theirs = {flag.rstrip(".") for flag in theirs}
    ours = {flag for _, options in options_in(type(args), args) for one in options for flag in one.flags}
    assert ours == theirs
    for flag in ours:
        assert fields(command_line._asked(args, [f"--{flag[2:].replace('-', '_')}=1"])), flag


def test_completion_of_a_shell_has_all_options_and_their_texts(capsys: pytest.CaptureFixture[str]) -> None:
    script = shown(offline_trainer.main, "--tyro-print-completion", "bash")(capsys)
    for word in ("--trainer", "--batch-size", "--dataset.task", "--model.hidden-dims"):
        assert word in script, word
    assert "Samples per update" in script


@pytest.mark.parametrize(
    ("main", "usage"),
    [
        (evaluate.main, "components.evaluate RUN [OPTIONS]"),
        (export.main, "components.export RUN [OPTIONS]"),
        (report.main, "components.report [RUNS ...] [OPTIONS]"),
        (inspect.main, "components.datasets.inspect [PATH] [OPTIONS]"),
        (convert.main, "components.datasets.convert [SOURCE] DEST [OPTIONS]"),
        (label.main, "components.datasets.label [DATA] --out FOLDER [OPTIONS]"),
    ],
)
def test_commands_are_named_as_they_are_started(
    main: Callable[[list[str]], int], usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(main, "--help")(capsys).startswith(f"usage: python -m {usage}\n")


def test_a_module_that_runs_is_named_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `python -m`, where the module is called `__main__`; a script has no spec then."""
    monkeypatch.setattr(report.Args, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", report.__spec__)
    assert shown(report.main, "--help")(capsys).startswith("usage: python -m components.report ")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/somewhere/my_copy.py")
    assert shown(report.main, "--help")(capsys).startswith("usage: python my_copy.py ")


# ---- --list --------------------------------------------------------------------------------------------------------

PLUGIN = '''"""Mine."""

from dataclasses import dataclass

from components import LOSS_BUILDER_REGISTRY
from components.losses import L1


@dataclass(frozen=True)
class Own(L1):
    """A loss of my own,
    in two lines."""

    weight: float = 1.0  # what it is multiplied by


def three():
    return 3


LOSS_BUILDER_REGISTRY["own"] = Own
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin in a folder of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(REGISTRIES["loss"], "own", None)  # type: ignore[arg-type]
    del REGISTRIES["loss"]["own"]
    monkeypatch.delitem(sys.modules, "my_own", raising=False)
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "my_own.py"
    path.write_text(PLUGIN)
    return path


def test_list_has_a_line_for_each_component(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(offline_trainer.main, "--plugins", "sub/my_own.py", "--list", "--trainer", "nonsense")(capsys)
    groups = sections(page)
    assert len(groups) == len(REGISTRIES)
    for (title, text), (option, registry) in zip(groups.items(), REGISTRIES.items(), strict=True):
        assert f"--{option} NAME" in title
        assert [line.split()[0] for line in text.strip().splitlines()] == list(registry)
    assert "Behaviour cloning: regression from observations to the demonstrated actions (Pomerleau, 1989)." in page
    assert "  own           A loss of my own, in two lines.\n" in page
    assert re.search(r"ppo .*\[by online_trainer.py\]", page) and not re.search(r"iql .*\[", page)
    assert re.search(r"gcbc .*\[by offline_trainer.py\]", shown(online_trainer.main, "--list")(capsys))


def test_a_plugin_is_in_help(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--plugins", "sub/my_own.py", "--loss", "own", "--help")
    page = sections(shown(offline_trainer.main, *words)(capsys))
    assert "what it is multiplied by (default: 1.0)" in page["Loss own"] and ", own." in page["Components"]


# ---- whose an option is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--trainer bc --trainer.kl-weight 3", "--trainer.kl-weight; an option of act: --trainer act$"),
        ("--trainer.kl-wieght=3", r"--trainer.kl-wieght; nearest: --trainer.kl-weight \(with --trainer act\)$"),
        ("--trainer.expectile 0.7", "an option of iql, ifql, gciql and hiql: --trainer iql, ifql, gciql or hiql$"),
        ("--trainer.no-clip 1", "unknown option --trainer.no-clip; "),
        ("--dataset.repo_id lerobot/pusht", "--dataset.repo-id; an option of lerobot"),
        ("--dataset metaworld --dataset.cache x", "it is called --dataset.cache-dir now$"),
        ("--optimizer.momentum 1", "an option of sgd: --optimizer sgd$"),
        ("--model.channels 1", "nearest: --model.encoder.channels$"),
        ("--model.critic.members 3", "the trainer bc has no model 'critic'; it has policy, encoder$"),
        ("--model.encoder.keypoints 3", "an option of resnet18: --model encoder=resnet18$"),
        ("--model.latent 3", "an option of act: --model act$"),
        ("--num-envs 3", "--num-envs is an option of online_trainer.py$"),
        ("--no-save-buffer", "--no-save-buffer is an option of online_trainer.py$"),
        ("--dataset.ratio 0.5", "--dataset.ratio is an option of online_trainer.py$"),
        ("--mixed-precision fp16", "^--mixed-precision fp16 is not supported .*; use bf16$"),
        ("--dataset.path nowhere", "^--dataset.path nowhere: no such file or folder$"),
        ("--dataset.path README.md", "^--dataset.path README.md: not recognised as lerobot .* name the format"),
        ("--dataset.path", "^--dataset.path: expected a file or folder$"),
    ],
)
def test_an_option_of_something_else_says_whose_it_is(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(offline_trainer.__file__).parent)
    with pytest.raises(UserError, match=message) as error:
        offline_trainer.main(words.split())
    assert "\n" not in str(error.value)


def test_an_offline_option_in_the_online_script() -> None:
    with pytest.raises(UserError, match="--augment.shift is an option of offline_trainer.py"):
        online_trainer.main(["--augment.shift", "3"])


# ---- which reader a path has ---------------------------------------------------------------------------------------


def test_a_path_without_a_reader_is_recognised_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--trainer", "bc", "--env", "none", "--dataset.validation", 0, "--batch-size", 16)
    words += ("--optimizer.schedule", "constant")
    path = FIXTURES / "pusht_planner.npz"

    def start(*more: object, folder: str) -> Path:
        run = tmp_path / folder
        in_this_process(
            offline_trainer.main, [*map(str, more)] + ([] if "--resume" in more else ["--run-dir", str(run)])
        )
        return run

    run = start(*words, "--dataset.path", path, "--steps", 2, folder="recognised")
    assert f"--dataset.path {path} is recognised, as with --dataset pusht" in capsys.readouterr().out
    record = read_args(run)
    assert record["args"]["dataset"] == "pusht" and record["argv"][:2] == ["--dataset", "pusht"]
    start("--resume", run, "--steps", 4, folder="recognised")
    named = start("--dataset", "pusht", *words, f"--dataset.path={path}", "--steps", 4, folder="named")
    assert "is recognised" not in capsys.readouterr().out and difference(weights(run), weights(named)) == 0


def test_a_default_reader_keeps_what_only_it_knows(tmp_path: Path) -> None:
    """gcbc's own reader stays for what is not recognised, and gives way to another format."""
    (tmp_path / "some.bin").write_text("")
    for path, name in ((tmp_path / "some.bin", "ogbench"), (FIXTURES / "pusht_planner.npz", "pusht")):
        args = arguments.parse(offline_trainer.Args, ["--trainer", "gcbc", "--dataset.path", str(path)], REGISTRIES)
        assert args.dataset == name


def test_a_folder_of_two_formats_names_them(tmp_path: Path) -> None:
    for mark in ("meta/info.json", "data/metadata.json"):
        (tmp_path / mark).parent.mkdir(exist_ok=True)
        (tmp_path / mark).write_text("{}")
    with pytest.raises(UserError, match="several formats fit, lerobot and minari; name the format by --dataset"):
        recognise(str(tmp_path))


def test_a_run_with_an_option_by_its_former_name_resumes(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--trainer", "bc", "--dataset.episodes", 8, "--optimizer.schedule", "constant")
    run = script(*words, "--steps", 2)
    path = run / "args.json"
    record = json.loads(path.read_text())
    record["args"]["dataset_options"]["number"] = record["args"]["dataset_options"].pop("episodes")
    record["argv"] = [word.replace("--dataset.episodes", "--dataset.number") for word in record["argv"]]
    path.write_text(json.dumps(record))
    monkeypatch.setattr(DATASET_BUILDER_REGISTRY["toy"], "former_names", {"number": "episodes"}, raising=False)
    script("--config", run, "--steps", 1, folder="another")
    script("--resume", run, "--steps", 4)
    for renewed in (run, run.with_name("another")):
        assert read_args(renewed)["args"]["dataset_options"]["episodes"] == 8
    assert difference(weights(run), weights(script(*words, "--steps", 4, folder="whole"))) == 0


def test_no_option_at_all_is_the_default_run() -> None:
    assert arguments.parse(offline_trainer.Args, [], REGISTRIES).trainer == offline_trainer.Args.trainer
    assert arguments.parse(online_trainer.Args, [], REGISTRIES).trainer == online_trainer.Args.trainer


# ---- plugins from files --------------------------------------------------------------------------------------------


def test_a_plugin_may_be_a_file(script: Script, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = script("--plugins", "sub/my_own.py", "--trainer", "bc", "--loss", "own", "--loss.weight", 2, "--steps", 1)
    assert read_args(run)["args"]["plugins"] == [str(mine)]
    monkeypatch.chdir(mine.parent)
    asked = f"needs plugins, .* if you trust it, add --plugins {mine}$"
    with pytest.raises(UserError, match=asked):
        script("--resume", run, "--steps", 2)
    with pytest.raises(UserError, match=asked):
        export.main([str(run)])
    export.main([str(run), "--plugins", "my_own"])  # by the name of its module
    script("--resume", run, "--steps", 2, "--plugins", "my_own.py")
    assert read_args(run)["args"]["plugins"] == [str(mine)]


def test_files_that_cannot_be_plugins(mine: Path) -> None:
    other = mine.parent.parent / "my_own.py"
    other.write_text(PLUGIN)
    broken = mine.with_name("my_broken.py")
    broken.write_text("x = 1\ny = x / 0\n")
    command_line.import_plugins([str(mine), "sub/my_own.py"])
    for word, message in (
        (str(other), f"{re.escape(str(mine))} has the name 'my_own'; rename one of them"),
        ("torch.py", "no such file; the working directory is"),
        ("sub/my_own", "for the file, write --plugins sub/my_own.py$"),
        ("./none", "no such module in .* or on the Python path, nor a file ./none.py$"),
        (str(broken), "ZeroDivisionError: .*my_broken.py:2"),
    ):
        with pytest.raises(UserError, match=message):
            command_line.import_plugins([word])
    for name, message in (("random", "has the name 'random'"), ("metaworld", "'metaworld'"), ("a.b", "no module can")):
        path = mine.with_name(f"{name}.py")
        path.write_text("raise SystemExit('hidden')")
        with pytest.raises(UserError, match=message):
            command_line.import_plugins([str(path)])


@pytest.mark.slow
def test_processes_that_are_spawned_find_the_plugin(mine: Path) -> None:
    command_line.import_plugins([str(mine)])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(sys.modules["my_own"].three) == 3
