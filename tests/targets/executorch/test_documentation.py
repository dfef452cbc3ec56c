"""The sampling chain that docs/executorch.md has, for those who write it again in another language."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.sampler import sample
from pyrexport.runtime.chain.schedules import Schedule, spaced_levels
from pyrexport.runtime.pipeline.features import timestep_features
from support.builders import SMALL, pyramid

PAGE = (ROOT / "docs" / "executorch.md").read_text()


def snippet(language: str, start: str) -> str:
    """The page's block of code that starts so."""
    (found,) = [block for block in PAGE.split("```")[1::2] if block.startswith(f"{language}\n{start}")]
    return found.removeprefix(f"{language}\n")


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_chain_of_the_documentation_is_the_runtimes(scale):
    """`docs/executorch.md` has it in 30 lines, for those who write it again in another language."""
    namespace: dict[str, Any] = {}
    exec(snippet("python", "import numpy"), namespace)
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


MAIN = """
#include <cstdio>
#include "chain.h"

int main(int, char** files) {
  FILE* given = std::fopen(files[1], "rb");  // all noise, in the order in which it is asked for
  const Noise noise = [&](float* values, size_t count) {
    if (std::fread(values, 4, count, given) != count) std::abort();
  };
  const Run run = [](const std::string& method, const Latent& x, const std::vector<float>& features,
                     const std::vector<float>& text) {
    double sum = 0;
    for (float feature : features) sum += feature;
    std::vector<float> out;
    for (size_t i = 0; i < x.values.size(); ++i) {
      const size_t mirrored = i - i % x.columns + (x.columns - 1 - i % x.columns);
      out.push_back(std::tanh(x.values[mirrored] + float(sum) + float(method.back() - '0') * text[0]));
    }
    return out;
  };
  Latent x(SHAPE);
  noise(x.values.data(), x.values.size());
  const Latent out = chain(x, {CLEAN}, {1.0f, 0.1f, 0.001f}, {LEVELS}, SCALEf, {0.5f}, {-0.5f}, run, noise);
  std::fwrite(out.values.data(), 4, out.values.size(), stdout);
}
"""


def compiler() -> str:
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return found or pytest.skip("there is no C++ compiler")


def test_the_chain_in_cpp_is_the_runtimes(tmp_path):
    model, scale = pyramid(), 3.0
    stages, schedule = model.stages(SMALL), Schedule("", spaced_levels(model, (3, 2, 2)), scale)
    (tmp_path / "chain.h").write_text(snippet("cpp", "// chain.h"))
    numbers = {
        "SHAPE": ", ".join(map(str, stages[-1].latent)),
        "CLEAN": ", ".join(map(repr, model.clean_levels)),
        "LEVELS": ", ".join("{" + ", ".join(map(repr, own)) + "}" for own in schedule.levels),
        "SCALE": repr(scale),
    }
    text = MAIN
    for name, value in numbers.items():
        text = text.replace(name, value)
    (tmp_path / "main.cpp").write_text(text)
    warned = ("-Wall", "-Wextra", "-Werror", "-O1", "-std=c++17")
    subprocess.run([compiler(), *warned, "main.cpp", "-o", "main"], cwd=tmp_path, check=True)
    noise = np.random.Generator(np.random.Philox(5)).standard_normal(4 * np.prod(stages[0].latent), np.float32)
    noise.tofile(tmp_path / "noise")
    done = subprocess.run([tmp_path / "main", tmp_path / "noise"], check=True, stdout=subprocess.PIPE)
    found = np.frombuffer(done.stdout, np.float32).reshape(stages[0].latent)

    class Denoiser:
        def velocity(self, step, latent, conditions):
            features = timestep_features(step.timestep, [1.0, 0.1, 0.001]).astype(np.float64).sum()
            return np.tanh(latent[..., ::-1] + np.float32(features) + step.stage.index * conditions["text"].mean())

    given, negative = ({"text": np.full((1, 1), value, np.float32)} for value in (0.5, -0.5))
    wanted = sample(plan(model, SMALL, schedule), model.taps, Denoiser(), given, negative=negative, seed=5)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_the_runner_in_cpp_compiles(tmp_path):
    """Against the headers of the installed wheel."""
    wheel = Path(next(iter(pytest.importorskip("executorch").__path__)))
    includes = [f"-I{wheel}/include", f"-I{wheel}/include/executorch/runtime/core/portable_type/c10"]
    (tmp_path / "runner.cpp").write_text(snippet("cpp", "// runner.h"))
    command = [compiler(), "-std=c++17", "-fsyntax-only", "-w", "-DC10_USING_CUSTOM_GENERATED_MACROS", *includes]
    subprocess.run([*command, "runner.cpp"], cwd=tmp_path, check=True)
