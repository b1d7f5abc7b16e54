"""Processes of `sparring doctor` that misbehave: ranks (launch/doctor_rank.py), and checks of kernels."""

from __future__ import annotations

import os
import signal
import time


def absent(queue, device, limit):
    """Rank 1 never joins."""
    from sparring.launch import doctor_rank

    if os.environ["RANK"] == "1":
        time.sleep(600)
    doctor_rank.work(queue, device, limit)


def stuck(queue, device, limit):
    """Rank 1 joins, and is then stuck."""
    from sparring.launch import doctor_rank

    if os.environ["RANK"] == "1":
        doctor_rank.CHECKS["exchange"] = lambda *given: time.sleep(600)
    doctor_rank.work(queue, device, limit)


def all_stuck(queue, device, limit):
    """All ranks join, and are then stuck where no limit but that of the process itself can end them."""
    from sparring.launch import doctor_rank

    doctor_rank.CHECKS["exchange"] = lambda *given: time.sleep(600)
    doctor_rank.work(queue, device, limit)


def killed(queue, device, limit):
    """Rank 1 joins, and is then killed."""
    from sparring.launch import doctor_rank

    if os.environ["RANK"] == "1":
        doctor_rank.CHECKS["all-to-all"] = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    doctor_rank.work(queue, device, limit)


def crash(queue, devices):
    """The first kernel takes its process with it."""
    queue.put(f"kernel.{devices[0]}.triton.float32")
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(queue, devices):
    """The first kernel never ends, and its process does not listen."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("this is not for stdout", flush=True)
    queue.put(f"kernel.{devices[0]}.triton.float32")
    time.sleep(600)
