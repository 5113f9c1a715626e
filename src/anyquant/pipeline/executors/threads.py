"""Run independent tasks in threads, with a bounded number in flight; the first error stops the rest."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from anyquant.pipeline.executors.memory import keep_freed_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_all(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int, done: Callable[[Item, Result], None]
) -> None:
    """Call `work` on every item in `threads` threads and `done` (in this thread) on every result, in any order.

    At most 2 * threads items are in flight. The first exception is raised after the running items have ended.
    """
    keep_freed_memory()
    source = iter(items)
    running: dict[Future[Result], Item] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="anyquant") as pool:
        exhausted = False
        try:
            while running or not exhausted:
                while not exhausted and len(running) < 2 * threads:
                    item = next(source, None)
                    if item is None:
                        exhausted = True
                    else:
                        running[pool.submit(work, item)] = item
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(running.pop(future), future.result())
        except BaseException:
            for future in running:
                future.cancel()
            raise
