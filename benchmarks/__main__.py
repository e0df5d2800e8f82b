"""The plain way and ours, in one run on the same data. The table is printed, and of all subjects in the full shape
written to benchmarks/RESULTS.md. Subjects: evaluation, generation, training, adapters, host, waiting, gpu.
"""

import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks.common import SUBJECTS, Bench, machine, parse_options, table

RESULTS = Path(__file__).with_name("RESULTS.md")
KEPT = "\n## Notes"  # what people wrote stays, from here on


def main() -> None:
    bench, started, rows = Bench(parse_options(__doc__)), time.monotonic(), []
    about = machine(bench)
    print(about, flush=True)
    for subject in bench.options.subjects or SUBJECTS[:-1]:
        print(f"{subject} ...", file=sys.stderr, flush=True)
        rows += import_module(f"benchmarks.{subject}").measure(bench)
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    found = f"{table(rows)}\n\nTaken in {time.monotonic() - started:.0f} s: `{command}`\n"
    print(found)
    if not bench.options.quick and not bench.options.subjects:
        notes = RESULTS.read_text(encoding="utf-8").partition(KEPT)[2] if RESULTS.exists() else "\n"
        RESULTS.write_text(f"# Results\n\n{about}\n\n{found}{KEPT}{notes}", encoding="utf-8")


if __name__ == "__main__":
    main()
