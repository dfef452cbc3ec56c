"""Kill a build at random instants: each time there must be no bundle or a whole one, and the rerun must succeed.

python scripts/kill_build.py CHECKPOINT --times 30 [--seed 0]
"""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from pyrexport.runtime.bundle.opening import open_bundle


def build(checkpoint: Path, output: Path) -> subprocess.Popen[bytes]:
    """A build in a process group of its own."""
    command = [sys.executable, "-m", "pyrexport.cli", "build", str(checkpoint), "--target", "ort", "-o", str(output)]
    return subprocess.Popen([*command, "--quiet"], start_new_session=True, stdout=subprocess.DEVNULL)


def kill_once(checkpoint: Path, output: Path, after: float) -> str:
    """Kill one build, check what is left, and build again; returns what was found."""
    process = build(checkpoint, output)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = "a whole bundle" if output.exists() else "no bundle"
    if output.exists():
        open_bundle(output, verify=True)
    else:
        assert build(checkpoint, output).wait() == 0, "the rerun failed"
        open_bundle(output, verify=True)
    left = sorted(path.name for path in output.parent.iterdir())
    assert left == [output.name], f"left behind: {left}"
    return found


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--times", type=click.IntRange(1), default=30, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(checkpoint: Path, times: int, seed: int) -> None:
    """Print what each kill left, and fail if any left something else."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out" / "bundle"
        output.parent.mkdir()
        start = time.perf_counter()
        if build(checkpoint, output).wait():
            raise click.ClickException(f"{checkpoint} does not build: see above")
        whole = time.perf_counter() - start
        for index in range(times):
            shutil.rmtree(output)
            after = chance.uniform(0.3, 1.0) * whole
            found = kill_once(checkpoint, output, after)
            print(f"{index + 1}/{times}: killed after {after:.2f} s of {whole:.2f}: {found}", flush=True)


if __name__ == "__main__":
    main()
