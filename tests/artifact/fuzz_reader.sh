#!/usr/bin/env bash
# Builds the reader in C with the address and undefined behaviour sanitizers, and gives it damaged and lying files.
# Without a compiler it says so and passes. Run: tests/artifact/fuzz_reader.sh [inputs] [first seed] [folder of more files]
set -euo pipefail
cd "$(dirname "$0")/../.."
CXX="${CXX:-c++}"
if ! command -v "$CXX" >/dev/null; then
  echo "no C++ compiler: the reader in C is not built, and no sanitizer runs over it"
  exit 0
fi
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
SOURCE=lightning_muws/artifact/src
"$CXX" -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
  tests/artifact/fuzz_reader.cpp "$SOURCE"/reader/*.cpp "$SOURCE"/{rans,planes,blocks,bytes}.cpp -o "$WORK/fuzz"
shopt -s nullglob
"$WORK/fuzz" "${1:-10000}" "${2:-0}" tests/golden/*.muws ${3:+"$3"/*.muws}
