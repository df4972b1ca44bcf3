"""Make the compact NAS-Bench-201 table that the package carries.

    python tools/make_nas_bench_201.py FULL.csv.gz

FULL.csv.gz has a line per cell with the columns named in `COLUMNS` and may have more. Accuracies are rounded to two
decimals, as the benchmark's own tables print them.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
from pathlib import Path

COLUMNS = (
    *("arch", "params_cifar10", "c10_test_200", "c100_test_200", "in16_test_200"),
    *("c10_valid_200", "c100_valid_200", "in16_valid_200"),
)
TARGET = Path(__file__).resolve().parents[1] / "sparsebayes" / "nas" / "tables" / "nas_bench_201.csv.gz"


def main() -> None:
    """Read the full table, write the compact one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("full", type=Path)
    with gzip.open(parser.parse_args().full, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in sorted(rows, key=lambda row: row["arch"]):
        writer.writerow(
            [row["arch"], row["params_cifar10"], *(f"{float(row[name]):.2f}" for name in COLUMNS[2:])]
        )
    TARGET.parent.mkdir(exist_ok=True)
    # No name and no time in the header, so that the same table is the same file.
    TARGET.write_bytes(gzip.compress(text.getvalue().encode(), compresslevel=9, mtime=0))
    print(f"{TARGET}: {len(rows):,} cells, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
