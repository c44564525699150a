"""Compiled programs that outlive the process."""

import os
import stat
import warnings
from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Keep what XLA compiles in ~/.cache/jaxformer, so that the next process need not compile it.

    JAX_COMPILATION_CACHE_DIR names another directory; JAX_ENABLE_COMPILATION_CACHE=0 turns this
    off. Nothing is kept where nothing can be written, nor read where others could put programs.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        if not caches.is_absolute():  # no home directory, as in a container without users
            return
        folder = caches / "jaxformer"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            status = folder.stat()
        except OSError:
            return
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            return
        if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
            return
        # JAX warns about programs of another user that we may not read, and of a full disk.
        warnings.filterwarnings("ignore", "Error (read|writ)ing persistent compilation cache entry")
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
