#!/usr/bin/env bash
# Gives the native coder random and mutated input, under sanitizers. Run: tests/artifact/sanitize.sh [inputs] [first seed]
source "$(dirname "$0")/../support/sanitizers.sh"
"$CXX" -std=c++17 -O1 -g $FLAGS tests/artifact/sanitize.cpp "$SOURCE"/*.cpp -o "$WORK/sanitize"
"$WORK/sanitize" "${1:-10000}" "${2:-0}"
