"""A saved fast model runs in a process that imports nothing but the operators."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_muws import MicroStructure
from lightning_muws.runtime.kernels import native, signs
from lightning_muws.runtime.native import library
from tests.runtime.test_chain import both, mlp
from tests.support.strategies import normal

needs_library = pytest.mark.skipif(library.level() is None, reason="the native kernels are not built")


def run(code: str, *arguments: object) -> None:
    """Run code in a fresh process, which has seen none of this one's imports."""
    done = subprocess.run(  # noqa: S603  our own code
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def network(folder) -> torch.export.ExportedProgram:
    """Export a network of both operators; ``folder`` gets its input and output."""
    layers = [nn.Linear(32, 64), nn.Linear(64, 16)]
    for i, (layer, structure) in enumerate(
        zip(layers, (MicroStructure((4, 4), 0.5), MicroStructure((8, 8), 0.25, 0.75)), strict=True)
    ):
        layer.weight.data = structure.project(normal(i, *layer.weight.shape, dtype=torch.float32))
    x = normal(2, 1, 32, dtype=torch.float32)
    with torch.no_grad():
        fast = nn.Sequential(native.build(layers[0], (4, 4), x), signs.build(layers[1], (8, 8), torch.zeros(1, 64)))
        torch.save({"x": x, "y": fast(x)}, folder / "example.pt")
        exported = torch.export.export(fast.eval(), (x,))
    found = {str(node.target) for node in exported.graph.nodes if "lightning_muws" in str(node.target)}
    assert found == {"lightning_muws.block_sparse.default", "lightning_muws.signed_linear.default"}
    return exported


def chain(folder) -> torch.export.ExportedProgram:
    """Export a network that is one program; its last layer has tensors of a few numbers."""
    x = normal(2, 2, 19, dtype=torch.float32)
    with torch.no_grad():
        _, fast = both(mlp(), x, "8f")
        torch.save({"x": x, "y": fast(x)}, folder / "example.pt")
        exported = torch.export.export(fast, (x,))
    assert [str(n.target) for n in exported.graph.nodes if "lightning_muws" in str(n.target)] == [
        "lightning_muws.program.default"
    ]
    return exported


CHECK = """
import sys, torch
import lightning_muws.ops
from lightning_muws.runtime.native import plan, written
example = torch.load(sys.argv[2])
model = {load}
for _ in range(3):
    torch.testing.assert_close(model(example["x"]), example["y"])
prepared = len(plan._plans), len(written._programs)
assert prepared in ((1, 0), (0, 1)), f"{{prepared}} plans and programs were made for one network"
"""
NETWORKS = [network, chain]


@needs_library
@pytest.mark.parametrize("network", NETWORKS)
def test_an_exported_network_runs_after_one_import_in_a_fresh_process(tmp_path, network):
    torch.export.save(network(tmp_path), tmp_path / "fast.pt2")
    run(CHECK.format(load="torch.export.load(sys.argv[1]).module()"), tmp_path / "fast.pt2", tmp_path / "example.pt")


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.filterwarnings("ignore")  # what the compiler of torch warns of is its own affair
def test_a_network_compiled_ahead_of_time_runs_after_one_import_in_a_fresh_process(tmp_path, network):
    path = str(tmp_path / "fast_aot.pt2")
    try:
        torch._inductor.aoti_compile_and_package(network(tmp_path), package_path=path)
    except Exception as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip("AOTInductor finds no C++ compiler here")
    run(CHECK.format(load="torch._inductor.aoti_load_package(sys.argv[1])"), path, tmp_path / "example.pt")


def test_the_operators_need_neither_lightning_nor_rich():
    run(
        "import sys, lightning_muws.ops, torch\n"
        "assert torch.ops.lightning_muws.block_sparse.default, 'not registered'\n"
        "assert torch.ops.lightning_muws.program.default, 'not registered'\n"
        "assert torch.ops.lightning_muws.signed_linear.default, 'not registered'\n"
        "found = {'lightning', 'pytorch_lightning', 'rich', 'lightning_muws.runtime.accelerate'} & set(sys.modules)\n"
        "assert not found, f'{found} was imported'\n"
    )


def test_the_package_alone_imports_no_torch():
    run("import sys, lightning_muws\nassert 'torch' not in sys.modules, 'torch was imported'\n")
