"""How much there is to read: code lines, names in the loops, long functions, flat modules, circles of imports.

python tests/test_budgets.py                         # prints the figures
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"offline_trainer.py": (300, 25, 45, 80), "online_trainer.py": (360, 40, 55, 90)}
"""Script -> most code lines, code lines of the loop, distinct names in the loop, code lines of `learn`."""
LONGEST = 60  # code lines of any other function
FLAT = 12  # modules of components/ that are in no package, `__init__` included
COMMENTS = 0.15  # least comment lines for each code line of a script
PROTOCOLS = 100  # code lines of protocols.py


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code: neither blank, nor a comment, nor part of a docstring.

    The text under a field of a dataclass counts as code.
    """
    tree = ast.parse(text)
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def comment_lines(text: str) -> int:
    """Lines that hold nothing but a comment."""
    return sum(bool(re.match(r"\s*#", line)) for line in text.splitlines())


def functions(text: str) -> dict[str, int]:
    """Code lines of each function and method, with those inside it, of those that may be long."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    spans = {
        f"{n.name}:{n.lineno}": (n.lineno, n.end_lineno or 0) for n in ast.walk(ast.parse(text)) if isinstance(n, kinds)
    }
    long = {name: range(first, last + 1) for name, (first, last) in spans.items() if last - first >= LONGEST}
    lines = code_lines(text) if long else set()
    return {name: len(lines & set(span)) for name, span in long.items()}


def loop_of(text: str) -> tuple[int, set[str]]:
    """Code lines of the `while` in `learn`, and the names and attributes in it."""
    learn = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "learn")
    loop = next(node for node in learn.body if isinstance(node, ast.While))
    names = {n.id for n in ast.walk(loop) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(loop) if isinstance(n, ast.Attribute)}
    return len(code_lines(text) & set(range(loop.lineno, (loop.end_lineno or 0) + 1))), names


def imports(path: Path) -> set[str]:
    """The modules of components/ that one of them imports when it is loaded."""
    package = path.relative_to(ROOT / "components").parts[:-1]
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            folder = ".".join(filter(None, base))
            for alias in node.names:
                inner = ROOT / "components" / folder.replace(".", "/") / f"{alias.name}.py"
                found.add(f"{folder}.{alias.name}".strip(".") if inner.exists() else folder)
    return found - {""}


def module_imports() -> dict[str, set[str]]:
    """Module -> modules, of components/, but for the registries, which import everything."""
    folder = ROOT / "components"
    paths = {".".join(p.relative_to(folder).with_suffix("").parts): p for p in folder.rglob("*.py")}
    return {name: imports(path) for name, path in paths.items() if not name.endswith("__init__")}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle in a graph, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        for after in sorted(graph.get(node, ())):
            if found := visit(after, [*path, node]):
                return found
        done.add(node)
        return []

    return next(filter(None, (visit(node, []) for node in graph)), [])


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_stay_short(name: str) -> None:
    text, (most, loop, names, learn) = (ROOT / name).read_text(), SCRIPTS[name]
    assert len(code_lines(text)) <= most
    assert comment_lines(text) >= COMMENTS * len(code_lines(text))
    lines, found = loop_of(text)
    assert lines <= loop and len(found) <= names, (lines, len(found), sorted(found))
    for function, length in functions(text).items():
        assert length <= (learn if function.startswith("learn:") else LONGEST), function


def test_no_function_is_long() -> None:
    paths = [ROOT / "protocols.py", *(ROOT / "components").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lengths = {f"{path}:{name}": n for path in paths for name, n in functions(path.read_text()).items()}
    assert not {name: n for name, n in lengths.items() if n > LONGEST}


def test_the_contracts_fit_on_a_screen() -> None:
    assert len(code_lines((ROOT / "protocols.py").read_text())) <= PROTOCOLS


def test_components_are_packages_by_subject() -> None:
    assert len(list((ROOT / "components").glob("*.py"))) <= FLAT
    text = (ROOT / "components" / "__init__.py").read_text()
    for folder in (ROOT / "components").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert f"{folder.name}/" in (ast.get_docstring(ast.parse(text)) or ""), f"{folder.name} is not on the map"


def test_imports_have_no_circle() -> None:
    graph = module_imports()
    assert not circle(graph)
    packages: dict[str, set[str]] = {}
    for name, after in graph.items():
        package = name.rpartition(".")[0] or name
        packages.setdefault(package, set()).update({a.rpartition(".")[0] or a for a in after} - {package})
    assert not circle(packages)


if __name__ == "__main__":
    for script in SCRIPTS:
        source = (ROOT / script).read_text()
        length, inside = loop_of(source)
        print(f"{script}: {len(code_lines(source))} code lines, {comment_lines(source)} comment lines")
        print(f"  loop: {length} code lines, {len(inside)} names; learn: {functions(source)}")
    everything = {p: functions(p.read_text()) for p in [*(ROOT / "components").rglob("*.py"), *ROOT.glob("*.py")]}
    longest = sorted(((n, f"{p.name}:{f}") for p, found in everything.items() for f, n in found.items()), reverse=True)
    print("longest functions:", longest[:5])
    print("flat modules:", len(list((ROOT / "components").glob("*.py"))), "circle:", circle(module_imports()))
    print("protocols.py:", len(code_lines((ROOT / "protocols.py").read_text())))
