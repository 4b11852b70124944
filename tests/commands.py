"""Command lines, run in processes of their own."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

TIMEOUT = 600


def run(*command: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """A new Python, as users start it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_forked(program: str, *arguments: str, cwd: Path, **env: str) -> str:
    """
    The same in a process that is forked from one that has imported PyTorch and rl_zoo3, which saves seconds.

    :param program: A module's name, or the path of a script.
    :return: What it has printed.
    """
    output = cwd / "output.txt"
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(program, arguments, cwd, env, output))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


def _run(program: str, arguments: tuple[str, ...], cwd: Path, env: dict[str, str], output: Path) -> None:
    os.chdir(cwd)
    os.environ.update(env)
    with output.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    warnings.simplefilter("ignore")
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        sys.path.insert(0, str(cwd))
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    sys.stdout.flush()
