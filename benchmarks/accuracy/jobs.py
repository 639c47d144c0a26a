"""Runs experiments in parallel, each in its own process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from settings import EXPERIMENTS

if TYPE_CHECKING:
    from gramfuse_simulation.all_silos import AllSilos


@dataclass(frozen=True)
class Job:
    """One experiment with one seed."""

    name: str
    seed: int
    data: str
    base: str | None
    out: Path
    cache: Path
    quick: bool
    settings: tuple[str, ...]
    skip: tuple[str, ...]


def run_jobs(jobs: Sequence[Job], at_a_time: int) -> None:
    """Run all jobs, `at_a_time` in parallel, and print the remaining time."""
    threads = max(1, (os.cpu_count() or 1) // at_a_time)
    context = multiprocessing.get_context("spawn")
    began = time.monotonic()
    pool = ProcessPoolExecutor(at_a_time, mp_context=context, initializer=set_up, initargs=(threads,))
    stop = signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        futures = {pool.submit(run_job, job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            future.result()
            left = (time.monotonic() - began) / done * (len(jobs) - done) / 60
            say(f"[{done}/{len(jobs)}] {job.name}, seed {job.seed} is done; about {left:.0f} min left")
    except BaseException as error:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit("interrupted; results so far are kept, and the same command continues") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, stop)


def set_up(threads: int) -> None:
    """Set up a worker process."""
    import torch
    from flwr.supercore.task_identity import TaskIdentity
    from transformers.utils import logging as transformers

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    transformers.set_verbosity_error()
    transformers.disable_progress_bar()
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # FedAvg's messages need them
    logging.getLogger("flwr").setLevel(logging.ERROR)


def run_job(job: Job) -> None:
    """Train the silos of an experiment, unless cached, and measure what is not in its store yet."""
    from bases import cached_base
    from experiment import Experiment, Store, machine, run
    from gramfuse_server.run.evaluation import ranked_by
    from heads import Heads, with_fitted_head
    from sets import Source
    from silos import laboratory

    spec = EXPERIMENTS[job.name]
    setting = spec.make(Source(job.data), job.seed)
    base = job.base or setting.base
    if spec.base and not job.base:
        base = str(cached_base(spec.base, Source(job.data), job.cache, quick=job.quick).resolve())
    setting = replace(setting, training={**setting.training, "seed": job.seed}, base=base)
    if job.quick:
        setting = setting.quick()
    silos, seconds = laboratory(setting, job.name, job.cache, job.settings)
    upload = {mode: silos.layout.upload_bytes(masked=mode == "secure") for mode in ("open", "secure")}
    about = {
        "experiment": job.name,
        "title": setting.title,
        "seed": job.seed,
        "base": setting.base,
        "plan": silos.plan.digest,
        "training": silos.plan.training.model_dump(mode="json"),
        "examples": {name: contribution.examples for name, contribution in silos.contributions.items()},
        "upload": upload,
        "train-seconds": round(seconds, 1),
        "machine": machine(),
    }
    store = Store(job.out / f"{job.name}-seed{job.seed}.json", about)
    if store.content["plan"] != silos.plan.digest:
        raise SystemExit(f"{store.path}: belongs to another plan; remove it, or choose another --out")
    metric = setting.metric or ranked_by(silos.plan)
    store.content["metric"] = metric

    def tell(row: dict[str, Any]) -> None:
        where = f" of {', '.join(row['silos'])}" if len(row["silos"]) < len(silos.plan.names) else ""
        say(f"  {job.name}, seed {job.seed}: {row['model']}{where}: {row['in'][metric]:.3f} ({row['seconds']:.0f} s)")

    experiment = Experiment(silos, store, metric, tell, quick=job.quick)
    every_time = ("joint", "transport", "heads")
    parts = [p for p in spec.parts if p not in job.skip and (job.seed == 1 or p in every_time)]
    fedavg = 0 if job.seed > 1 or "fedavg" in job.skip else spec.fedavg
    subsets = spec.subsets or (experiment.everyone,)
    if job.quick:
        subsets, fedavg = tuple(dict.fromkeys((subsets[0], subsets[-1]))), min(2, fedavg)
    run(experiment, subsets, parts, fedavg=fedavg)
    if "heads" in parts:

        def warm() -> AllSilos:
            fitted = with_fitted_head(silos, setting, silos.directory.parent / f"{silos.plan.digest}-fitted")
            return laboratory(fitted, f"{job.name}-fitted", job.cache, job.settings)[0]

        Heads(experiment, warm).run()


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)
