"""XLA's persistent cache of compiled programs.

jax is imported where it is used: the doctor is to say why it cannot be, and comes through this file.
"""

import functools
from typing import Any

from stellarbyte_jax.config.paths import home


class CompileCache:
    """XLA's persistent cache of compiled programs, switched on for every program however small.

    ``JAX_COMPILATION_CACHE_DIR`` chooses the directory; ``~/.cache/stellarbyte_jax/xla`` otherwise. Without a home
    directory there is no cache: in a folder of temporary files, others could leave programs for this user to run.
    """

    def __init__(self) -> None:
        """Switches the cache on and starts counting what it lacks."""
        import jax

        self.misses = 0
        self.compile_seconds = 0.0
        if not jax.config.values.get("jax_compilation_cache_dir") and (place := home()) is not None:
            jax.config.update("jax_compilation_cache_dir", str(place / ".cache" / "stellarbyte_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        forget_parts()
        jax.monitoring.register_event_listener(self._count)
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.compile_seconds += duration_secs

    def _count(self, event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_misses":
            self.misses += 1


def forget_parts() -> None:
    """From now on a program of which the cache has a part only is compiled again, and takes its place.

    JAX writes an entry in place. Where a process is killed or a disk full meanwhile, every later process would read
    the part, warn, compile, and leave it as it is.
    """
    from jax._src import compilation_cache
    from jax._src.lru_cache import LRUCache

    read = LRUCache.get
    if hasattr(read, "__wrapped__"):
        return

    @functools.wraps(read)
    def get(self: Any, key: str) -> bytes | None:
        entry = read(self, key)
        if entry is not None:
            try:
                compilation_cache.decompress_executable(entry)
            except Exception:  # of whichever library compresses
                for file in self.path.glob(f"{key}-*"):
                    file.unlink(missing_ok=True)
                return None
        return entry

    LRUCache.get = get
