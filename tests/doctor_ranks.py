"""Ranks of `sparring doctor` that misbehave, as processes import them: see launch/doctor_rank.py."""

from __future__ import annotations

import os
import signal
import time

from sparring.launch import doctor_rank


def absent(queue, device, limit):
    """Rank 1 never joins."""
    if os.environ["RANK"] == "1":
        time.sleep(600)
    doctor_rank.work(queue, device, limit)


def stuck(queue, device, limit):
    """Rank 1 joins, and is then stuck."""
    if os.environ["RANK"] == "1":
        doctor_rank.CHECKS["exchange"] = lambda *given: time.sleep(600)
    doctor_rank.work(queue, device, limit)


def all_stuck(queue, device, limit):
    """All ranks join, and are then stuck where no limit but that of the process itself can end them."""
    doctor_rank.CHECKS["exchange"] = lambda *given: time.sleep(600)
    doctor_rank.work(queue, device, limit)


def killed(queue, device, limit):
    """Rank 1 joins, and is then killed."""
    if os.environ["RANK"] == "1":
        doctor_rank.CHECKS["all-to-all"] = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    doctor_rank.work(queue, device, limit)
