"""The shape of the code: who may import whom, and what `import distseg` costs."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "distseg").rglob("*.py")) + sorted((ROOT / "launch").glob("*.py"))

# Lower layers may not import higher ones; rooms of one layer may import each other unless FORBIDDEN says otherwise.
LAYERS = ["kernels", "ops", "meta", "labels", "methods", "training", "inference", "study", "cli"]
BESIDE = ("data", "distributed", "evaluation", "models", "optim", "pages", "tracking")
UPPER = {"methods", "training", "inference", "study", "cli"}
FORBIDDEN = {room: {"meta", *UPPER} for room in BESIDE} | {"labels": {"meta", *UPPER}}
# Copied into the models that MLflow serves, and run by its server: no part of a process of ours.
SERVED = ROOT / "distseg" / "tracking" / "served_model.py"
ONE_IMPORTER = {
    "deepspeed": "distseg/distributed/engine.py",
    "nvidia": "distseg/data/dali.py",
    "apex": "distseg/optim/optimizers.py",
    "mlflow": "distseg/tracking/mlflow.py",
    "onnxruntime": "distseg/inference/onnx_file.py",
    "nibabel": "distseg/data/formats/nifti.py",
    "pycocotools": "distseg/data/formats/shapes.py",
    "matplotlib": "distseg/pages/figures.py",
    "surface_distance": "distseg/evaluation/surfaces.py",
    "jinja2": "distseg/pages/html.py",
}


def imports_of(path: Path) -> set[str]:
    """Every module that the file imports anywhere, functions included, as absolute dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "distseg" and len(parts) > 1 else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    room = parts[1] if parts[0] == "distseg" and len(parts) > 2 else None
    reached = {room_of(name) for name in imports_of(path)} - {None, room}
    if room in LAYERS:
        higher = set(LAYERS[LAYERS.index(room) + 1 :])
        assert not reached & higher, f"{room} imports {reached & higher}"
    assert not reached & FORBIDDEN.get(room, set()), f"{room} imports {reached & FORBIDDEN[room]}"
    assert room == "testing" or "testing" not in reached or parts[0] == "launch", f"{room} imports the test kit"


def imported_with(path: Path) -> set[str]:
    """The modules of distseg that are imported as soon as the file is: at its top, and not for types alone."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "distseg"}


def test_no_circle_of_imports() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES
    }
    graph = {name: imported_with(path) & modules.keys() - {name} for name, path in modules.items()}
    sorter = TopologicalSorter(graph)
    sorter.prepare()  # raises CycleError, which names the circle
    assert len(graph) > 100


@pytest.mark.parametrize("package", ONE_IMPORTER)
def test_a_heavy_dependency_has_one_importer(package: str) -> None:
    importers = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path != SERVED and any(n.split(".")[0] == package for n in imports_of(path))
    ]
    assert importers == [ONE_IMPORTER[package]]


def test_what_mlflow_serves_imports_nothing_of_distseg() -> None:
    assert not {name for name in imports_of(SERVED) if name.split(".")[0] == "distseg"}
    served = "distseg.tracking.served_model"
    assert [path for path in SOURCES if served in imports_of(path)] == []


def test_only_the_kernels_import_triton() -> None:
    importers = {path.parent for path in SOURCES if any(n.split(".")[0] == "triton" for n in imports_of(path))}
    assert importers == {ROOT / "distseg" / "kernels"}


def test_import_distseg_is_light_and_asks_no_device() -> None:
    code = (
        "import sys, distseg, distseg.config\n"
        "heavy = {'torch', 'deepspeed', 'mlflow', 'triton', 'nvidia', 'apex', 'matplotlib', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from distseg import PixelReweighter\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'deepspeed', 'mlflow', 'nvidia', 'apex', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import distseg

    with pytest.raises(AttributeError, match="nothing"):
        _ = distseg.nothing
