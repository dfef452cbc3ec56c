"""The structure that the imports alone don't hold: who may name what, and how large things get."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = ("runtime", "targets", "export", "calibration", "cli")
ENGINES = r"onnx ?runtime|executorch|tensorrt|\btrt\b|\bort\b|xnnpack|\bcuda|\bqnn\b|openvino"
TARGETS = ("ort", "executorch", "trt", "qnn")
KINDS = ("pyramidal", "ppf", "plain")

LONGEST_FUNCTION, LONGEST_CLASS, LONGEST_MODULE = 45, 150, 300


def modules(*floors: str) -> Iterator[tuple[str, Path, str]]:
    """Name for people, path and text of each module of some floors."""
    for floor in floors:
        for path in sorted((ROOT / floor).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path, path.read_text("utf-8")


def test_the_runtime_names_no_engine() -> None:
    """Neither in code nor in words: what is particular to an engine is a fact of its target."""
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, _, text in modules("runtime")
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(ENGINES, line, re.IGNORECASE)
    ]
    assert not found, "\n".join(found)


def test_no_targets_name_is_a_string_outside_the_targets() -> None:
    """What differs between targets is asked of the target, never compared with its name."""
    found = [
        f"{name}:{node.lineno}: {node.value!r}"
        for name, _, text in modules("runtime", "export", "calibration", "cli")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and node.value in TARGETS
    ]
    assert not found, "\n".join(found)


def test_a_kind_is_compared_in_one_file() -> None:
    """Kinds are facts: their names are compared nowhere, and defined in runtime/chain/kinds.py."""
    found = []
    for name, _, text in modules(*FLOORS):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                values = [leaf.value for side in sides for leaf in ast.walk(side) if isinstance(leaf, ast.Constant)]
                if any(value in KINDS for value in values if isinstance(value, str)):
                    found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not [line for line in found if not line.startswith("runtime/chain/kinds.py")], "\n".join(found)


@pytest.mark.parametrize(
    ("kind", "most"),
    [(ast.FunctionDef, LONGEST_FUNCTION), (ast.ClassDef, LONGEST_CLASS)],
    ids=["functions", "classes"],
)
def test_nothing_is_too_long_to_be_held_in_mind(kind: type[ast.FunctionDef | ast.ClassDef], most: int) -> None:
    """Signature and docstring included."""
    found = [
        f"{name}:{node.lineno}: {node.name} has {length} lines, at most {most}"
        for name, _, text in modules("runtime", "export", "targets", "cli")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, kind) and (length := (node.end_lineno or 0) - node.lineno + 1) > most
    ]
    assert not found, "\n".join(found)


def test_no_module_does_two_things() -> None:
    found = [
        f"{name}: {count} lines, at most {LONGEST_MODULE}"
        for name, _, text in modules("runtime", "export", "targets", "cli")
        if (count := text.count("\n")) > LONGEST_MODULE
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("floor", ["runtime", "export"])
def test_every_room_has_its_place_in_the_order(floor: str) -> None:
    """A room that no layers contract of import-linter names would be held by nothing."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = [room for contract in config for layer in contract.get("layers", ()) for room in layer.split(" | ")]
    folder = ROOT / floor
    rooms = {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()}
    rooms |= {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert rooms == {room.split(".")[2] for room in layers if room.startswith(f"pyrexport.{floor}.")}


def test_a_target_is_light_until_it_is_used() -> None:
    """Facts are read on devices without PyTorch, ONNX or the engine."""
    import subprocess
    import sys

    code = "\n".join(
        [
            "import sys",
            "from pyrexport.runtime.bundle.engines import installed_targets",
            "names = [target.name for target in installed_targets()]",
            f"assert set({TARGETS!r}) <= set(names), names",
            "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'executorch', 'tensorrt_rtx'}",
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
