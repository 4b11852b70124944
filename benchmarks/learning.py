"""
Learning studies: algorithms trained in envs with seeds, each run in a process of its own, and tables of how well they did.

What is done is not done again, so a study that was interrupted goes on with what is missing::

    python benchmarks/learning.py run benchmarks/studies/defaults.yml --workers 2
    python benchmarks/learning.py show benchmarks/studies/defaults.yml --plot curves.png
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from study import Run, Study, append_result, key_of, read_results, read_study, results_file

RESULTS = Path(__file__).parent / "results"


class Workers:
    """
    Processes that do one run each.

    :param results: File of results.
    :param demonstrations: Folder of demonstrations.
    :param progress: Where to show them.
    """

    def __init__(self, results: Path, demonstrations: Path, progress: Progress) -> None:
        self.results = results
        self.demonstrations = demonstrations
        self.progress = progress
        self.active: dict[subprocess.Popen, tuple[Run, IO[str], TaskID]] = {}
        self.failures: list[tuple[Run, str]] = []

    def start(self, run: Run) -> None:
        """
        :param run: The run.
        """
        output = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "worker", self.results.resolve(), self.demonstrations.resolve()],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # Ctrl-C is for this process, which then ends the others.
            start_new_session=True,
        )
        self.active[process] = run, output, self.progress.add_task(str(run), total=None)
        assert process.stdin is not None
        process.stdin.write(run.model_dump_json())
        process.stdin.close()

    def collect(self) -> int:
        """Note failures of what has ended, and return how many that were."""
        ended = [process for process in self.active if process.poll() is not None]
        for process in ended:
            run, output, task = self.active.pop(process)
            if process.returncode:
                output.seek(0)
                self.failures.append((run, output.read().strip() or f"exit status {process.returncode}"))
            self.progress.print(f"{'failed' if process.returncode else 'done'}: {run}", markup=False, highlight=False)
            self.progress.remove_task(task)
            output.close()
        return len(ended)

    def stop(self) -> None:
        """End what is under way, which is lost."""
        for process in self.active:
            process.kill()
        for process in self.active:
            process.wait()


def run_study(study: Study, args: argparse.Namespace) -> int:
    """
    :param study: The study.
    :param args: Arguments of the command line.
    :return: Exit status.
    """
    results = results_file(study, args.results)
    runs = selected(study, args.only)
    waiting = deque(run for run in runs if run.key not in done(results))
    console = Console()
    console.print(f"{study.name}: {len(runs) - len(waiting)} of {len(runs)} runs are done", highlight=False)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    deadline = time.monotonic() + 60 * args.limit_minutes
    with Progress(*columns, console=console) as progress:
        overall = progress.add_task(study.name, total=len(runs), completed=len(runs) - len(waiting))
        workers = Workers(results, args.demonstrations, progress)
        try:
            while workers.active or (waiting and time.monotonic() < deadline):
                while waiting and len(workers.active) < args.workers and time.monotonic() < deadline:
                    run = waiting.popleft()
                    if run.key in done(results):  # by another process in the meantime
                        progress.advance(overall)
                    else:
                        workers.start(run)
                progress.advance(overall, workers.collect())
                time.sleep(0.2)
        except KeyboardInterrupt:
            return 130
        finally:
            workers.stop()
    for run, output in workers.failures:
        print(f"\n{run} failed:\n{output}", file=sys.stderr)
    if waiting:
        print(f"{len(waiting)} runs are left: the time is up.")
    return 1 if workers.failures else 0


def selected(study: Study, only: list[str] | None) -> list[Run]:
    """The study's runs whose ENV/ALGORITHM matches one of the patterns."""
    runs = study.runs()
    for pattern in only or []:
        if not any(fnmatchcase(f"{run.env}/{run.algorithm}", pattern) for run in runs):
            names = ", ".join(dict.fromkeys(f"{run.env}/{run.algorithm}" for run in runs))
            raise ValueError(f"--only: {pattern!r} is none of {names}; patterns such as '*/dppo' serve, too.")
    return [run for run in runs if not only or any(fnmatchcase(f"{run.env}/{run.algorithm}", name) for name in only)]


def done(results: Path) -> set[tuple[str, str, int, str]]:
    """The keys of the runs that a file of results has."""
    return {key_of(row) for row in read_results(results)}


def work(results: Path, demonstrations: Path) -> None:
    """
    Do the run that standard input has.

    :param results: File of results.
    :param demonstrations: Folder of demonstrations.
    """
    run = Run.model_validate_json(sys.stdin.read())

    import torch as th
    from run_one import run_one

    th.set_num_threads(1)
    append_result(results, run_one(run, results.parent / "policies", demonstrations))


def positive(text: str) -> int:
    """A number of workers."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; at least 1.")
    return int(text)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{run,show}")
    run = commands.add_parser("run", help="do what is missing of a study")
    run.add_argument("--workers", type=positive, default=1, metavar="N", help="runs at a time, one CPU thread each")
    run.add_argument("--only", nargs="+", metavar="ENV/ALGORITHM", help="runs to do; patterns such as '*/dppo' serve, too")
    run.add_argument("--limit-minutes", type=float, default=float("inf"), metavar="M", help="start no run after that")
    run.add_argument("--demonstrations", type=Path, default=Path(), metavar="FOLDER", help="where files of demonstrations are")
    show = commands.add_parser("show", help="print tables of a study's results")
    show.add_argument("--plot", metavar="FILE", default=None, help="write learning curves there, as PNG")
    show.add_argument("--markdown", action="store_true", help="print Markdown")
    for command in (run, show):
        command.add_argument("study", type=Path, help="YAML file")
        command.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    worker = commands.add_parser("worker")
    worker.add_argument("file", type=Path)
    worker.add_argument("demonstrations", type=Path)
    return parser.parse_args()


def main() -> int:
    """Do what the command line asks for; the exit status."""
    args = parse_args()
    if args.command == "worker":
        work(args.file, args.demonstrations)
        return 0
    try:
        study = read_study(args.study)
        if args.command == "run":
            signal.signal(signal.SIGTERM, interrupt)
            return run_study(study, args)
        from report import show

        show(study, results_file(study, args.results), args.markdown, args.plot)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def interrupt(*_: Any) -> None:
    """End as after Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
