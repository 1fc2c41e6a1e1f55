"""How long a user waits before anything happens: `import mivpg`, and `mivpg --help`.

python benchmarks/start_up.py
"""

import statistics
import subprocess
import sys
import time

REPEATS = 15
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import mivpg": ["-c", "import mivpg"],
    "mivpg --help": ["-m", "mivpg.cli", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one fresh process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Prints a Markdown table."""
    for arguments in COMMANDS.values():
        seconds(arguments)  # the first run compiles to bytecode
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS):  # in turn, so that a busy moment falls on all alike
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    print("| | median s | least | most |\n|---|---:|---:|---:|")
    for name, values in times.items():
        print(f"| `{name}` | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")


if __name__ == "__main__":
    main()
