"""The commands that work on finished runs and exported files: `export`, `bench`, `report`."""

from __future__ import annotations

from pathlib import Path

import click

from sparsebayes.cli import arguments
from sparsebayes.cli.program import main
from sparsebayes.errors import RunError
from sparsebayes.files import make_folder

__all__ = ["bench", "export", "report"]

_EXPORT_EXAMPLES = """\b
Examples:
  sparsebayes export runs/first
  sparsebayes export runs/first --point 3
  sparsebayes export runs/first --max-params 5000 --out small
  sparsebayes export runs/first --int8
"""


@main.command(epilog=_EXPORT_EXAMPLES)
@arguments.folder("folder")
@click.option(
    "--point",
    type=click.IntRange(min=0),
    metavar="K",
    help="Point of the Pareto front, by its number in the report.",
)
@click.option(
    "--max-params",
    type=click.IntRange(min=1),
    metavar="N",
    help="Best point with at most so many parameters.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to write, new or empty; else one inside the run folder.",
)
@click.option("--int8", is_flag=True, help="Also write model.int8.onnx, and measure what it costs.")
@click.option("--overwrite", is_flag=True, help="Replace the files of an earlier export in --out.")
@click.option("--legacy", is_flag=True, help="Use the TorchScript-based ONNX exporter.")
@click.option(
    "--data-root", metavar="FOLDER", help="Where --int8 finds the data, if not where the run had them."
)
def export(
    folder: Path,
    point: int | None,
    max_params: int | None,
    out: Path | None,
    int8: bool,
    overwrite: bool,
    legacy: bool,
    data_root: str | None,
) -> None:
    """Write a network of a RUN for use.

    By default the one that the run chose, with its ONNX file; or another point of its Pareto front. Of a search
    that compressed nothing it is the network that was found. With
    --int8 its weights and activations are also quantized to 8 bits, by ranges that are taken from training
    images, and the test error, size and speed of both files are compared; that alone needs the data.
    """
    if point is not None and max_params is not None:
        raise RunError("expected --point or --max-params, got both; give one of them")
    if data_root is not None and not int8:
        raise RunError("--data-root is for --int8, as nothing else of an export reads the data; leave it out")
    arguments.require_run(folder)
    from sparsebayes.train.export import export_point, quantize_export

    written = export_point(
        folder,
        point=point,
        max_params=max_params,
        out=out,
        overwrite=overwrite,
        legacy=legacy,
    )
    if int8:
        click.echo(quantize_export(folder, written, data_root=data_root).describe())
    click.echo(f"exported to {written}")


_BENCH_EXAMPLES = """\b
Examples:
  sparsebayes bench runs/first
  sparsebayes bench runs/first --batch 1,16,256 --threads 1,4
  sparsebayes bench model.onnx other.onnx --out timings
"""


class _Counts(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers from 1 on, with commas between them."""

    name = "numbers"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and 1 <= int(part) <= 65536 for part in parts if len(part) < 9):
            self.fail(f"{value!r} is not a list of whole numbers from 1 to 65536, such as 1,8,64", param, ctx)
        if any(len(part) >= 9 for part in parts) or len(parts) > 32:
            self.fail(f"{str(value)[:40]!r} has a number, or more numbers, than can be measured", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


@main.command(epilog=_BENCH_EXAMPLES)
@click.argument("targets", metavar="RUN|FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--batch", "batches", type=_Counts(), default=(1, 8, 64), help="Batch sizes.  [default: 1,8,64]"
)
@click.option("--threads", type=_Counts(), default=(1,), help="Threads of one operator.  [default: 1]")
@click.option(
    "--repeats", type=click.IntRange(1, 10_000), default=30, show_default=True, help="Samples of a setting."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of bench.html and bench.json; else the run folder. For files: only the table is printed.",
)
def bench(
    targets: tuple[Path, ...],
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    repeats: int,
    out: Path | None,
) -> None:
    """Measure latency, throughput and memory in onnxruntime.

    Of a RUN: of the dense and the compact network, and of exports in 8 bits inside it. Of ONNX files: of
    these, the first being what the others are compared with.
    """
    files = _onnx_files(targets)
    if out is not None and out.exists() and not out.is_dir():
        raise RunError(f"expected a folder for --out, got the file {str(out)!r}")
    from sparsebayes.export.sweep import sweep
    from sparsebayes.report.provenance import busy_note
    from sparsebayes.report.timings import timing_table, write_timings

    rows = sweep(files, batches=batches, threads=threads, repeats=repeats)
    click.echo(timing_table(rows))
    busy = busy_note()
    if busy is not None:
        click.echo(busy, err=True)
    target = out if out is not None else targets[0] if len(targets) == 1 and targets[0].is_dir() else None
    if target is not None:
        make_folder(target)
        page = write_timings(rows, target, f"Timings of {', '.join(path.name for path in targets)}")
        click.echo(f"timings: {page}")


def _onnx_files(targets: tuple[Path, ...]) -> dict[str, Path]:
    """A name for each ONNX file of the targets, in order."""
    files: dict[str, Path] = {}
    for target in targets:
        if target.is_dir():
            found = {"dense": target / "dense.onnx", "compact": target / "model.onnx"}
            found |= {f"int8 {p.parent.name}": p for p in sorted(target.glob("export-*/model.int8.onnx"))}
            present = {name: path for name, path in found.items() if path.is_file()}
            if not present:
                raise RunError(
                    f"{target} holds no ONNX file; run with export.onnx=true, or export a point of it"
                )
            twice = sum(other.name == target.name for other in targets) > 1
            prefix = f"{target if twice else target.name} " if len(targets) > 1 else ""
            files |= {prefix + name: path for name, path in present.items()}
        elif target.is_file():
            name = target.name if target.name not in files else str(target)
            files[name] = target
        else:
            raise RunError(f"expected a run folder or an ONNX file, got {str(target)!r}, which is neither")
    return files


COMPARISON = "comparison.html"
_REPORT_EXAMPLES = """\b
Examples:
  sparsebayes report runs/first
  sparsebayes report runs/* --out comparison.html
"""


@main.command(epilog=_REPORT_EXAMPLES)
@arguments.folder("folders", many=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Page that compares several runs.  [default: comparison.html beside the first run]",
)
@click.option("--overwrite", is_flag=True, help="Replace the file of --out, whatever it is.")
def report(folders: tuple[Path, ...], out: Path | None, overwrite: bool) -> None:
    """Write the report of each RUN again, and compare several.

    As report.html and report.md in the run's folder. Of two or more runs, also one page with all their
    networks in a table and a plot, and with what differs in their recipes. Among several, runs that have not
    ended and earlier comparisons are left out.
    """
    folders = _reported(folders)
    for folder in folders:
        arguments.require_run(folder)
    if out is not None and len(folders) == 1:
        raise RunError("expected two or more runs for --out, got one; its report is written into its folder")
    from sparsebayes.report import write_comparison, write_report

    for folder in folders:
        write_report(folder)
        click.echo(f"report: {folder / 'report.html'}")
    if len(folders) > 1:
        target = out if out is not None else folders[0].parent / COMPARISON
        click.echo(f"comparison: {write_comparison(folders, target, overwrite=overwrite)}")


def _reported(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """Of several, as a shell's `runs/*` names them, those that are finished runs; the others are named."""
    if len(folders) == 1:
        return folders
    left = []
    for folder in folders:
        if folder.is_dir() and (folder / "recipe.yaml").is_file() and not (folder / "report.json").is_file():
            click.echo(f"left out: {folder} has not ended", err=True)
        elif folder.is_file() and folder.name == COMPARISON:
            click.echo(f"left out: {folder} is a comparison", err=True)
        else:
            left.append(folder)
    if not left:
        raise RunError("none of these runs has ended; resume one, and report then")
    return tuple(left)
