"""How much code a run enters before its first optimizer step: python tests/entered.py [options of offline_trainer.py].

Prints the files and functions of the project that are called from the command line on, the code lines of those files,
and the files in the order in which they are entered.
"""

import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import offline_trainer  # noqa: E402
from test_budgets import code_lines  # noqa: E402


class ReachedError(Exception):
    """The first optimizer step begins."""


def entered(argv: list[str]) -> list[tuple[str, str]]:
    """(file, function) of the project in the order in which they are first called; no lambdas or comprehensions."""
    found: dict[tuple[str, str], None] = {}

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        if event == "call" and ROOT in path.parents and "/tests/" not in str(path) and "<lambda>" not in name:
            if frame.f_code.co_name[0] != "<":
                found.setdefault((str(path.relative_to(ROOT)), name), None)
            if name == "StepHook.__call__":
                sys.setprofile(None)
                raise ReachedError

    sys.setprofile(watch)
    try:
        offline_trainer.main(argv)
    except ReachedError:
        pass
    finally:
        sys.setprofile(None)
    return list(found)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        calls = entered([*(sys.argv[1:] or ["--trainer", "bc"]), "--run-dir", f"{folder}/run"])
    files = dict.fromkeys(file for file, _ in calls)
    lines = sum(len(code_lines((ROOT / file).read_text())) for file in files)
    print(f"{len(files)} files, {len(calls)} functions, {lines} code lines in these files")
    for file in files:
        print(f"  {file}: {', '.join(name for where, name in calls if where == file)}")
