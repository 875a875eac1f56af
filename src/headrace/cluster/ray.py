"""Work on a Ray cluster. The only file that knows Ray (`pip install headrace[ray]`).

Bytes go in and bytes come out; Ray finds the function by its name, so every machine needs the same headrace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from headrace.core.types import HeadraceError

Work = Callable[[bytes], bytes]


class NoCluster(HeadraceError):
    """Ray is not installed, or not there, or lost the work."""


def on_ray(address: str) -> Callable[[Work, Sequence[bytes]], Iterator[tuple[int, bytes]]]:
    """As `sim.workers.forked`, on every core of a cluster: 'local' starts one here, 'auto' finds a running one, or its
    address. Raises NoCluster."""
    try:
        import ray
    except ImportError as error:
        raise NoCluster("--ray needs Ray; install it with: pip install 'headrace[ray]'") from error

    def each(work: Work, items: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
        try:
            if not ray.is_initialized():
                ray.init(address=address, include_dashboard=None if address == "auto" else False, log_to_driver=False)
            remote = ray.remote(work)
            running = {remote.remote(item): at for at, item in enumerate(items)}
            while running:
                for done in ray.wait(list(running))[0]:
                    yield running.pop(done), ray.get(done)
        except (ray.exceptions.RayError, ConnectionError, ValueError) as error:
            raise NoCluster(f"the Ray cluster {address!r} failed: {error}") from error

    return each
