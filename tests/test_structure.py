"""The shape of the package: imports go one way, one module draws, and importing does nothing but register."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nrlib

PACKAGE = Path(nrlib.__file__).parent

# A module imports only modules on lines above its own. A new module gets its place here.
ORDER = [
    "errors",
    "storage", "hub", "weights", "profiles",
    "config",
    "machine",
    "gate_memory", "adapter", "architecture", "model_card", "tracking",
    "persistent_memory",
    "distributed",
    "sparse_inference",
    "peft_method",
    "losses", "language_loss", "methods", "meter", "upload",
    "penalties",
    "rivals.__init__", "rivals.block_expansion", "rivals.distillation", "rivals.elastic_weight_consolidation",
    "rivals.gated_lora", "rivals.orthogonal_finetuning", "rivals.weight_interpolation",
    "trainer",
    "corpora.documents", "corpora.man_pages",
    "corpora.extract", "corpora.text_files", "corpora.synthetic",
    "corpora.hub_datasets", "corpora.debian_packages", "corpora.debian_recipes",
    "corpora.debian_docs", "corpora.debian_code",
    "corpora.__init__",
    "splits",
    "batches", "tokenization",
    "texts", "training", "evaluation", "records",
    "harness_tasks", "harness", "local_tasks",
    "backbone", "step_cost", "tables", "guide", "experiments", "figures",
    "hardware", "plan", "plan_tables",
    "benchmark.timing", "benchmark.inference", "benchmark.cases", "benchmark.memory", "benchmark.gpu",
    "benchmark.__init__", "benchmark.plan_check",
    "runs",
    "lessons", "exercises",
    "tasks", "cluster",
    "sweep", "study",
    "notebook_parameters", "pages", "lighten", "chromium", "launch",
    "pdf",
    "notebooks",
    "explorer",
    "book",
    "commands.__init__", "commands.corpora", "commands.doctor", "commands.extend", "commands.plan", "commands.evaluate", "commands.reproduce",
    "cli",
    "__init__", "__main__",
]  # fmt: skip

DRAWING = {"matplotlib", "seaborn"}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if not {"companions", "studies"} & set(path.parts)
}


def imported(name, tree):
    """Full dotted names of everything a module imports, inside functions too."""
    package = ["nrlib", *name.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def modules_of_ours(name, tree):
    for target in imported(name, tree):
        if target == "nrlib" or target.startswith("nrlib."):
            parts = target.split(".")[1:]
            candidates = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            known = next((c for c in candidates if c in MODULES), None)
            yield known or next((f"{c}.__init__" for c in candidates if f"{c}.__init__" in MODULES), "__init__")


def test_every_module_has_its_place():
    assert set(MODULES) - set(ORDER) == set(), "add the new module to ORDER"
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    above = set(ORDER[: ORDER.index(name)])
    used = set(modules_of_ours(name, MODULES[name]))
    if name in ("cli", "book"):
        used -= {"__init__"}  # the version
    assert used <= above, f"{name} imports {sorted(used - above)}, which stand below it"


@pytest.mark.parametrize("name", MODULES)
def test_only_figures_draws_and_nothing_imports_a_notebook_or_a_test(name):
    roots = {target.split(".")[0] for target in imported(name, MODULES[name])}
    assert not roots & {"tests", "conftest", "pytest", "IPython"}
    assert not any(target.startswith(("nrlib.companions", "nrlib.studies")) for target in imported(name, MODULES[name]))
    if name != "figures":
        assert not roots & DRAWING
    if name != "__init__":
        assert "figures" not in set(modules_of_ours(name, MODULES[name]))  # notebooks import it, the package does not


def test_the_training_loop_knows_no_files():
    used = set(imported("training", MODULES["training"]))
    assert not {target.split(".")[0] for target in used} & {"os", "pathlib", "json", "tempfile", "shutil"}
    assert not {"storage", "records", "backbone"} & set(modules_of_ours("training", MODULES["training"]))
    assert not any(isinstance(n, ast.Name) and n.id == "open" for n in ast.walk(MODULES["training"]))


REGISTRATIONS = {
    "__init__": {"os.environ.setdefault"},  # how torch's threads wait, which must be said before torch is imported
    "peft_method": {"_extend_peft_types", "register_peft_method"},
}


@pytest.mark.parametrize("name", MODULES)
def test_importing_does_nothing_but_register(name):
    for statement in MODULES[name].body:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        defines = isinstance(
            statement,
            (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign),
        )
        if is_docstring or defines:
            continue
        if isinstance(statement, ast.If):
            condition = ast.unparse(statement.test)
            assert condition in ("TYPE_CHECKING", "__name__ == '__main__'"), f"line {statement.lineno}"
            continue
        call = statement.value if isinstance(statement, ast.Expr) else None
        called = ast.unparse(call.func) if isinstance(call, ast.Call) else ast.dump(statement)
        assert called in REGISTRATIONS.get(name, ()), f"{name}, line {statement.lineno} runs {called} at import"


@pytest.mark.parametrize("name", MODULES)
def test_no_global_random_state(name):
    """Random numbers come from a generator made from a seed, or from inside torch.random.fork_rng()."""
    tree = MODULES[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not called.startswith("np.random.") or called in ("np.random.default_rng", "np.random.Generator", "np.random.PCG64"), called  # fmt: skip
            assert called not in ("random.seed", "torch.seed", "np.random.seed")
    forks = [
        n for n in ast.walk(tree) if isinstance(n, ast.With) and any("fork_rng" in ast.unparse(i) for i in n.items)
    ]
    inside = {id(n) for fork in forks for n in ast.walk(fork)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.manual_seed":
            assert id(node) in inside, f"{name}, line {node.lineno}"
