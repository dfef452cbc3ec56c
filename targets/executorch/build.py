"""ExecuTorch programs of a bundle: lowered method by method, written once, and run before they are called done."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from executorch.devtools.backend_debug import get_delegation_info
from executorch.exir import ExecutorchBackendConfig
from executorch.exir.passes import MemoryPlanningPass

from ..forms import Lowering, TorchForm, TorchLayer
from .layers import lower_form
from .lowering import merge, weights_stay_in_file

__all__ = ["write_program"]


def write_program(file: Path, forms: Sequence[TorchForm]) -> Iterator[Lowering]:
    """Write a program with a method for each form.

    Yields:
        A line on each method when it is lowered, the last one when the file is written: what is delegated to XNNPACK,
        and what is not.
    """
    for library in ("executorch", "torchao", "torch.utils._pytree"):  # they report at length what they leave alone
        logging.getLogger(library).setLevel(logging.ERROR)
    places = {place.offset: place for form in forms for place in form.placements.values()}
    programs: list[TorchForm | TorchLayer] = [*forms, *(layer for form in forms for layer in form.layers)]
    mapped = [each.program.state_dict[key] for each in programs for key in each.placements]
    methods: dict[str, Any] = {}
    with warnings.catch_warnings(), weights_stay_in_file(forms[0].weights, places.values(), mapped) as regions:
        warnings.simplefilter("ignore")  # deprecations inside torch and executorch
        for form in forms:
            methods[form.name] = lower_form(form, regions)
            found = Lowering(f"{form.name}: {_delegation(methods[form.name])}")
            if len(methods) < len(forms):
                yield found
        # Inputs stay where the caller has them.
        planning = MemoryPlanningPass(alloc_graph_input=False)
        program = merge(methods).to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
        with file.open("wb") as out:
            program.write_to_file(out)
    yield found


def _delegation(method: Any) -> str:
    info = get_delegation_info(method.graph_module)
    others = sorted(name for name, counts in info.delegation_by_operator.items() if counts.non_delegated)
    others = [name for name in others if name not in ("getitem", "alloc")]
    count = info.num_delegated_subgraphs
    return f"{count} delegate{'s' if count != 1 else ''} of XNNPACK, outside of them {', '.join(others) or 'nothing'}"
