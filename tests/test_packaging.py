"""What is installed, what it imports, and what it weighs."""

import json
import subprocess
import sys
import tomllib
import venv
import zipfile
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
FLOORS = ("calibration", "cli", "export", "runtime", "targets")


def test_every_package_folder_is_listed():
    found = {"pyrexport"}
    for floor in FLOORS:
        for init in (ROOT / floor).rglob("__init__.py"):
            found.add(".".join(("pyrexport", *init.parent.relative_to(ROOT).parts)))
    assert found == set(CONFIG["tool"]["setuptools"]["packages"])


def test_constraints_pin_every_dependency():
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}  # fmt: skip
    project = CONFIG["project"]
    for requirement in [*project["dependencies"], *chain(*project["optional-dependencies"].values())]:
        name = requirement.split(">")[0].split("<")[0].split("=")[0].split("[")[0].strip().lower().replace("_", "-")
        assert name in pinned, requirement


@pytest.mark.parametrize("module", ["pyrexport", "pyrexport.runtime", "pyrexport.runtime.sampler"])
def test_imports_pull_in_numpy_and_the_standard_library_alone(module):
    code = f"""
import sys
import numpy.random  # compiled with Cython, whose helper module is not part of NumPy's package
before = set(sys.modules)
import {module}
import json
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout
    # `__mp_main__` and the editable finders are installed by site, not by us.
    foreign = {name for name in json.loads(output) if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert foreign <= {"numpy", "pyrexport"}


def test_no_module_of_the_runtime_names_a_heavy_library():
    """import-linter sees imports; this sees `importlib.import_module("torch")` too."""
    for file in (ROOT / "runtime").rglob("*.py"):
        assert "import_module" not in file.read_text(), file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # From a copy: a stale build/ folder would leak old modules into the wheel.
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True).stdout  # fmt: skip
    for name in listed.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/data"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_stray(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"pyrexport", f"pyrexport-{CONFIG['project']['version']}.dist-info"}
    assert "pyrexport/py.typed" in names
    inside = {name.split("/")[1] for name in names if name.startswith("pyrexport/")}
    assert inside == {"__init__.py", "py.typed", *FLOORS}


def test_the_wheel_works_in_a_clean_environment(wheel, tmp_path, tiny):
    """From the base dependencies alone: about 30 s."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    run = [str(python.parent / "pyrexport"), "inspect", str(tiny), "--json"]
    document = json.loads(subprocess.run(run, check=True, capture_output=True, text=True, cwd="/").stdout)
    assert document["kind"] == "pyramidal"
    subprocess.run([str(python), "-c", "import pyrexport, sys; assert 'torch' not in sys.modules"], check=True, cwd="/")
