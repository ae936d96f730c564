"""Data flows one way: a module imports only from its own layer or below, never in a circle, and heavy libraries stay where they belong."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

LAYERS = [
    {"types", "settings"},
    {"store", "flow", "stats", "text", "providers"},
    {"data", "curvature", "judge"},
    {"teacher", "training"},
    {"view"},
    {"stages", "geometry", "steerable"},
    {"companion"},
]
ROOT = Path(__file__).parents[1] / "valuecot"
ONLY_IN = {"trl": {"training"}, "matplotlib": {"view"}, "seaborn": {"view"}, "plotly": {"view", "companion"}, "sphinx": {"companion"}}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and name != "_modidx":
            found[name] = ast.parse(path.read_text())
    return found


def own_imports() -> dict[str, set[str]]:
    "Module -> the valuecot modules it imports; nbdev writes these as relative imports."
    graph, known = {}, modules()
    for name, tree in known.items():
        package = name.split(".") if (ROOT / Path(*name.split("."))).is_dir() else name.split(".")[:-1]
        graph[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                graph[name] |= {base} & set(known) or {f"{base}.{a.name}".strip(".") for a in node.names} & set(known)
    return graph


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module.split(".")[0] in names)


def test_every_module_has_a_layer():
    assert all(isinstance(layer(m), int) for m in modules())


def test_no_circles():
    TopologicalSorter(own_imports()).prepare()


def test_imports_point_down():
    climbs = [f"{a} imports {b}" for a, needs in own_imports().items() for b in needs if layer(b) > layer(a)]
    assert not climbs, "move the shared part down: " + "; ".join(climbs)


def test_no_stage_is_imported():
    stages = {name for name, tree in modules().items() if any(isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "stage" for n in tree.body)}
    wrong = [f"{a} imports {b}" for a, needs in own_imports().items() for b in needs if b in stages]
    assert len(stages) > 10 and not wrong, "stages meet only through files: " + "; ".join(wrong)


def test_the_studies_do_not_know_each_other():
    pairs = [{a.split(".")[0], b.split(".")[0]} for a, needs in own_imports().items() for b in needs]
    assert {"geometry", "steerable"} not in pairs and not any("stages" in pair and len(pair & LAYERS[5]) == 2 for pair in pairs)


def test_curvature_knows_neither_arms_nor_files_nor_trainers():
    for name, needs in own_imports().items():
        if name.split(".")[0] == "curvature":
            assert all(n.split(".")[0] in {"types", "curvature"} for n in needs), f"{name} imports {needs}"


def test_heavy_libraries_stay_in_their_layer():
    for name, tree in modules().items():
        imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level}
        for library, places in ONLY_IN.items():
            assert library not in imported or name.split(".")[0] in places, f"{name} imports {library}; only {sorted(places)} may"


def test_nothing_imports_nbdev_at_module_level():
    for name, tree in modules().items():
        top = {getattr(n, "module", "") or "" for n in tree.body if isinstance(n, ast.ImportFrom)} | {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        assert not {m.split(".")[0] for m in top} & {"nbdev", "fastcore", "execnb"}, f"{name}: the installed package must import without the dev tools"
