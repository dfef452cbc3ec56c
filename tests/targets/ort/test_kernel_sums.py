"""Sums of integer products: exact where the kernel is VNNI's, exact with 7 bits where it is AVX2's.

This machine's kernel runs in the engine; AVX2's sums are made in NumPy, of what the engine was given. Ids of tests
say which kernel the machine has.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from kernel_sums import Product, avx2_sums, exact_sums, listed_kernel, used_kernel, watch
from pyrexport.runtime.chain.plan import single_step
from pyrexport.runtime.pipeline.pipeline import load
from pyrexport.targets.ort.target import KERNELS
from support.building import LEAN

MACHINE = listed_kernel()
on_this_machine = pytest.mark.parametrize("machine", [MACHINE], ids=[f"on-{MACHINE or 'neither'}"])


@pytest.fixture(scope="module")
def products(make_bundle: Callable[..., Path]) -> Callable[[str], Iterator[Product]]:
    """`products(kernel)`: those of all stages of the tiny transformer, on noise, as the engine ran them."""

    def run(kernel: str) -> Iterator[Product]:
        noise = np.random.default_rng(0)
        with load(make_bundle(*LEAN, quantize="w8a8-dynamic", kernel=kernel), threads=1) as pipeline:
            model = pipeline.model
            text = noise.standard_normal((model.text_length, model.transformer.text_dim)).astype(np.float32)
            for stage in pipeline.bundle.manifest.stages:
                latent = noise.standard_normal(stage.latent).astype(np.float32)
                yield from watch(pipeline, single_step(model.pyramid, stage, 0.5), latent, text)

    return run


@on_this_machine
def test_the_engine_has_the_kernel_that_the_cpu_lists(machine: str | None) -> None:
    """By the outcome of a product that saturates in AVX2's sums."""
    if machine is None:
        pytest.skip("no flags of x86 in /proc/cpuinfo")
    assert used_kernel() == machine


@on_this_machine
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_those_of_the_machines_sums(
    products: Callable[[str], Iterator[Product]], kernel: str, machine: str | None
) -> None:
    """Up to four roundings to float32: exact sums for kernel avx2 anywhere, for vnni where the machine has it."""
    if machine is None and kernel == "vnni":
        pytest.skip("no flags of x86 in /proc/cpuinfo")
    count = 0
    for product in products(kernel):
        saturating = machine == "avx2" and kernel == "vnni"
        sums = avx2_sums(product.x, product.values)[0] if saturating else exact_sums(product.x, product.values)
        assert product.distance(sums) <= 1, product.layer
        assert product.distance(sums + 1) > 1, f"{product.layer}: an error of 1 in the sums would not be seen"
        count += 1
    assert count == 60  # ten of a block: two blocks, three stages


def test_no_pair_of_7_bit_weights_saturates(products: Callable[[str], Iterator[Product]]) -> None:
    """AVX2's sums of what the engine was given are the exact ones; inputs reach 255."""
    largest = 0
    for product in products("avx2"):
        sums, lost = avx2_sums(product.x, product.values)
        assert lost == 0, product.layer
        assert np.array_equal(sums, exact_sums(product.x, product.values)), product.layer
        largest = max(largest, int(product.x.max()))
    assert largest == 255


def test_pairs_of_8_bit_weights_saturate(products: Callable[[str], Iterator[Product]]) -> None:
    """On the same noise: the emulation sees what 7 bits avoid."""
    lost = {product.layer: avx2_sums(product.x, product.values)[1] for product in products("vnni")}
    assert sum(lost.values()) > 0


@pytest.mark.parametrize(
    ("weights", "sums", "lost"),
    [
        ([127, 127, 127, 127], 2 * 32767, 2),
        ([-127, -127, -127, 127], -32768, 1),
        ([127, -127, 127, -127], 0, 0),
        ([0, 127, 127, 0], 2 * 255 * 127, 0),
        ([63, 63, 63, 63], 4 * 255 * 63, 0),
        ([-63, -63, -63], -3 * 255 * 63, 0),
        ([127, 127, 127], 32767 + 255 * 127, 1),
    ],
)
def test_two_neighbours_saturate_as_int16_does(weights: list[int], sums: int, lost: int) -> None:
    """Inputs of 255; a pair is the first and the second value, not the second and the third."""
    values = np.array(weights, np.int8)[:, None]
    found, count = avx2_sums(np.full((1, len(values)), 255, np.uint8), values)
    assert (found.item(), count) == (sums, lost)


@pytest.mark.parametrize(
    ("line", "kernel"),
    [
        ("Features\t: asimddp", None),
        ("flags\t: sse2", None),
        ("flags\t: sse2 avx2", "avx2"),
        ("flags\t: avx2 avx_vnni", "vnni"),
        ("flags\t: avx2 avx512f avx512_vnni", "vnni"),
    ],
)
def test_flags_list_a_kernel(tmp_path: Path, line: str, kernel: str | None) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{line}\n")
    assert listed_kernel(file) == kernel


def test_where_no_file_lists_flags_no_kernel_is_known(tmp_path: Path) -> None:
    assert listed_kernel(tmp_path / "cpuinfo") is None
