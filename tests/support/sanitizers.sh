# Sourced by the scripts that build C++ with the address and undefined behaviour sanitizers: goes to the root of the project,
# sets CXX, FLAGS, SOURCE and WORK, a folder that is removed at the end. Without a compiler it says so, and the script passes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
CXX="${CXX:-c++}"
if ! command -v "$CXX" >/dev/null; then
  echo "no C++ compiler: no sanitizer runs"
  exit 0
fi
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
SOURCE=lightning_muws/artifact/src
