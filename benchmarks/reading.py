"""Peak memory of reading every row of a dataset once, beyond what the imports take, as a run reads it.

    python benchmarks/reading.py rows.jsonl --workers 2               # in the order of a run
    python benchmarks/reading.py rows.parquet --workers 2 --sorted    # front to back, as before the first step
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402


def status(name: str) -> float:
    """A line of /proc/self/status in MB: VmRSS now, VmHWM the peak."""
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--sorted", action="store_true", help="front to back")
    args = parser.parse_args()
    if args.file.endswith(".parquet"):
        import pyarrow.parquet  # noqa: F401
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    base, began = status("VmRSS"), time.perf_counter()
    rows = data.read_rows(args.file, None, ())
    order = range(len(rows)) if args.sorted else data.Plan([len(rows)], len(rows), 0)

    def size(i):
        row = rows[i]
        images = sum(len(image["bytes"]) for image in row["images"] if isinstance(image, dict))
        return images + sum(len(value) for value in row.values() if isinstance(value, str))

    total = sum(data.in_order(size, order, args.workers, 64))
    print(f"{len(rows)} rows, {total / 1e9:.2f} GB, {time.perf_counter() - began:.0f} s: "
          f"peak {status('VmHWM') - base:.0f} MB beyond the imports' {base:.0f} MB")


if __name__ == "__main__":
    main()
