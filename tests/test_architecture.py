"""Imports point one way, the library stays light, and what is public is documented."""

import ast
import graphlib
import inspect
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxformer

ROOT = Path(__file__).parent.parent

# The modules of jaxformer, leaves first: each imports only from the lines above its own.
LAYERS = [
    "cache compilation errors fingerprint matrices results sharding",
    "constraints dropout fields files lines quantization schedules terminal",
    "config search",
    "ids linear top_k",
    "batching beam embedding feed_forward losses masks positions residual sampling tokenizer",
    "decoding flash generation_config run_directory",
    "attention checkpoints",
    "stack",
    "decoder encoder",
    "transformer",
    "ensemble",
    "scoring",
    "generation",
    "arguments continuous_batching loading long_lines",
    "generator",
    "translator",
    "__init__ interop pages",
    "convert",
    "cli",
]

# Needed only to train from text, or slow to import. (Flax itself imports rich and absl.)
NEVER_IN_JAXFORMER = {"absl", "datasets", "logging", "rich", "tensorboardX", "train"}
IMPORTED_WHERE_USED = {"matplotlib", "orbax", "sacrebleu", "sentencepiece", "torch"}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names the file imports: anywhere, or (`top_level`) only when itself imported."""

    def statements(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            yield child
            if not (top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
                yield from statements(child)

    names = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def project_imports() -> dict[str, set[str]]:
    """The import graph of jaxformer and train: module -> modules, each by its full dotted name."""
    paths = {module_name(path): path for path in sources("jaxformer") + sources("train")}

    def defining_modules(name: str) -> Iterator[str]:
        # `from a.b import c`: c may be a module or a name in a.b. Importing a.b also runs
        # a/__init__.py, but that is not the importing file's choice.
        if name in paths:
            yield name
        elif (parent := name.rpartition(".")[0]) in paths:
            yield parent

    return {
        module: {found for name in imports(path) for found in defining_modules(name)}
        for module, path in paths.items()
    }


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", sources("jaxformer"), ids=module_name)
def test_jaxformer_modules_import_only_what_lies_below_them(path):
    module, *_ = path.relative_to(ROOT / "jaxformer").with_suffix("").parts
    below: set[str] = set()
    for line in map(str.split, LAYERS):
        if module in line:
            break
        below |= set(line)
    else:
        pytest.fail(f"say in LAYERS where the new module {module} stands")
    # A plain `import jaxformer`, for names that the package collects, stays in the set as it is.
    internal = {
        name.removeprefix("jaxformer.")
        for name in imports(path)
        if packages({name}) == {"jaxformer"}
    }
    assert packages(internal) <= below | {module}


@pytest.mark.parametrize("path", sources("jaxformer"), ids=module_name)
def test_jaxformer_leaves_heavy_packages_to_those_who_use_them(path):
    assert not packages(imports(path)) & NEVER_IN_JAXFORMER
    assert not packages(imports(path, top_level=True)) & IMPORTED_WHERE_USED


def test_no_import_cycles():
    graphlib.TopologicalSorter(project_imports()).prepare()  # raises CycleError, naming the cycle


def test_folders_of_the_training_application_import_one_way():
    def part(module: str) -> str:
        return ".".join(module.split(".")[:2])

    folders = {part(module) for module in project_imports() if module.count(".") == 2}
    graph: dict[str, set[str]] = {}
    for module, found in project_imports().items():
        if part(module) in folders:
            graph.setdefault(part(module), set()).update(set(map(part, found)) - {part(module)})
    assert {"train.benchmark", "train.costs", "train.data", "train.plan"} <= set(graph)
    graphlib.TopologicalSorter(graph).prepare()


def test_the_training_step_knows_no_runner():
    graph = project_imports()

    def reachable(module: str) -> set[str]:
        return {module}.union(*(reachable(found) for found in graph[module]))

    assert "train.parallel" not in reachable("train.step")
    assert "train.loop" not in reachable("train.parallel")


def test_importing_jaxformer_loads_no_data_checkpoint_or_plotting_package():
    heavy = IMPORTED_WHERE_USED | {"datasets", "matplotlib", "pandas", "pyarrow", "train", "tyro"}
    program = f"import sys, jaxformer; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_training_loads_what_only_text_needs_where_it_is_used():
    heavy = {"datasets", "matplotlib", "pandas", "sacrebleu", "sentencepiece", "tensorboardX"}
    modules = "train.cli, train.loop, train.benchmark.steps, train.plan.plan"
    program = f"import sys, {modules}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def own_docstring(member: object) -> str | None:
    doc = vars(member).get("__doc__") if inspect.isclass(member) else member.__doc__
    # Dataclasses and named tuples without a docstring get "Name(field: type, ...)".
    return None if doc and doc.startswith(f"{getattr(member, '__name__', '')}(") else doc


def test_public_names_are_documented():
    documented = {}
    for name in jaxformer.__all__:
        public = getattr(jaxformer, name)
        if inspect.isclass(public) or inspect.isroutine(public):
            documented[name] = public
        if inspect.isclass(public):
            # vars(), not dir(): inherited members are documented by the base class.
            documented |= {
                f"{name}.{attribute}": member
                for attribute, member in vars(public).items()
                if (inspect.isroutine(member) or isinstance(member, property))
                and not attribute.startswith("_")
                and attribute != "setup"  # linen's: its contract is Flax's
            }
    assert [name for name, member in documented.items() if not own_docstring(member)] == []


def test_the_wheel_holds_jaxformer_alone(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*build, "--directory", str(tmp_path)], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {path.relative_to(ROOT) for path in sources("jaxformer")} <= files
    assert Path("jaxformer/py.typed") in files
    others = {path.parts[0] for path in files} - {"jaxformer"}
    assert others == {f"jaxformer-{jaxformer.__version__}.dist-info"}
