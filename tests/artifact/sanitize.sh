#!/usr/bin/env bash
# Builds the native coder with the address and undefined behaviour sanitizers, and gives it random and mutated input.
# Without a compiler it says so and passes. Run: tests/artifact/sanitize.sh [inputs] [first seed]
set -euo pipefail
cd "$(dirname "$0")/../.."
CXX="${CXX:-c++}"
if ! command -v "$CXX" >/dev/null; then
  echo "no C++ compiler: the native coder is not built, and no sanitizer runs over it"
  exit 0
fi
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
"$CXX" -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
  tests/artifact/sanitize.cpp lightning_muws/artifact/src/*.cpp -o "$WORK/sanitize"
"$WORK/sanitize" "${1:-10000}" "${2:-0}"
