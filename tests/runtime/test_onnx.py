"""Models written as ONNX files give the same outputs in a process without torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lightning_muws
from lightning_muws import accelerate, export_onnx, onnx_library
from lightning_muws.errors import SettingError, StateError
from lightning_muws.runtime.kernels import bsr, native, native_int8
from lightning_muws.runtime.native import library
from lightning_muws.runtime.rewrite.chain import chain
from lightning_muws.runtime.rewrite.observe import Example, Root
from lightning_muws.structure.micro import MicroStructure
from tests.support.strategies import normal

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

needs_library = pytest.mark.skipif(library.level() is None, reason="the native kernels are not built")
WORKER = Path(__file__).parents[1] / "support" / "onnx_worker.py"
BOTH = pytest.mark.parametrize("custom_ops", [pytest.param(True, marks=needs_library), False])


class Residual(nn.Module):
    """What the rewriting knows: sums into a layer, ReLUs, a stride, groups, a mean, a Linear of images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.down = nn.Conv2d(8, 16, 3, 2, 1)
        self.mean, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (x + self.two(self.one(x).relu())).relu()
        return self.head(self.flatten(self.mean(self.down(x).relu())))


class Tokens(nn.Module):
    """Linears of three dimensions, a Conv1d, and two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.convolution = nn.Conv1d(16, 8, 3, padding=1)

    def forward(self, tokens: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = tokens + self.narrow(self.wide(tokens).relu())
        return self.convolution(y.transpose(1, 2)) * scale, y


EXAMPLES = {
    "residual": (Residual, normal(0, 1, 3, 11, 9, dtype=torch.float32)),
    "a batch of images": (Residual, normal(0, 3, 3, 8, 8, dtype=torch.float32)),
    "tokens": (
        Tokens,
        {"tokens": normal(0, 2, 5, 16, dtype=torch.float32), "scale": normal(1, 1, 8, 1, dtype=torch.float32)},
    ),
    "one sample": (lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.ones(1, 16)),
}


def pruned(model: nn.Module) -> nn.Module:
    """Prune blocks of each layer; the rest of its blocks are random."""
    for i, module in enumerate(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            weight = module.weight.data
            weight.copy_(MicroStructure((2, 2), 0.5).project(normal(i, *weight.shape, dtype=torch.float32)))
    return model.eval()


def on_kernels(model: nn.Module, example: Example) -> nn.Module:
    """Return the model with each layer on a native kernel, in chains where accelerate makes some."""
    root = Root(pruned(model))
    seen: dict[nn.Module, torch.Tensor] = {}
    for module in root.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0]))
    with torch.no_grad():
        example(root)
        for parent in list(root.modules()):
            for name, child in list(parent.named_children()):
                if child in seen:
                    child._forward_pre_hooks.clear()
                    kernel = native.build(child, (2, 2), seen[child])
                    assert kernel is not None
                    setattr(parent, name, kernel)
        chain(root, example)
    return root.eval()


def outputs(path: Path, example: Example, model: nn.Module, custom_ops: bool) -> list[np.ndarray]:
    """Return what the file gives in a fresh process, which imports onnxruntime and not torch."""
    names = [value.name for value in onnx.load(path).graph.input]
    arrays = dict(zip(names, (x.numpy() for x in example.tensors), strict=True))
    np.savez(path.with_name("arrays.npz"), **arrays)
    given = [path, path.with_name("arrays.npz"), *([onnx_library()] if custom_ops else [])]
    done = subprocess.run(  # noqa: S603  our own code
        [sys.executable, str(WORKER), *map(str, given)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(np.load(path.with_name("outputs.npz")).values())


def assert_equal(found: list[np.ndarray], expected: object) -> None:
    wanted = expected if isinstance(expected, tuple) else (expected,)
    assert len(found) == len(wanted)
    for array, tensor in zip(found, wanted, strict=True):
        assert array.shape == tuple(tensor.shape)
        assert np.abs(array - tensor.numpy()).max() <= 1e-5 * float(tensor.abs().max())


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node if node.domain == "lightning_muws"}


@BOTH
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_a_model_on_native_kernels_gives_the_same_outputs_without_torch(tmp_path, name, custom_ops):
    build, given = EXAMPLES[name]
    example = Example.of(given)
    model = pruned(build()) if library.level() is None else on_kernels(build(), example)
    path = export_onnx(model, tmp_path / "model.onnx", given, custom_ops=custom_ops)
    with torch.no_grad():
        expected = example(model)
    assert_equal(outputs(path, example, model, custom_ops), expected)
    assert operators(path) == ({"BlockSparse"} if custom_ops else set())
    onnx.checker.check_model(onnx.load(path), full_check=not custom_ops)


@BOTH
def test_a_dynamic_batch_takes_any_number_of_samples(tmp_path, custom_ops):
    example = Example.of(EXAMPLES["a batch of images"][1])
    model = pruned(Residual()) if library.level() is None else on_kernels(Residual(), example).model
    path = export_onnx(model, tmp_path / "model.onnx", example.args, custom_ops, dynamic_batch=True)
    for n in (1, 5):
        other = Example.of(normal(n, n, 3, 8, 8, dtype=torch.float32))
        with torch.no_grad():
            assert_equal(outputs(path, other, model, custom_ops), other(model))


def test_a_dynamic_batch_of_two_inputs_by_name(tmp_path):
    given = {"tokens": normal(0, 2, 5, 16, dtype=torch.float32), "scale": normal(1, 2, 8, 1, dtype=torch.float32)}
    model = pruned(Tokens())
    path = export_onnx(model, tmp_path / "model.onnx", given, custom_ops=False, dynamic_batch=True)
    other = Example.of({name: torch.cat([x, x, x]) for name, x in given.items()})
    with torch.no_grad():
        assert_equal(outputs(path, other, model, False), other(model))


def test_a_dynamic_batch_needs_two_samples(tmp_path):
    with pytest.raises(SettingError, match=r"shapes \[\(1, 4\)\]: give one of at least two samples"):
        export_onnx(nn.Linear(4, 3).eval(), tmp_path / "model.onnx", torch.ones(1, 4), dynamic_batch=True)


@needs_library
def test_sums_and_relus_are_in_the_layers(tmp_path):
    given = EXAMPLES["residual"][1]
    path = export_onnx(on_kernels(Residual(), Example.of(given)), tmp_path / "model.onnx", given)
    others = [node.op_type for node in onnx.load(path).graph.node if node.domain == ""]
    assert sorted(others) == ["ReduceMean", "Reshape"]


@needs_library
def test_what_accelerate_returns_is_exported(tmp_path):
    model, x = pruned(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))), torch.ones(1, 512)
    for layer in (model[0], model[2]):
        layer.weight.data[:480] = 0
    fast, report = accelerate(model, x, kernels=["native", "signs"])
    assert report.is_faster
    path = export_onnx(fast, tmp_path / "model.onnx", x)
    with torch.no_grad():
        assert_equal(outputs(path, Example.of(x), fast, True), fast(x))
    assert operators(path)
    dense = export_onnx(fast, tmp_path / "dense.onnx", x, custom_ops=False)
    assert path.stat().st_size < 0.5 * dense.stat().st_size
    with torch.no_grad():
        assert_equal(outputs(dense, Example.of(x), fast, False), model(x))


@needs_library
@pytest.mark.slow
def test_a_program_without_python_runs_a_file_with_our_operators(tmp_path):
    compiler = shutil.which("c++")
    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    if compiler is None or not libraries:
        pytest.skip("there is no C++ compiler, or the package of ONNX Runtime has no shared library")
    x = normal(0, 1, 64, dtype=torch.float32)
    model = on_kernels(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), Example.of(x)).model
    path = export_onnx(model, tmp_path / "model.onnx", x)
    x.numpy().tofile(tmp_path / "x")
    source, program = WORKER.with_name("onnx_host.cpp"), tmp_path / "host"
    (tmp_path / "libonnxruntime.so.1").symlink_to(libraries[0])  # the name that it has inside
    build = [compiler, "-std=c++17", source, "-o", program, libraries[0]]
    subprocess.run(list(map(str, build)), check=True)  # noqa: S603  our own code
    run = [program, path, onnx_library(), 64, 10, tmp_path / "x", tmp_path / "y"]
    environment = {"PATH": os.defpath, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(list(map(str, run)), env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert_equal([np.fromfile(tmp_path / "y", np.float32).reshape(1, 10)], model(x))


@BOTH
@needs_library
def test_a_layer_of_8_bits_with_calibration_is_exported(tmp_path, custom_ops):
    layer, x = nn.Conv2d(4, 8, 3, padding=1).eval(), normal(0, 2, 4, 6, 6, dtype=torch.float32)
    model = nn.Sequential(native_int8.build_static(layer, x, native_int8.Activation.of(-3.0, 3.0))).eval()
    path = export_onnx(model, tmp_path / "model.onnx", x, custom_ops)
    with torch.no_grad():
        assert_equal(outputs(path, Example.of(x), model, custom_ops), model(x))
    assert operators(path) == ({"Int8Sparse"} if custom_ops else set())


@needs_library
def test_a_linear_of_8_bits_without_calibration_needs_our_operators(tmp_path):
    x = normal(0, 2, 16, dtype=torch.float32)
    model = nn.Sequential(native_int8.build(nn.Linear(16, 8).eval(), (1, 1), x)).eval()
    path = export_onnx(model, tmp_path / "model.onnx", x)
    with torch.no_grad():
        assert_equal(outputs(path, Example.of(x), model, True), model(x))
    with pytest.raises(SettingError, match="rounds each sample by its own range, which plain ONNX cannot"):
        export_onnx(model, tmp_path / "dense.onnx", x, custom_ops=False)
    assert not (tmp_path / "dense.onnx").exists()


@BOTH
def test_a_model_without_our_kernels_is_exported_as_it_is(tmp_path, custom_ops):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).eval(), torch.ones(2, 4)
    path = export_onnx(model, tmp_path / "model.onnx", x, custom_ops)
    with torch.no_grad():
        assert_equal(outputs(path, Example.of(x), model, custom_ops), model(x))


@BOTH
def test_large_weights_go_into_a_second_file(tmp_path, monkeypatch, custom_ops):
    monkeypatch.setattr("lightning_muws.runtime.onnx.export.LARGEST_FILE", 1000)
    model, x = pruned(nn.Sequential(nn.Linear(64, 64))), torch.ones(1, 64)
    model = on_kernels(model, Example.of(x)).model if custom_ops else model
    path = export_onnx(model, tmp_path / "model.onnx", x, custom_ops)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    with torch.no_grad():
        assert_equal(outputs(path, Example.of(x), model, custom_ops), model(x))


def test_a_file_names_no_path_of_this_machine(tmp_path):
    path = export_onnx(nn.Linear(4, 3).eval(), tmp_path / "model.onnx", torch.ones(1, 4), custom_ops=False)
    assert str(Path(lightning_muws.__file__).parent).encode() not in path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()


def test_a_failed_export_leaves_the_old_file(tmp_path):
    class Loop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x  # depends on values

    path = export_onnx(nn.Linear(4, 3).eval(), tmp_path / "model.onnx", torch.ones(1, 4), custom_ops=False)
    before = path.read_bytes()
    with pytest.raises(SettingError, match="torch cannot export this model to ONNX"):
        export_onnx(Loop().eval(), path, torch.ones(1, 4), custom_ops=False)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_layer_that_onnx_does_not_have_is_refused_with_an_alternative(tmp_path):
    layer = nn.Linear(16, 16).eval()
    layer.weight.data[:8] = 0
    model = nn.Sequential(bsr.build(layer, (4, 4), torch.ones(1, 16))).eval()
    with pytest.raises(SettingError, match=r"call accelerate with kernels=\['native', 'compact'\]"):
        export_onnx(model, tmp_path / "model.onnx", torch.ones(1, 16), custom_ops=False)


@pytest.mark.skipif(library.level() != library.BFLOAT16_LEVEL, reason="the CPU has no bfloat16 dot product")
def test_a_bfloat16_layer_is_refused(tmp_path):
    x = torch.ones(1, 16)
    model = nn.Sequential(native.build_bfloat16(nn.Linear(16, 16).eval(), (1, 1), x)).eval()
    with pytest.raises(SettingError, match="a bfloat16 layer is not exported to ONNX"):
        export_onnx(model, tmp_path / "model.onnx", x)


def test_a_model_in_training_mode_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"call model.eval\(\) before export_onnx"):
        export_onnx(nn.Linear(4, 3), tmp_path / "model.onnx", torch.ones(1, 4))


@pytest.mark.parametrize("place", ["nowhere/model.onnx", "."])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, place):
    with pytest.raises(SettingError, match="give a file in a folder that exists"):
        export_onnx(nn.Linear(4, 3).eval(), tmp_path / place, torch.ones(1, 4), custom_ops=False)
    assert not list(tmp_path.iterdir())


def test_what_is_no_module_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"model is a dict: give a torch\.nn\.Module"):
        export_onnx({}, tmp_path / "model.onnx", torch.ones(1, 4))


def test_without_the_kernels_only_plain_onnx_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_muws.runtime.onnx.library.library", lambda: None)
    model, x = nn.Linear(4, 3).eval(), torch.ones(1, 4)
    with pytest.raises(
        StateError, match="install the package with a C\\+\\+ compiler, or export with custom_ops=False"
    ):
        export_onnx(model, tmp_path / "model.onnx", x)
    assert export_onnx(model, tmp_path / "model.onnx", x, custom_ops=False).exists()


def test_without_the_packages_the_extra_is_named():
    code = (
        "import sys; sys.modules['onnxscript'] = None\n"
        "import torch\n"
        "from lightning_muws.runtime.onnx.export import export_onnx\n"
        "from lightning_muws.errors import SettingError\n"
        "try:\n"
        "    export_onnx(torch.nn.Linear(4, 3).eval(), 'model.onnx', torch.ones(1, 4), custom_ops=False)\n"
        "except SettingError as error:\n"
        "    assert \"pip install 'lightning-muws[onnx]'\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError('not refused')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  our own code
