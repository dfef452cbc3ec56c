"""The sampling chain that docs/executorch.md has, for those who write it again in another language."""

from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.sampler import sample
from pyrexport.runtime.chain.schedules import Schedule, spaced_levels
from pyrexport.runtime.pipeline.features import timestep_features
from support.builders import SMALL, pyramid


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_chain_of_the_documentation_is_the_runtimes(scale):
    """`docs/executorch.md` has it in 30 lines, for those who write it again in another language."""
    page = (ROOT / "docs" / "executorch.md").read_text()
    namespace: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], namespace)
    model = pyramid()
    frequencies = [1.0, 0.1, 0.001]
    stages = model.stages(SMALL)
    manifest = {
        "model": {"clean_levels": list(model.clean_levels)},
        "graphs": {f"stage{stage.index}": {"inputs": {"latent": {"shape": [1, *stage.latent]}}} for stage in stages},
        "timestep_frequencies": frequencies,
    }
    text, negative = np.full((2, 3), 0.5, np.float32), np.full((2, 3), -0.5, np.float32)

    def run(method, latent, features, text):
        return np.tanh(latent[..., ::-1] + features.sum() + np.float32(int(method[-1])) * text.mean())

    class Denoiser:
        def velocity(self, step, latent, conditions):
            features = timestep_features(step.timestep, frequencies)
            return run(f"stage{step.stage.index}", latent[None], features, conditions["text"][None])[0]

    schedule = Schedule("", spaced_levels(model, (3, 2, 2)), scale)
    steps = plan(model, SMALL, schedule)
    wanted = sample(steps, model.taps, Denoiser(), {"text": text}, negative={"text": negative}, seed=5)
    found = namespace["chain"](run, manifest, text, negative, schedule.levels, scale, 5)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # sums in another order, over 7 steps
