#!/usr/bin/env bash
# Builds the native kernels with the address and undefined behaviour sanitizers, by the package's own build, and runs
# tests/runtime/sanitize.cpp over them, and sanitize_onnx.cpp over the operators for ONNX Runtime.
# Run: tests/runtime/sanitize.sh [python] [layers for each instruction set]
PYTHON="${1:-python3}"
source "$(dirname "$0")/../support/sanitizers.sh"
cp -r setup.py pyproject.toml README.md LICENSE MANIFEST.in "$WORK"
mkdir "$WORK/lightning_muws"
cp -r lightning_muws/__init__.py lightning_muws/runtime "$WORK/lightning_muws"
sed -i.bak "s/-O3/-O1/" "$WORK/setup.py" # quicker to build, and as good to look at
rm -f "$WORK/lightning_muws/runtime/native/kernels.so"
(cd "$WORK" && CFLAGS="$FLAGS" CXXFLAGS="$FLAGS" LDFLAGS="$FLAGS" "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir wheel .)
"$PYTHON" -m zipfile -e "$WORK"/wheel/*.whl "$WORK/out"
grep -q __asan_report_load "$WORK/out/lightning_muws/runtime/native/kernels.so"  # or nothing would be looked at
for PROGRAM in sanitize sanitize_onnx; do
  "$CXX" -std=c++17 -O1 -g $FLAGS tests/runtime/$PROGRAM.cpp -o "$WORK/$PROGRAM" -ldl -pthread
done
# the pool of threads lives as long as the process: leaks are not looked for
ASAN_OPTIONS=detect_leaks=0 "$WORK/sanitize" "$WORK/out/lightning_muws/runtime/native/kernels.so" "${2:-2000}"
for LEVEL in "" portable; do
  MUWS_LEVEL=$LEVEL ASAN_OPTIONS=detect_leaks=0 "$WORK/sanitize_onnx" "$WORK/out/lightning_muws/runtime/native/kernels.so" "$((${2:-2000} * 5 / 2))"
done
