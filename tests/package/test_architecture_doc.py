"""The examples of docs/architecture.md that can run, run."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from pyrexport.export.weights import steps
from pyrexport.runtime import quantisation
from pyrexport.runtime.chain import plan, sampler, solvers
from pyrexport.runtime.chain.schedules import Schedule, explicit_levels
from pyrexport.runtime.chain.solvers import SolverChoice
from support.builders import SMALL, pyramid

DOCUMENT = (ROOT / "docs" / "architecture.md").read_text("utf-8")


def run(section: str, names: dict[str, Any]) -> dict[str, Any]:
    """The names that the first example of a section leaves."""
    text = DOCUMENT[DOCUMENT.index(f"\n### {section}\n") :]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    exec(code.group(1), names)
    return names


def test_the_solver_runs_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an exact model it ends at its clean latent."""
    names = run("A solver", {**vars(solvers), "np": np, "StepPlan": plan.StepPlan})
    monkeypatch.setattr(solvers, "SOLVERS", names["SOLVERS"])
    model = pyramid("plain", 1)
    levels = explicit_levels(model, [[1.0, 0.7, 0.3]])
    run_plan = plan.plan(model, SMALL, Schedule("few", levels, solver=SolverChoice.of("by_clean")))
    clean = np.full(run_plan[0].stage.latent, 0.5, np.float32)

    class Exact:
        def velocity(self, step: plan.StepPlan, latent: Any, conditions: Any) -> Any:
            ((sigma, _),) = step.sigmas
            return ((latent - clean) / sigma).astype(np.float32)

    found = sampler.sample(run_plan, model.taps, Exact(), {})
    assert np.allclose(found, clean, atol=1e-5)  # float32, three steps


def test_the_step_is_one_of_its_kind() -> None:
    names = run("A step on weights", {**vars(steps), "dataclass": dataclass, "torch": torch})
    scale = names["Scale"]((2.0, 3.0, 4.0))
    given = steps.Stored((3, 2), "float32")
    assert scale.shape(given) == (given,)
    (rows,) = scale.apply(torch.ones(2, 2), 1)
    assert rows.tolist() == [[3, 3], [4, 4]]


def test_the_scheme_goes_to_layers_by_their_names() -> None:
    schemes = {**quantisation.SCHEMES, "w8-64": quantisation.Scheme("w8-64", "uint8", {}, bits=8, block=64)}
    made = run("A scheme", {**vars(quantisation), "SCHEMES": schemes})
    assert not made["Recipe"](schemes["fp32"], {"a": schemes["w8-64"]}).scheme("a").is_float
