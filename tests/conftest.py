"""Eight CPU devices for every test; shapes in jaxformer's annotations are checked at run time."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

# Must be set before JAX first looks for devices. Values set by the caller win: with
# JAX_PLATFORMS=cuda the same tests run on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here run for milliseconds, so they are compiled quickly: LLVM optimises less, and JAX
# 0.10 uses its older emitters, in half the time. To test, more slowly, what users run, set
# `XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true"`.
os.environ.setdefault("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
if (
    "xla_cpu_use_fusion_emitters" not in os.environ["XLA_FLAGS"]
    and importlib.metadata.version("jaxlib").startswith("0.10.")  # later versions abort if given it
):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# A test that asks the hub for something fails at once, with or without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Many tests run the same programs. Each is compiled once, also for xdist's workers and for the
# processes that tests start, which inherit this cache. It is deleted at the end.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="jaxformer-tests-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# No deadline: the example that compiles takes longer than the others.
hypothesis.settings.register_profile("jaxformer", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxformer")

install_import_hook("jaxformer", "beartype.beartype")


# The longest files start first, so that no worker waits for another at the end.
_LONG = (
    "generator docs fit resume stablehlo benchmark_steps benchmark generation mesh translator "
    "explain cli marian plan_programs"
).split()


def pytest_collection_modifyitems(items):
    """Order the files; the tests within a file keep their order."""

    def place(item):
        name = item.path.stem.removeprefix("test_")
        return _LONG.index(name) if name in _LONG else len(_LONG)

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Each has memory mappings of its own, of which Linux allows a process at most 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def one_program_a_search():
    """Give searches all slots at once: for more, a second program would be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "jaxformer.generator._usual_slots",
            lambda options, source_length, room: options.num_beams * room,
        )
        yield


@pytest.fixture
def known_yardsticks(monkeypatch):
    """100 GFLOP/s and 10 GB/s, not measured: large matrices take seconds on simulated devices."""
    monkeypatch.setattr("train.benchmark.peaks.matmul_peak", lambda *_: 1e11)
    monkeypatch.setattr("train.benchmark.peaks.memory_bandwidth", lambda *_: 1e10)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that matplotlib writes during a test, by file name."""
    from jaxformer.pages import pictures

    figure = pytest.importorskip("matplotlib.figure")
    found, last, draw, write = {}, [], figure.Figure.savefig, pictures.write_bytes

    def keep(self, file, **options):
        last.append(self)
        draw(self, file, **options)

    def name(path, content):
        found[path.name] = last.pop()
        write(path, content)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    monkeypatch.setattr(pictures, "write_bytes", name)
    return found
