"""`python -m train plan`: the figures of its report, and what it refuses."""

import contextlib
import dataclasses
import json
import os
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxformer.errors import UserError
from jaxformer.generation_config import GenerationConfig
from jaxformer.pages.pictures import picture
from small_run import change, small_config
from train.cli import main
from train.costs.chips import CHIPS, chip_of
from train.costs.flops import decode_step_flops, train_flops
from train.costs.memory import program_memory
from train.plan import plan as planning
from train.plan.collectives import Collective
from train.plan.estimates import largest_fitting, roofline
from train.plan.machines import TPUS, Machine, present_machine, tpu_machine
from train.plan.plan import Work, plan, work_of
from train.plan.programs import DecodeProgram, DoesNotFit, StepProgram, decode_program, step_program
from train.plan.report import plan_tables, plot_plan

V5E = TPUS["v5e"]


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path / "nothing is here", steps=3600)


def as_if(chip, devices=8):
    """The devices of this machine, with the data sheet of `chip`."""
    return Machine(f"{chip.name}:test", tuple(jax.devices()[:devices]), chip.memory, chip)


@pytest.fixture
def no_compiles(monkeypatch):
    """Programs that need 100 bytes, and 2 per row, on each device."""

    def compiled(config, machine, rows, source):
        rows //= len(machine.devices)
        return StepProgram(40, 60, 100 + rows, rows, 0, 0, 1e9, 1e9, 3e6, (), 0.5)

    monkeypatch.setattr(planning, "step_program", compiled)
    monkeypatch.setattr(planning, "decode_program", lambda *_: DecodeProgram(100, 50.0, 0.5))


def test_records_of_the_machine_that_is_here(config, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from train.config import TrainConfig\n"
        f"config = TrainConfig.from_dict({config.to_dict()!r})\n"
    )
    output = tmp_path / "plan.jsonl"
    assert main(["plan", str(path), "--output", str(output), "--model.d_ff", "40"]) == 0
    train, decode = map(json.loads, output.read_text().splitlines())
    devices = jax.device_count()
    model = dataclasses.replace(config.model, d_ff=40)
    assert train["machine"] == f"{devices} x cpu" and train["chips"] == devices
    assert train["rows"] == 16 and train["batch_tokens"] == 16 * 16
    assert train["source_length"] == 16  # as long as the target, since data.source_length is 0
    assert train["model_flops"] == train_flops(model, 16, 16, 16)
    assert train["fits"] and train["memory"]["total"] < train["memory_available"]
    parts = set(train["memory"]) - {"total"}
    assert sum(train["memory"][part] for part in parts) == train["memory"]["total"]
    # There is no data sheet for this machine.
    assert "step_seconds" not in train and "largest_batch_tokens" not in train
    assert decode["plan"] == "decode" and decode["step_flops"] > 0 and decode["step_bytes"] > 0
    printed = capsys.readouterr()
    assert "Compiled, not measured" in printed.out and "Assumed:" in printed.out
    assert "no data sheet of this machine" in printed.out
    assert printed.err.count("compiled in") == 2


def test_times_are_those_of_the_slowest_resource(config, no_compiles):
    machine = as_if(V5E)
    record = next(iter(plan(config, [machine])))
    terms = record["roofline_seconds"]
    flops = train_flops(config.model, record["rows"], 16, 16)
    assert terms["compute"] == pytest.approx(flops / 8 / 197e12)
    assert terms["memory"] == pytest.approx(3e6 / 819e9)
    assert record["bound_by"] == "memory" and record["step_seconds"] == terms["memory"]
    assert record["hours"] == pytest.approx(record["step_seconds"])  # 3600 steps
    assert record["chip_hours"] == pytest.approx(8 * record["hours"])
    assert record["tokens_per_second"] == pytest.approx(256 / terms["memory"])


def test_the_tables_have_each_figure_under_its_name(config, monkeypatch):
    sums = Collective("all-reduce", 1.6e8, 8, 1)

    def compiled(config, machine, rows, source):
        each = rows // 8
        return StepProgram(
            *(1_000_000, 2_000_000, 3_000_000 + 4 * each, 8 * each, 16 * each, 32_000_000),
            *(8e12, 6e9, 2e9, (sums,), 0.5),
        )

    monkeypatch.setattr(planning, "step_program", compiled)
    monkeypatch.setattr(
        planning, "decode_program", lambda *_: DecodeProgram(5_000_000, 8.19e9, 0.5)
    )
    machine = as_if(V5E)
    long = change(config, steps=3_600_000)
    train, decode = plan(long, [machine], rows_per_device=1_000_000)
    said = plan_tables([train, decode], [machine])
    tables = []
    for block in said.split("\n\n")[1:5]:
        head, row = (re.split("  +", line) for line in block.splitlines())
        tables.append(dict(zip(head, row, strict=True)))
    memory, work, times, decoding = tables
    sizes = ("parameters", "optimizer", "batch", "temporaries", "code", "total", "of")
    assert {name: memory[name] for name in ("rows", *sizes, "fits")} == {
        "rows": "8,000,000",
        "parameters": "1.0 MB",
        "optimizer": "2.0 MB",
        "batch": "4.0 MB",
        "temporaries": "24.0 MB",
        "code": "32.0 MB",
        "total": "63.0 MB",
        "of": "17.18 GB",
        "fits": "yes",
    }
    flops = train_flops(config.model, 1_000_000, 16, 16)
    assert work == {
        "machine": machine.name,
        "TFLOP": f"{flops / 1e12:,.3f}",
        "by XLA": "8.000",
        "moved": "2.00 GB",
        "moved, by XLA": "6.00 GB",
        "sent": "280.0 MB",
        "collectives": "1 all-reduce, 160.0 MB",
        "compiled in s": "0.5",
    }
    compute = flops / 197e12
    assert times == {
        "machine": machine.name,
        "compute ms": f"{1000 * compute:,.2f}",
        "memory ms": "2.44",
        "interconnect ms": "1.40",
        "ms/step at least": f"{1000 * compute:,.2f}",
        "bound by": "compute",
        "tokens/s at most": f"{128e6 / compute:,.0f}",
        "hours at least": f"{1000 * compute:,.2f}",
        "chip-hours at least": f"{8000 * compute:,.1f}",
    }
    assert (decoding["memory"], decoding["of"]) == ("5.0 MB", "17.18 GB")
    assert (decoding["moved/token step"], decoding["ms/token step at least"]) == (
        "8.19 GB",
        "10.000",
    )
    assert (decoding["sentences"], decoding["beams"], decoding["bound by"]) == ("64", "2", "memory")
    note = "float32 products are made at the rate of bfloat16"
    for dtype in ("float32", "bfloat16"):
        said = plan_tables([train | {"dtype": dtype}, decode], [machine])
        assert (note in said) == (dtype == "float32")
        assert "A chip is two devices" not in said


def test_roofline():
    assert roofline(V5E, 197e12, 819e9, 100e9) == {
        "compute": 1.0, "memory": 1.0, "interconnect": 0.5
    }  # fmt: skip
    # A device of this chip has half of everything.
    assert roofline(TPUS["tpu7x"], 2307e12, 7380e9)["compute"] == 2.0


def test_the_batch_is_that_of_the_run_on_such_a_machine(config):
    assert work_of(config, as_if(V5E, devices=3), None) == Work(16, 18, 16, 16)
    small = change(config, data__batch_tokens=16)
    assert work_of(small, as_if(V5E), None) == Work(1, 8, 16, 16)
    assert work_of(change(small, accumulate=2), as_if(V5E), None).rows == 16
    assert work_of(config, as_if(V5E), 5) == Work(40, 40, 16, 16)
    assert work_of(change(config, data__source_length=20), as_if(V5E), None).source == 20
    with pytest.raises(UserError, match="--rows-per-device is 3: give a multiple of accumulate=2"):
        work_of(change(config, accumulate=2), as_if(V5E), 3)


@pytest.mark.parametrize(("memory", "largest"), [(120, 10), (121, 10), (1100, 500), (99, 0)])
def test_the_largest_batch_of_a_straight_line(memory, largest):
    asked = []

    def needs(size):
        asked.append(size)
        return 100 + 2 * size

    assert largest_fitting(needs, memory, first=2) == largest
    assert len(asked) == len(set(asked)) <= 5


def test_the_largest_batch_that_is_reported_was_seen_to_fit():
    def bent(size):
        return 100 + size**1.5

    for memory in (300, 900):
        largest = largest_fitting(bent, memory, first=4)
        assert bent(largest) <= memory < bent(1.2 * largest)
    assert largest_fitting(bent, 900, first=400) > 0


def test_a_compiler_that_says_no_more_than_no():
    def refusing(size):
        return 100 + 2 * size if size < 90 else float("inf")

    assert 20 < largest_fitting(refusing, 5000, first=4) < 90
    assert 20 < largest_fitting(refusing, 150, first=300) <= 25


def test_the_largest_batch_is_sought_once_a_chip(config, no_compiles):
    machines = [as_if(V5E, devices=2), as_if(V5E, devices=4)]
    machines = [dataclasses.replace(machine, memory=140) for machine in machines]
    first, second, *_ = plan(config, machines, rows_per_device=4)
    assert first["largest_batch_tokens"] == 20 * 2 * 16
    assert second["largest_batch_tokens"] == 20 * 4 * 16
    assert first["largest_found_on"] == second["largest_found_on"] == machines[0].name


def test_what_does_not_fit_is_said(config, monkeypatch):
    def refused(*_):
        raise DoesNotFit("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.")

    monkeypatch.setattr(planning, "step_program", refused)
    monkeypatch.setattr(planning, "decode_program", refused)
    machine = as_if(V5E)
    train, decode = plan(config, [machine])
    assert not train["fits"] and train["memory"]["total"] == 20.5 * 2**30
    assert train["largest_batch_tokens"] == 0 and not decode["fits"]
    table = plan_tables([train, decode], [machine])
    assert "NO" in table and "Used 20.50G of 15.75G hbm" in table


def test_the_sheets_are_of_chips_that_jax_knows():
    names = [chip.name for chip in CHIPS]
    kinds = [chip.device_kind for chip in CHIPS]
    assert len(set(names)) == len(names) and len(set(kinds)) == len(kinds)
    for chip in CHIPS:
        # FLOP per byte of memory and of links: outside these ranges a figure has a wrong unit.
        assert 100 < chip.flops / chip.memory_bandwidth < 700
        assert 700 < chip.flops / chip.interconnect < 4000
        assert chip.source
    # As in the sheets: TFLOP/s, memory, GB/s of memory and of links, chips of a pod.
    assert {
        chip.name: (
            chip.flops / 1e12,
            chip.memory / (10**9 if chip.name == "H200" else 2**30),
            chip.memory_bandwidth / 1e9,
            chip.interconnect / 1e9,
            chip.pod,
        )
        for chip in CHIPS
    } == {
        "v4": (275, 32, 1200, 300, 4096),
        "v5e": (197, 16, 819, 200, 256),
        "v5p": (459, 95, 2765, 600, 8960),
        "v6e": (918, 32, 1638, 400, 256),
        "tpu7x": (2307, 192, 7380, 600, 9216),
        "A100 40GB": (312, 40, 1555, 300, 0),
        "A100 80GB": (312, 80, 2039, 300, 0),
        "H100": (989, 80, 3350, 450, 0),
        "H200": (989, 141, 4800, 450, 0),
    }
    assert chip_of(jax.devices()[0]) is None


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", r"no TPU 'v9' .* give one of v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB, tpu7x:A"),
        ("v5e", "'v5e' does not say how many chips .* such as v5e:2x2"),
        ("v5e:2x2x2", "does not say how many chips there are along each axis"),
        ("v5p:2x2", "such as v5p:2x2x1"),
        ("v5e:0x2", "does not say"),
        ("v5e:32x32", "v5e:32x32 has 1,024 chips, a v5e pod 256: make it smaller"),
    ],
)
def test_impossible_topologies(topology, message):
    with pytest.raises(UserError, match=message):
        tpu_machine(topology)


def test_without_libtpu_a_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'not installed: pip install -e "\.\[tpu\]"'):
        tpu_machine("v5e:2x2")


def test_a_model_that_cannot_be_split_is_refused_before_anything_is_compiled(config, monkeypatch):
    monkeypatch.setattr(planning, "step_program", lambda *_: pytest.fail("compiled"))
    split = dataclasses.replace(config.parallel, strategy="mesh", tensor=4)
    with pytest.raises(UserError, match=r"model.num_heads=2 cannot be split by parallel.tensor=4"):
        next(plan(dataclasses.replace(config, parallel=split), [as_if(V5E)]))


def test_errors_of_the_command_line(capsys, tmp_path):
    assert main(["plan", "wmt15_base"]) == 1
    assert "did you mean wmt14_base?" in capsys.readouterr().err
    assert main(["plan", "wmt14_base", "--topology", "v3:2x2"]) == 1
    assert "no TPU 'v3'" in capsys.readouterr().err
    plot = ["--topology", "v5e:2x2", "--plot", "cost.png"]
    assert main(["plan", "quickstart", *plot]) == 1
    assert "nothing to draw: give --topology several" in capsys.readouterr().err
    assert main(["plan", "quickstart", "--topologie", "v5e:2x2"]) == 1
    assert "no field --topologie" in capsys.readouterr().err


def test_a_picture_over_the_machines(config, no_compiles, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []

    @contextlib.contextmanager
    def kept(*given):
        with picture(*given) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr("train.plan.report.picture", kept)
    machines = [as_if(V5E, devices=8), as_if(V5E, devices=1), as_if(TPUS["v5p"], devices=2)]
    records = [record for record, _ in zip(plan(config, machines), machines, strict=False)]
    path = tmp_path / "cost.png"
    plot_plan(str(path), records)
    assert path.read_bytes().startswith(b"\x89PNG")
    _, speed, cost, memory = figures[0].axes
    ordered = records[1::-1]  # by the number of chips
    for axis, values in (
        (speed, [record["tokens_per_second"] for record in ordered]),
        (cost, [record["chip_hours"] for record in ordered]),
        (memory, [record["memory"]["total"] * 1e-9 for record in ordered]),
    ):
        (line,) = (line for line in axis.lines if line.get_label() == "v5e")
        assert [*line.get_xdata()] == [1, 8] and [*line.get_ydata()] == values
    with pytest.raises(UserError, match="give --topology several slices"):
        plot_plan(str(path), records[:1])
    with pytest.raises(UserError, match="cannot write"):
        plot_plan(str(path / "cost.png"), records)


def test_slices_that_are_compiled_for(config):
    pytest.importorskip("libtpu")
    for topology, devices, kind in (
        ("v4:2x2x1", 4, "TPU v4"),
        ("v5e:2x2", 4, "TPU v5 lite"),
        ("v5p:2x2x1", 4, "TPU v5"),
        ("v6e:2x2", 4, "TPU v6 lite"),
        ("tpu7x:2x2x1", 8, "TPU7x"),
    ):
        machine = tpu_machine(topology)
        assert len(machine.devices) == devices and machine.chips == 4
        assert machine.chip == chip_of(machine.devices[0])
        assert machine.chip.device_kind == kind
    with pytest.raises(UserError, match=r"libtpu refuses the topology v5e:3x3: .*not divisible"):
        tpu_machine("v5e:3x3")


@pytest.mark.parametrize("strategy", ["pmap", "mesh"])
def test_a_step_for_tpu(config, strategy):
    pytest.importorskip("libtpu")
    mesh = dataclasses.replace(config.parallel, strategy="mesh", fsdp=2)
    if strategy == "mesh":
        config = dataclasses.replace(config, parallel=mesh)
    program = step_program(config, tpu_machine("v5e:2x2"), 16, 16)
    kinds = {one.kind for one in program.collectives}
    sent = sum(one.bytes for one in program.collectives)
    if strategy == "pmap":
        assert kinds == {"all-reduce"}
        assert sent == pytest.approx(program.parameters, rel=0.01)
    else:
        assert "all-gather" in kinds
    assert 0 < program.bytes_moved < program.xla_bytes
    assert program.arguments > program.parameters + program.optimizer
    with pytest.raises(DoesNotFit) as refusal:
        step_program(config, tpu_machine("v5e:2x2"), 2**22, 16)
    assert refusal.value.needed > V5E.memory


def test_decoding_for_tpu(config):
    pytest.importorskip("libtpu")
    program = decode_program(config, tpu_machine("v5e:2x2"), GenerationConfig(beam_size=2), 4, 8)
    assert 0 < program.step_bytes < program.memory


def test_chips_of_two_devices_and_rows_without_tokens(config, no_compiles):
    small = change(config, data__batch_tokens=5 * 16)
    machine = as_if(TPUS["tpu7x"])
    train, decode = plan(small, [machine])
    assert "A chip is two devices." in plan_tables([train, decode], [machine])
    assert (train["devices"], train["chips"], train["rows"], train["full_rows"]) == (8, 4, 8, 5)
    found = {name: train[name] for name in ("chip_hours", "tokens_per_second", "xla_flops")}
    found |= {"compute": train["roofline_seconds"]["compute"]}
    assert found == pytest.approx(
        {
            "chip_hours": 4 * train["hours"],
            "tokens_per_second": 5 * 16 / train["step_seconds"],
            "xla_flops": 8e9,
            "compute": train_flops(config.model, 8, 16, 16) / 8 / (2307e12 / 2),
        }
    )
    beams, room = decode["beam_size"], decode["max_length"]
    asked = planning.SENTENCES, beams, planning.SOURCE_LENGTH, beams * room
    assert {name: decode[name] for name in ("step_flops", "tokens_per_second")} == pytest.approx(
        {
            "step_flops": decode_step_flops(config.model, *asked),
            "tokens_per_second": planning.SENTENCES / decode["step_seconds"],
        }
    )


def test_the_largest_batch_counts_all_parts_of_an_accumulated_one(config, no_compiles):
    machine = dataclasses.replace(as_if(V5E, devices=2), memory=140)
    record, *_ = plan(change(config, accumulate=2), [machine], rows_per_device=4)
    assert record["largest_batch_tokens"] == 20 * 2 * 16


def test_devices_that_share_matrices_have_the_same_rows(config, no_compiles):
    machine = dataclasses.replace(as_if(V5E), memory=140)
    config = change(config, parallel__strategy="mesh", parallel__tensor=2, data__batch_tokens=32)
    record, *_ = plan(config, [machine])
    assert record["rows"] == 4 and record["fits"]  # fewer rows than devices
    assert record["largest_batch_tokens"] // 16 in range(20 * 8, 21 * 8)


def test_memory_that_is_used_again_counts_once():
    x = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    for donated, arrays in ((0, 1), ((), 2)):
        compiled = jax.jit(lambda x: x + 1, donate_argnums=donated).lower(x).compile()
        assert program_memory(compiled) == pytest.approx(arrays * 2**22, rel=0.1)
    sizes = {
        "argument_size_in_bytes": 40_000,
        "output_size_in_bytes": 3_000,
        "alias_size_in_bytes": 1_000,
        "temp_size_in_bytes": 500,
        "generated_code_size_in_bytes": 60,
    }
    compiled = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))
    assert program_memory(compiled) == 42_560


def test_collectives_count_as_often_as_they_run():
    found = [Collective("all-reduce", 100.0, 4, 3), Collective("all-reduce", 10.0, 2, 1)]
    (total,) = planning._by_kind(found).values()
    assert total == {"times": 4, "bytes": 310.0, "sent": 3 * 150.0 + 10.0}


def test_devices_share_the_memory_that_is_here():
    machine = present_machine()
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if machine.devices[0].platform == "cpu":
        assert machine.memory == here // len(machine.devices)
