"""Trainings in processes of their own, forked from one that has imported what they need: that takes longer than they do."""

import multiprocessing
import os
from multiprocessing import connection

from segops.train.cli import main

from ..targets import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["segops.train.cli"])


def start(log, commands, **environment):
    """Begins a process that calls `segops.train.cli.main` with each of the commands, and writes what is said into `log`."""
    process = CONTEXT.Process(target=_run, args=(log, commands, environment))
    process.start()
    return process


def _run(log, commands, environment):
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    for command in commands:
        main(command)


def on_two_ranks(folder, *commands):
    """Runs commands, which ask for two devices, in two processes."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [folder / f"{rank}.txt" for rank in range(2)]
    ranks = [start(log, commands, LOCAL_RANK=str(rank), **address) for rank, log in enumerate(logs)]
    waiting = ranks
    while waiting:
        connection.wait([rank.sentinel for rank in waiting])
        waiting = [rank for rank in waiting if rank.exitcode is None]
        if any(rank.exitcode for rank in ranks):
            for rank in waiting:  # which would wait for the one that failed
                rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
