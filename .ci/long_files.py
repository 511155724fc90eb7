"""Print a hint for each package file that wants to become two; never fail."""

from pathlib import Path

LINES = 300

for path in sorted(Path("lightning_muws").rglob("*")):
    if path.suffix in {".py", ".h", ".cpp"} and (n := len(path.read_text(encoding="utf-8").splitlines())) > LINES:
        print(f"hint: {path} has {n} lines; can it become two files of one idea each?")
