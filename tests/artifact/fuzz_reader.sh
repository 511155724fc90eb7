#!/usr/bin/env bash
# Gives the library for C damaged and lying files, under sanitizers.
# Run: tests/artifact/fuzz_reader.sh [inputs] [first seed] [folder of more files]
source "$(dirname "$0")/../support/sanitizers.sh"
"$CXX" -std=c++17 -O1 -g $FLAGS tests/artifact/fuzz_reader.cpp "$SOURCE"/reader/*.cpp "$SOURCE"/{rans,planes,blocks,bytes}.cpp -o "$WORK/fuzz"
shopt -s nullglob
"$WORK/fuzz" "${1:-10000}" "${2:-0}" tests/golden/*.muws ${3:+"$3"/*.muws}
