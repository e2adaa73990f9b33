"""The house rules that a machine can check: the homes of every method, floors, sizes, light imports, public
names.

`methods` is walked: a method that is marked done has its parts, study, fidelity test, vectors' names, page
and results.
"""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from torchstone.kinds import KINDS
from torchstone.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "torchstone"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON = SOURCES + sorted((ROOT / "benchmarks").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.py"))
DONE = sorted(slug for slug, method in METHODS.items() if method.done)

LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS, MOST_PUBLIC_NAMES = 500, 60, 12, 40

# Lower floors know nothing of higher ones; packages in one line may use each other. `report` is below what
# writes reports: `diagnose` and `lab`.
FLOORS = (
    {"errors", "kinds", "methods", "version"},
    {"recipe", "stats", "storage"},
    {"nn"},
    {"models", "objectives", "optim", "data"},
    {"train"},
    {"report"},
    {"llm", "evals", "diagnose", "interop"},
    {"lab"},
    {"studies"},
    {"cli", "__main__"},
)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Methods ------------------------------------------------------------------------------------------


def test_the_index_holds_the_34_methods() -> None:
    assert len(METHODS) == 34
    for slug, method in METHODS.items():
        assert method.slug == slug
        assert method.claim.endswith(".") and method.title and method.authors and method.tags and method.vectors
        assert method.arxiv is None or method.arxiv.replace(".", "").isdigit()
        assert method.done or (not method.parts and method.study is None)


def test_the_index_agrees_with_the_vectors(reference_folder: Path) -> None:
    present = {path.name for path in reference_folder.iterdir() if path.suffix in (".npz", ".json")}
    assert {name for method in METHODS.values() for name in method.vectors} <= present


@pytest.mark.parametrize("slug", DONE)
def test_every_home_of_a_done_method_exists(slug: str) -> None:
    homes = METHODS[slug].paths()
    missing = [
        path for name, paths in homes.items() if name != "vectors" for path in paths if not (ROOT / path).exists()
    ]
    assert missing == []
    assert METHODS[slug].parts


@pytest.mark.parametrize("slug", DONE)
def test_a_done_method_has_results_of_its_own(slug: str) -> None:
    results = sorted((ROOT / "results" / slug).glob("*.json"))
    assert results, f"results/{slug} holds no JSON"
    for path in results:
        assert json.loads(path.read_text(encoding="utf-8"))["slug"] == slug


@pytest.mark.parametrize("slug", DONE)
def test_the_study_of_a_done_method_is_the_one_of_its_slug(slug: str) -> None:
    module, _, name = str(METHODS[slug].study).partition(":")
    assert getattr(importlib.import_module(module), name).slug == slug


@pytest.mark.parametrize("slug", DONE)
def test_the_page_of_a_done_method_names_paper_and_command(slug: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{slug}.md").read_text(encoding="utf-8")
    assert METHODS[slug].arxiv is None or str(METHODS[slug].arxiv) in page
    assert slug in page


@pytest.mark.parametrize("slug", DONE)
def test_a_study_is_short(slug: str) -> None:
    path = PACKAGE / "studies" / f"{slug.replace('-', '_')}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150


# Floors -------------------------------------------------------------------------------------------


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every torchstone module that a file imports, at the top or inside a function, with its line."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name.removeprefix("torchstone."), node.lineno) for name in names if name.startswith("torchstone."))


def floor_of(module: str) -> int:
    """The number of the floor that a module below torchstone is on."""
    for number, packages in enumerate(FLOORS):
        if any("." in package and (module == package or module.startswith(f"{package}.")) for package in packages):
            return number
    head = module.split(".")[0]
    return next(number for number, packages in enumerate(FLOORS) if head in packages)


def test_every_package_has_a_floor() -> None:
    heads = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"}
    assert heads <= set().union(*FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_nothing_imports_upward(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    if own == "__init__":
        return
    upward = [
        f"line {line}: {name}"
        for name, line in imports_of(path)
        if name != "__version__" and floor_of(name) > floor_of(own)
    ]
    assert upward == []


def test_kinds_are_where_the_table_says() -> None:
    for family, kinds in KINDS.items():
        for kind, target in kinds.items():
            module = target.partition(":")[0].removeprefix("torchstone.")
            base = PACKAGE / module.replace(".", "/")
            assert base.with_suffix(".py").is_file() or (base / "__init__.py").is_file(), f"{family}: {kind}"


# Size and form ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PYTHON, ids=short)
def test_files_functions_and_parameter_lists_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines"
            arguments = node.args
            names = [item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            assert count <= MOST_PARAMETERS or is_command(path), f"{node.name} has {count} parameters"


def is_command(path: Path) -> bool:
    """A verb's function lists its command-line options, which people give by name."""
    return path.parent == PACKAGE / "cli"


@pytest.mark.parametrize("path", PYTHON, ids=short)
def test_modules_have_a_docstring_and_no_vague_name(path: Path) -> None:
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")
    empty_package = path.name == "__init__.py" and not path.read_text(encoding="utf-8").strip()
    assert empty_package or ast.get_docstring(tree_of(path))


def public_definitions(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and public methods of its public classes."""
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name[0] != "_")


DOCUMENTED_BY_THEIR_BASE = {"forward", "build", "inherit", "merge"}


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_public_functions_are_documented_and_typed(path: Path) -> None:
    for node in public_definitions(path):
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, f"{node.name} has no return type"
            if node.name in DOCUMENTED_BY_THEIR_BASE or ast.unparse(node.body[-1]) == "...":
                continue
        assert ast.get_docstring(node), f"{node.name} has no docstring"


# Public names and state ---------------------------------------------------------------------------


def test_public_names_are_few_and_resolve() -> None:
    import torchstone

    assert len(torchstone.__all__) <= MOST_PUBLIC_NAMES
    for name in torchstone.__all__:
        assert getattr(torchstone, name) is not None
    with pytest.raises(AttributeError, match="public names"):
        _ = torchstone.nothing


FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "torch.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "random.seed",
    "np.random.seed",
    "numpy.random.seed",
    "yaml.load",
    "os.system",
}


def calls_of(node: ast.AST, forked: bool = False) -> Iterator[str]:
    """Names of all calls; a seed inside `with torch.random.fork_rng(…)` is local and not among them."""
    if isinstance(node, ast.With):
        forked = forked or any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if not (forked and name == "torch.manual_seed"):
            yield name
    for child in ast.iter_child_nodes(node):
        yield from calls_of(child, forked)


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_no_eval_no_pickle_no_global_seed(path: Path) -> None:
    assert set(calls_of(tree_of(path))) & FORBIDDEN_CALLS == set()
