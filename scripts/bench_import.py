"""What importing pyrexport costs beyond importing NumPy: alternating fresh processes, median and minimum.

python scripts/bench_import.py
"""

import platform
import statistics
import subprocess
import sys
import time

RUNS = 15


def seconds(code: str) -> float:
    """Wall time of a fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    cases = ["import numpy", "import numpy, pyrexport", "import numpy, pyrexport.runtime"]
    times: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(RUNS):
        for case in cases:
            times[case].append(seconds(case))
    print(f"{platform.platform()}, Python {platform.python_version()}, {RUNS} alternating runs")
    for case in cases:
        extra = 1000 * (statistics.median(times[case]) - statistics.median(times[cases[0]]))
        least = 1000 * (min(times[case]) - min(times[cases[0]]))
        median = 1000 * statistics.median(times[case])
        print(f"{case:32} median {median:6.1f} ms, beyond numpy {extra:5.1f} (of minima {least:5.1f})")


if __name__ == "__main__":
    main()
