"""Policies on the Hugging Face hub: a run's policy becomes a repository with a model card, and loads from there.

python -m components.export runs/x --to-hub USER/NAME          # once: hf auth login, or HF_TOKEN=... in the environment

    policy = load_policy("hf://USER/NAME")                     # or hf://USER/NAME@REVISION: a branch, tag or commit

Only the files of a policy are downloaded, into huggingface_hub's cache. They are a stranger's, and read like any:
nothing in them is executed. Without network, what is in the cache is used.
"""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..acting.inference import Inference
from ..acting.policy_folder import copy_policy, describe
from ..contracts import options_of
from ..data.actions import robot_width
from ..data.features import frame_shape, history_of
from ..errors import UserError, first_line, plain, require
from ..intervals import measured, of_mean, unbiased
from ..records import JSON_LIMIT
from .curves import read_lines
from .reading import read_args

ADDRESS = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@(.+))?")  # a `Path` has one slash less
NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
RECORDS, WEIGHTS = ("policy.json", "residual.json", "steered.json"), "model.safetensors"
FOLDERS = ("", "base/", "base/base/")  # of the frozen policies underneath
FILES = [folder + name for folder in FOLDERS for name in (*RECORDS, WEIGHTS)]
PROGRAMS = ("policy*.pt2", "policy*.onnx")
CALLS = {
    ".pt2": ("torch", 'torch.export.load("{}").module()'),
    ".onnx": ("onnxruntime", 'onnxruntime.InferenceSession("{}")'),
}
LARGEST = 1 << 35  # bytes of the weights that are downloaded
SECONDS = 10  # for an answer of the hub


def is_address(folder: Any) -> bool:
    """Whether a policy is on the hub."""
    return str(folder).startswith("hf:/")


def downloaded(address: Any) -> Path:
    """The folder of the policy at `hf://USER/NAME` or `hf://USER/NAME@REVISION`, downloaded once.

    Raises:
        UserError: no such repository, revision or policy, no permission, no network, or files that are too large.
    """
    found = ADDRESS.fullmatch(str(address))
    if not found or not NAME.fullmatch(found[1]):
        raise UserError(f"{address}: expected hf://USER/NAME, or hf://USER/NAME@REVISION")
    repository, revision = found[1], found[2]
    hub = require("huggingface_hub", "huggingface_hub")
    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": FILES, "etag_timeout": SECONDS}
    try:
        with _one_line(str(address), "is not to be had from the hub, nor in the cache"):
            info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=SECONDS)
            _check_sizes(str(address), {file.rfilename: file.size or 0 for file in info.siblings or ()})
            return Path(hub.snapshot_download(repository, **wanted))
    except UserError as error:
        if isinstance(error.__cause__, UserError) or error.__cause__ is None:  # it is there, and does not fit
            raise
        try:
            return Path(hub.snapshot_download(repository, local_files_only=True, **wanted))
        except Exception:
            raise error from error.__cause__


def _check_sizes(address: str, sizes: dict[str, int]) -> None:
    """Refuse a repository whose files, name -> bytes, are no policy, or too large for one."""
    if not {"policy.json", WEIGHTS} <= set(sizes):
        raise UserError(f"{address}: no policy here (policy.json and {WEIGHTS})")
    for name in FILES:
        most = LARGEST if name.endswith(WEIGHTS) else JSON_LIMIT
        if sizes.get(name, 0) > most:
            raise UserError(
                f"{address}: {name} has {sizes[name] / 1e9:.1f} GB; at most {most / 1e9:.1f} are downloaded"
            )


def publish(run: Path, chosen: Any, settings: Inference, repository: str, private: bool, licence: str) -> str:
    """Upload a policy, with its exported programs and a model card, in one commit; returns what to tell.

    Args:
        run: The run's folder, or one that holds a policy alone.
        chosen: The policy, a `Chosen` of its run.
        settings: Inference settings to save with it.
        repository: USER/NAME; made if it does not exist.
        private: Make it for its owner alone.
        licence: As the hub names it, such as mit or apache-2.0; "" to name none.

    Raises:
        UserError: no token, no permission, no network; or a repository of something else.
    """
    if not NAME.fullmatch(repository):
        raise UserError(f"--to-hub {repository}: expected USER/NAME, of letters, digits, '-', '_' and '.'")
    if licence and not re.fullmatch(r"[a-z0-9.+-]+", licence):
        raise UserError(
            f"--licence {licence!r}: expected an identifier of the hub, such as mit, apache-2.0 or cc-by-4.0"
        )
    hub = require("huggingface_hub", "huggingface_hub")
    if not hub.get_token():
        raise UserError(f"--to-hub {repository}: no token; log in once by: hf auth login (or set HF_TOKEN)")
    subject, problem = f"--to-hub {repository}", "was not uploaded"
    api = hub.HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "policy"
        copy_policy(chosen.folder, folder)
        with_settings(folder, settings)
        for program in programs(run, chosen):
            shutil.copyfile(program, folder / re.sub(r"-step-\d+", "", program.name))
        (folder / "README.md").write_text(card(run, chosen, folder, repository, licence), encoding="utf-8")
        with _one_line(subject, problem):
            if not _is_ours(api, repository, private):
                api.create_repo(repository, private=private)
            options: dict[str, Any] = {"delete_patterns": [*RECORDS, WEIGHTS, "base/*", *PROGRAMS]}
            options["commit_message"] = f"Policy of {chosen.step if chosen.step is not None else 'the last'} steps"
            commit = api.upload_folder(repo_id=repository, folder_path=folder, **options)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in files) / 1e6
        names = ", ".join(str(path.relative_to(folder)) for path in files)
    return f'{commit.commit_url}\n{size:.1f} MB: {names}\nload_policy("hf://{repository}")'


def _is_ours(api: Any, repository: str, private: bool) -> bool:
    """Whether there is a repository of a policy; False for none.

    It is also the first question to the hub, since this one has a time limit.

    Raises:
        UserError: it has other contents, or is one that everybody sees where none should.
    """
    from huggingface_hub.utils import RepositoryNotFoundError

    try:
        info = api.model_info(repository, timeout=SECONDS)
    except RepositoryNotFoundError:
        return False
    names = [file.rfilename for file in info.siblings or ()]
    others = [name for name in names if name not in (".gitattributes", "README.md", "LICENSE")]
    if others and "policy.json" not in names:
        raise UserError(f"it is of something else ({others[0]}) and would be changed; name a new repository")
    if private and not info.private:
        raise UserError(
            "--private: it exists, and everybody sees it; make it private in its settings, or name a new one"
        )
    return True


def with_settings(folder: Path, settings: Inference) -> None:
    """Write inference settings into the `policy.json` of a policy, or of the one that a residual policy corrects."""
    while (folder / "residual.json").exists():
        folder /= "base"
    path = folder / "policy.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"inference": asdict(settings)}, indent=1) + "\n")


def programs(run: Path, chosen: Any) -> list[Path]:
    """The files that `components.export` has made of a policy."""
    if (chosen.folder / "manifest.json").exists():  # a checkpoint's are in the run's folder, by their step
        step = f"-step-{chosen.step:09d}"
        return sorted(path for pattern in PROGRAMS for path in run.glob(pattern) if step in path.name)
    return sorted(path for pattern in PROGRAMS for path in chosen.folder.glob(pattern))


@contextmanager
def _one_line(subject: str, problem: str) -> Iterator[None]:
    """What huggingface_hub raises as one line that tells what to do."""
    from huggingface_hub import utils as errors

    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}" if subject not in str(error) else str(error)) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{subject} {problem}: it has no such revision") from error
    except errors.GatedRepoError as error:
        raise UserError(f"{subject} {problem}: its owner grants access on its page") from error
    except errors.RepositoryNotFoundError as error:
        hint = "no such repository, or it is private and the token (hf auth login) does not open it"
        raise UserError(f"{subject} {problem}: {hint}") from error
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        if code in (401, 403):
            hint = "the token is not valid here, or may not do this; it needs write access to upload"
            raise UserError(f"{subject} {problem}: {hint} ({code})") from error
        raise UserError(f"{subject} {problem}: {_first_line(error)}") from error
    except Exception as error:  # no network, a full disk, ...
        raise UserError(f"{subject} {problem}: {_first_line(error)}; check the network") from error


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened, with its kind."""
    text, kind = first_line(error)[:160], type(error).__name__
    return plain(text if text == kind else f"{kind}: {text}")


# ---- the model card ------------------------------------------------------------------------------------------------


def card(run: Path, chosen: Any, folder: Path, repository: str, licence: str) -> str:
    """The model card: the hub's YAML header, then task, data, figures, command, how to load, licence.

    Args:
        run: The run's folder; what it lacks, such as evaluations, is left out.
        folder: The policy's, as it is uploaded.
    """
    _, record = describe(folder)
    about = read_args(run) if (run / "args.json").exists() else None
    trainer = record["trainer"]["name"]
    tags = ["robotics", "tendon", trainer, *([about["args"]["dataset"]] if about else [])]
    header: dict[str, Any] = {"library_name": "tendon", "pipeline_tag": "robotics", "tags": list(dict.fromkeys(tags))}
    header |= {"license": licence} if licence else {}
    if about and (identity := about["args"]["dataset_options"].get("repo_id")):
        header["datasets"] = [identity]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines += [f"# {repository.partition('/')[2]}", "", f"A robot policy, trained by Tendon's `{trainer}`.", ""]
    lines += [
        "| what | |",
        "|---|---|",
        *(f"| {name} | {_cell(text)} |" for name, text in _facts(chosen, record, about)),
    ]
    lines += ["", "## Figures", "", *_figures(run, chosen)]
    if about:
        lines += ["", "## Command", "", "```bash", f"python {' '.join(_command(about))}", "```"]
    use = ["from components import load_policy  # in a clone of Tendon", ""]
    use.append(f'policy = load_policy("hf://{repository}")')
    spec = record["spec"]
    keys = [f'"{key}": ...' for key in spec if key.startswith("observation.")]
    keys += [f'"task": {json.dumps(text)}' for text in spec.get("task", {}).get("values", ())[:1]]
    use.append(f"chunk = policy.plan({{{', '.join(keys)}}})  # {_chunk(spec)}, in the robot's units")
    lines += ["", "## Use", "", "```python", *use, "```", ""]
    if plugins := record["plugins"]:
        lines += [f"Import what registers its components first: {', '.join(Path(name).name for name in plugins)}.", ""]
    for path in sorted(path for pattern in PROGRAMS for path in folder.glob(pattern)):
        needs, call = CALLS[path.suffix]
        lines += [f"`{path.name}` needs {needs} alone: `{call.format(path.name)}`.", ""]
    lines += ["## Licence", "", licence or "Not named.", ""]
    return "\n".join(lines)


def _facts(chosen: Any, record: dict[str, Any], about: dict[str, Any] | None) -> list[tuple[str, str]]:
    """(name, text) of each line of the card's table."""
    spec, steps = record["spec"], math.prod(history_of(record["spec"]))
    shapes = {key: list(frame_shape(of, steps)) for key, of in spec.items() if key.startswith("observation.")}
    inputs = ", ".join(f"`{key}` {shape}" for key, shape in shapes.items())
    facts = [("steps", "the last" if chosen.step is None else f"{chosen.step:,}")]
    if about:
        words = ", ".join(f"{key} {_bare(value)}" for key, value in _changed(about["args"]).items())
        env = about["env"] or {}
        task = (
            " ".join(str(_bare(value)) for key, value in env.items() if key in ("name", "task", "id")) or "none known"
        )
        facts += [("data", f"`{about['args']['dataset']}` {words}"), ("environment", task)]
    if tasks := spec.get("task", {}).get("values", ()):
        facts.append(("tasks", ", ".join(tasks)))
    action = spec["action"]
    rate = f" at {action['fps']:g} Hz" if "fps" in action else ""
    names = f": {', '.join(action['names'])}" if "names" in action and "form" not in action else ""
    facts += [("observations", inputs + (f", the last {steps}" if steps > 1 else ""))]
    facts += [("action", f"{_chunk(spec)}{rate}{names}")]
    usual = asdict(Inference())
    how = ", ".join(f"{key} {value}" for key, value in record["inference"].items() if value != usual.get(key))
    return [*facts, *([("inference", how)] if how else [])]


def _chunk(spec: dict[str, Any]) -> list[int]:
    """Shape of what `plan` returns."""
    shape, chunked = spec["action"]["shape"], "action_is_pad" in spec
    return [shape[0] if chunked else 1, *([robot_width(spec["action"])] if shape[chunked:] else [])]


def _changed(args: dict[str, Any]) -> dict[str, Any]:
    """The dataset's options that are not its defaults, and those that say which data it is."""
    from .. import DATASET_BUILDER_REGISTRY

    usual = options_of(DATASET_BUILDER_REGISTRY.get(args["dataset"], object))
    known = {key: value for key, value in args["dataset_options"].items() if not isinstance(value, dict)}
    named = {key: value for key, value in known.items() if key in ("task", "path", "repo_id", "id") and value}
    own = {
        key: tuple(value) if isinstance(value, list) else value for key, value in known.items() if key != "cache_dir"
    }
    return named | {key: value for key, value in own.items() if value != getattr(usual, key, None)}


def _figures(run: Path, chosen: Any) -> list[str]:
    """Each evaluation of this policy with its 95 % interval; the newest one of each environment and settings."""
    lines = read_lines(run / "eval.jsonl")
    step = chosen.step if chosen.step is not None else max((line["step"] for line in lines), default=0)
    newest = {json.dumps([line["env"], line.get("inference")]): line for line in lines if line["step"] == step}
    how = [line.get("inference") or {} for line in newest.values()]
    differ = [key for key in {key: None for one in how for key in one} if len({str(one.get(key)) for one in how}) > 1]
    rows = [
        f"| {_cell(_where(line, differ))} | {name} | {value} | {line['episodes']} |"
        for line in newest.values()
        for name, value in _values(line)
    ]
    return (
        ["| where | what | value [95 %] | episodes |", "|---|---|---|---|", *rows]
        if rows
        else ["It was not evaluated."]
    )


def _where(line: dict[str, Any], differ: Sequence[str]) -> str:
    """Where an evaluation took place, and those inference settings in which several differ."""
    where = [str(_bare(value)) for key, value in line["env"].items() if key in ("name", "task", "id", "data")]
    how = [f"{key} {value}" for key in differ if (value := (line.get("inference") or {}).get(key)) is not None]
    return ", ".join([" ".join(where), *how])


def _values(line: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value with interval) of an evaluation."""
    found = []
    if line.get("success_rate") is not None:
        found.append(("success rate", measured(line["success_rate"], tuple(line["success_ci"]))))
    if line.get("return_mean") is not None:
        count, mean = line["episodes"], line["return_mean"]
        interval = of_mean(mean, unbiased(line.get("return_std") or 0.0, count), count) if count > 1 else None
        found.append(("return", measured(mean, interval)))
    if line.get("action_error") is not None:
        found.append(("error of predicted actions, in deviations", measured(line["action_error"], None)))
    return found


def _command(about: dict[str, Any]) -> list[str]:
    """The command line, without the run's folder, and without folders of this machine before names of files."""
    words, found = iter(about["command"]), list[str]()
    for word in words:
        if word == "--run-dir":
            next(words, None)
        elif not word.startswith("--run-dir="):
            bare = str(_bare(word))
            found.append(bare if re.fullmatch(r"[\w./=:,+@-]+", bare) else "'" + bare.replace("'", "'\\''") + "'")
    return found


def _bare(value: Any) -> Any:
    """A text without the folders of this machine: the name alone of what is an absolute path."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _cell(text: str) -> str:
    """A text as a cell of a table."""
    return plain(text).replace("|", "\\|")
