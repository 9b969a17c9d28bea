"""Jobs that wait for one another, in processes of their own, spread over the GPUs of one machine."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

PARENT = "DTR_STUDY_PID"
"""Environment variable with the number of the process that gives out the jobs."""
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of a program."""

    name: str
    arguments: list[str]
    needs: tuple[str, ...] = ()
    """Names of jobs that must have ended well before."""
    num_gpus: int = 1
    """With several it is started by torchrun, one process each; should that fail, once more with one."""


@dataclass(kw_only=True)
class _Running:
    job: Job
    process: subprocess.Popen
    place: list[str | None]
    began: float = field(default_factory=time.monotonic)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While open, no other process gives out jobs for this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{folder}: another study is at work here; wait for it, or choose another --out") from None
        yield


def find_places(num_at_once: int) -> list[str | None]:
    """Where so many jobs may run: GPUs by their number, in turn, or None for each on a machine without."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return [gpus[at % len(gpus)] if gpus else None for at in range(num_at_once)]


def take(free: Sequence[str | None], num_gpus: int) -> list[str | None]:
    """Places for one job, on GPUs that differ and have the most room; empty if there are too few."""
    gpus = list(free) if None in free else sorted(dict.fromkeys(free), key=lambda gpu: -free.count(gpu))
    return gpus[:num_gpus] if len(gpus) >= num_gpus else []


def run_jobs(
    jobs: Sequence[Job],
    *,
    program: Path,
    places: Sequence[str | None],
    logs: Path,
    say: Callable[[str], None],
    on_end: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Run each job as soon as what it needs is done and there is a place; one that fails stops only those that need it.

    Args:
        jobs: the first ones start first. What they need is among them.
        program: Python file that each job calls with its arguments.
        places: as `find_places` gives them.
        logs: folder for NAME.log of each job; a later try adds to it.
        say: told of every start and end.
        on_end: called after every job.

    Returns:
        what became of the jobs that failed, by name.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, done, failed = list(jobs), set[str](), dict[str, str]()
    running: list[_Running] = []
    free, most = list(places), len(places) if None in places else len(set(places))
    with ExitStack() as ending:
        ending.callback(_end, running)
        while waiting or running:
            for job in list(waiting):
                job_gpus = min(job.num_gpus, most)
                if lost := [need for need in job.needs if need in failed]:
                    failed[job.name] = f"{lost[0]} failed"
                    waiting.remove(job)
                    say(f"{job.name} FAILED: {failed[job.name]}")
                elif done.issuperset(job.needs) and (place := take(free, job_gpus)):
                    waiting.remove(job)
                    for one in place:
                        free.remove(one)
                    running.append(_start(replace(job, num_gpus=job_gpus), place, program, logs, len(places)))
                    say(f"{job.name}: starts" + (f" on GPU {', '.join(map(str, place))}" if None not in place else ""))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.extend(one.place)
                job, seconds = one.job, time.monotonic() - one.began
                if one.process.returncode == 0:
                    done.add(job.name)
                    say(f"{job.name}: done in {seconds:.0f} s")
                elif job.num_gpus > 1:
                    waiting.insert(0, replace(job, num_gpus=1))
                    say(f"{job.name}: failed on {job.num_gpus} GPUs after {seconds:.0f} s, once more on one")
                else:
                    failed[job.name] = f"see {logs / job.name}.log"
                    say(f"{job.name} FAILED after {seconds:.0f} s: {failed[job.name]}")
                on_end()
            time.sleep(POLL_SECONDS)
    return failed


def _start(job: Job, place: list[str | None], program: Path, logs: Path, num_at_once: int) -> _Running:
    command = [sys.executable, str(program), *job.arguments]
    if job.num_gpus > 1:
        # By this address they find one another on a machine whose own name leads nowhere, too.
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command = [sys.executable, *torchrun, "--nproc-per-node", str(job.num_gpus), *command[1:]]
    # Each process would otherwise take all cores, for its products and for its compilers.
    num_threads = str(max(1, len(os.sched_getaffinity(0)) // num_at_once))
    shares = {"OMP_NUM_THREADS": num_threads, "TORCHINDUCTOR_COMPILE_THREADS": num_threads}
    env = {**shares, **os.environ, PARENT: str(os.getpid())}
    if None not in place:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place))
    with (logs / f"{job.name}.log").open("a", encoding="utf-8") as log:
        return _Running(job=job, process=subprocess.Popen(command, stdout=log, stderr=log, env=env), place=place)


def _end(running: Sequence[_Running]) -> None:
    for one in running:
        one.process.terminate()
    for one in running:
        one.process.wait()


def end_with_parent() -> None:
    """In a job: end as soon as the process that gave it out is gone, however that ended; its work can be resumed."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while True:
            try:
                os.kill(int(parent), 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()
