"""Functions of tests called in several processes that form a group.

The processes come from the fork server of kill_runs, which has imported torch once.
"""
from pathlib import Path
from typing import Any, Callable, List

import torch
import torch.distributed as dist
from kill_runs import start_method


def run_ranks(function: Callable[[int, int], Any], folder: Path, world_size: int = 2) -> List[Any]:
    """Call a function of a test's module in each rank.

    Args:
        function: Takes its rank and the number of ranks; returns what torch can save.
        folder: Where the ranks meet and leave their results.
        world_size: Number of ranks.

    Returns:
        What the ranks returned, in their order.
    """
    processes = [
        start_method().Process(target=_run_rank, args=(function, rank, world_size, str(folder)))
        for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one whose partner has died waits for ever
    assert codes == [0] * world_size
    return [torch.load(folder / f'rank{rank}.pt', weights_only=False) for rank in range(world_size)]


def _run_rank(function: Callable[[int, int], Any], rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=world_size)
    result = function(rank, world_size)
    torch.save(result, f'{folder}/rank{rank}.pt')
    dist.destroy_process_group()
