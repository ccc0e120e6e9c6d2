"""The planner: its arithmetic against numbers worked out by hand, its agreement with the runtime's own memory plan, its
changes against trying each of them, and the command's contract."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.calibration_data import write_calibration_checkpoint, write_calibration_data
from tests.tiny_bundle import export, run_cli, write_text_checkpoint
from vlmdeploy.bundle import read_manifest
from vlmdeploy.export.engines.parts import build_bytes
from vlmdeploy.plan.device import PlanDevice, plan_device
from vlmdeploy.plan.draft import Plan
from vlmdeploy.plan.memory import PHASES, Setting, engine_buffers
from vlmdeploy.plan.options import PlanOptions
from vlmdeploy.plan.planned_model import checkpoint_model, released_model
from vlmdeploy.plan.planner import make_plan, plan_json
from vlmdeploy.plan.speed import encoder_flop, prompt_flop
from vlmdeploy.plan.table import headline, plan_tables
from vlmdeploy.runtime.backends.trt import buffer_bytes, needed_bytes

KEYS = {"weights_bytes", "kv_bytes_per_token", "peak_bytes", "ttft_s", "decode_tok_s", "verdict", "changes"}
INT4_ENCODER = {"vision": "int4", "connector": "int4"}


def planned(family: str, device: str | PlanDevice, **options: Any) -> Plan:
    found = plan_device(device) if isinstance(device, str) else device
    return make_plan(released_model(family), found, PlanOptions(**options))


def board(usable: float) -> PlanDevice:
    """A Jetson with so many GB for us."""
    return replace(plan_device("agx-orin-64"), usable_bytes=int(usable * 1e9))


def test_phases_hold_what_they_use() -> None:
    plan = planned("cogvlm2", "agx-orin-64")
    shipped, memory = plan.weights_bytes, plan.memory
    linears = {part: shipped[part] for part in ("vision", "connector", "language_experts", "vision_experts", "lm_head")}
    assert memory["vision"].weights == pytest.approx(linears["vision"] + linears["connector"], rel=0.01)
    assert memory["decode"].weights == pytest.approx(linears["language_experts"] + linears["lm_head"], rel=0.01)
    assert memory["prefill"].weights - memory["decode"].weights == pytest.approx(linears["vision_experts"], rel=0.01)
    everything = planned("cogvlm2", "agx-orin-64", residency="all")
    assert everything.memory["decode"].weights == sum(shipped.values()) - shipped["embedding"]
    assert all(phase.kv == 131072 * 8192 for phase in memory.values())


def test_buffers_are_those_that_the_runtime_allocates(tmp_path: Path) -> None:
    bundle = export(write_text_checkpoint(tmp_path / "ckpt"), tmp_path / "bundle", "trt-int4")
    manifest, geometry = read_manifest(bundle), checkpoint_model(tmp_path / "ckpt").geometry
    cache = manifest.context_tokens * manifest.memory_bytes["kv_per_token"]
    setting = Setting(chunk_rows=manifest.context_tokens)  # shorter than the default
    buffers = sum(engine_buffers(geometry, setting).values())
    assert buffers + cache == sum(buffer_bytes(manifest, setting.chunk_rows, setting.logit_rows).values())
    plan = make_plan(checkpoint_model(tmp_path / "ckpt"), plan_device("agx-orin-64"), PlanOptions())
    graphs = {"vision": plan.memory["vision"].weights, "decoder_text": plan.memory["decode"].weights}
    graphs["decoder_vision"] = plan.memory["prefill"].weights - graphs["decoder_text"]
    needed, _ = needed_bytes(manifest, graphs, setting.chunk_rows, setting.logit_rows, "phase")
    scratch = plan.memory["prefill"].activations
    assert max(plan.peak_bytes.values()) == needed + scratch, "what opening asks for, and the engines' scratch"


@pytest.mark.parametrize(("family", "tera"), [("cogvlm", 11.0), ("cogvlm2", 117.0)])
def test_operations_of_the_encoder(family: str, tera: float) -> None:
    """Published estimates: 11 and 117 TFLOP for a picture, the connector left out."""
    assert encoder_flop(released_model(family).geometry) / 1e12 == pytest.approx(tera, rel=0.05)


def test_operations_of_a_prompt_by_hand() -> None:
    geometry = released_model("cogvlm").geometry
    layer = 2 * (3 * 4096 * 4096 + 4096 * 4096 + 3 * 4096 * 11008)
    tokens, head = 1227 + 64, 2 * 32000 * 4096
    expected = 32 * layer * tokens + head + 32 * 2 * tokens**2 * 4096
    assert prompt_flop(geometry, Setting(text_tokens=64)) == pytest.approx(expected, rel=1e-9)
    text = prompt_flop(geometry, Setting(images=0, text_tokens=64))
    assert text == pytest.approx(32 * layer * 64 + head + 32 * 2 * 64**2 * 4096, rel=1e-9)


def test_rates_follow_bandwidth_and_compute() -> None:
    slow, fast = (planned("cogvlm", name, precisions=INT4_ENCODER).speed for name in ("orin-nx-16", "agx-orin-64"))
    assert fast.decode_tok_s == pytest.approx([2 * rate for rate in slow.decode_tok_s]), "twice the bandwidth"
    assert slow.ttft_s is not None and fast.ttft_s is not None
    assert slow.ttft_s[0] / fast.ttft_s[0] == pytest.approx(42.5 / 15), "the ratio of their float16 rates"
    low, high = slow.decode_tok_s
    weights = 3.339e9 + 0.262e9 + 1291 * 524288
    assert (low, high) == pytest.approx((0.5 * 102.4e9 / weights, 0.85 * 102.4e9 / weights), rel=0.01)


def test_engines_of_a_card_are_built_anywhere() -> None:
    card, jetson = planned("cogvlm", "rtx-4060-ti-16"), planned("cogvlm", "orin-nx-16")
    assert (card.target, jetson.target) == ("rtx-int4", "trt-int4")
    assert card.build is not None and jetson.build is not None
    assert (card.build.where, card.build.fits) == ("on any x86-64 machine", True)
    assert (jetson.build.where, jetson.build.fits) == ("on the device", False)
    encoder = jetson.memory["vision"].weights
    assert jetson.build.least_ram_bytes == build_bytes(encoder), "the encoder cannot be cut"
    assert planned("cogvlm", "orin-nx-16", precisions=INT4_ENCODER).verdict == "fits"


def test_changes_fit_are_smallest_and_come_cheapest_first() -> None:
    plan = planned("cogvlm2", board(14.8), residency="all", precisions={})
    assert plan.verdict == f"fits with {' '.join(plan.changes[0].options)}"
    costs = [sum(change.accuracy_points) for change in plan.changes]
    assert costs == sorted(costs) and len(plan.changes) > 1
    sets = [set(change.options) for change in plan.changes]
    assert not any(one < other for one in sets for other in sets), "no change contains another"
    assert all(change.peak_bytes <= plan.usable_bytes for change in plan.changes)


def test_changes_do_what_they_say() -> None:
    plan = planned("cogvlm2", board(14.8))
    assert plan.changes[0].options == ("--swap 14GB",)
    assert planned("cogvlm2", board(14.8), swap="14GB").verdict == "fits"
    assert planned("cogvlm2", board(14.8), swap="13GB").verdict.startswith("fits with")
    other = next(change for change in plan.changes if "--vision int4 --connector int4" in change.options)
    chosen = planned("cogvlm2", board(14.8), precisions=INT4_ENCODER)
    assert (chosen.verdict, max(chosen.peak_bytes.values())) == ("fits", other.peak_bytes)


def test_what_nothing_helps_does_not_fit() -> None:
    plan = planned("cogvlm2", board(4))
    assert (plan.verdict, plan.changes) == ("does not fit", ())


def test_text_alone_needs_neither_encoder_nor_vision_expert() -> None:
    plan = planned("cogvlm", "agx-orin-64", images=0)
    assert plan.memory["prefill"].weights == plan.memory["decode"].weights
    assert plan.memory["vision"].weights == 0
    assert plan.speed.vision_flop == 0


def test_quantized_checkpoint_is_planned_as_it_is(tmp_path: Path) -> None:
    data = write_calibration_data(tmp_path / "data")
    checkpoint = write_calibration_checkpoint(tmp_path / "ckpt")
    result = run_cli(
        "quantize", "--ckpt", checkpoint, "--calib", data, "--out", tmp_path / "q", "--group", "16", "--vision", "int4",
        "--connector", "int4", "--tokens", "1", "--allow-uncalibrated",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    bundle = export(tmp_path / "q", tmp_path / "bundle", "trt-int4")
    plan = make_plan(checkpoint_model(tmp_path / "q"), plan_device("orin-nx-16"), PlanOptions())
    assert plan.precision == read_manifest(bundle).precision
    assert (plan.precision["vision"], plan.precision["decoder"]) == ("int4", "int4")


def test_three_bits_take_the_room_of_four() -> None:
    three, four = (planned("cogvlm", "agx-orin-64", bits=bits) for bits in (3, 4))
    assert three.weights_bytes == four.weights_bytes
    assert three.precision["decoder"] == "int3"


def test_json_has_the_promised_keys() -> None:
    document = json.loads(run_cli("plan", "--family", "cogvlm2", "--device", "orin-nx-16", "--json").stdout)
    assert set(document) >= KEYS
    parts = ["vision", "connector", "language_experts", "vision_experts", "embedding", "lm_head", "other"]
    assert list(document["weights_bytes"]) == parts
    assert all(isinstance(size, int) for size in document["weights_bytes"].values())
    assert tuple(document["peak_bytes"]) == PHASES
    for key in ("ttft_s", "decode_tok_s"):
        low, high = document[key]
        assert 0 < low < high
    assert document["verdict"].startswith("fits with ") and document["changes"][0]["options"]


def test_plan_of_the_issue_runs() -> None:
    options = ["--vision", "int8", "--kv", "fp16", "--context", "4096", "--images", "1", "--residency", "phase"]
    result = run_cli("plan", "--family", "cogvlm2", "--device", "orin-nx-16", *options)
    assert result.exit_code == 0
    for word in ("vision_experts", "int8, one scale per output", "prefill", "tokens/s", "what this rests on"):
        assert word in result.stdout


def test_page_holds_the_tables_and_nothing_from_outside(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason='pip install "vlmdeploy[report]"')
    page = tmp_path / "plan.html"
    result = run_cli("plan", "--family", "glm4v", "--device", "orin-nx-16", "--html", str(page), "--json")
    assert result.exit_code == 0, result.stderr
    text, peak = page.read_text(), json.loads(result.stdout)["peak_bytes"]["prefill"]
    assert f"{peak / 1e9:.3f} GB" in text and "cannot be exported" not in text and "not exported yet" in text
    assert "http" not in text and "src=" not in text and "<script" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("none/plan.html", "--html {}: cannot be written: No such file"),
        ("folder", "{}: is a folder, expected a file or a name that is free"),
    ],
)
def test_page_that_cannot_be_written_is_named(place: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    result = run_cli("plan", "--family", "cogvlm", "--device", "thor", "--html", tmp_path / place)
    assert result.exit_code == 1
    assert f"Error: {reason.format(tmp_path / place)}" in result.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"], "nothing is left aside"


def test_plan_of_this_machine_measures_its_rates() -> None:
    plan = planned("cogvlm", "host", context_tokens=1400)
    assert (plan.target, plan.provider, plan.precision["kv"]) == ("ort-int4", "cpu", "fp32")
    assert plan.device.cpu_flop_per_s is not None and plan.device.cpu_flop_per_s > 1e9
    assert plan.speed.ttft_s is not None and "measured here" in plan.device.source


def test_cpu_target_on_a_jetson_has_no_time_to_first_token() -> None:
    plan = planned("cogvlm", "orin-nx-16", target="ort-int4")
    assert plan.speed.ttft_s is None and plan_json(plan)["ttft_s"] is None
    assert any("compute rate for this target is not known" in line for line in plan.assumptions)


PROFILE = """
name = "board"
kind = "jetson"
memory = "16GB"
usable = "13GB"
bandwidth_gb_s = 100.0
fp16_tflops = 10
"""


def test_profile_file_is_a_device(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(PROFILE)
    device = plan_device(str(path))
    assert (device.name, device.usable_bytes, device.bandwidth_bytes_per_s) == ("board", 13 * 10**9, 100e9)
    assert (device.fp16_flop_per_s, device.cpu_flop_per_s) == (10e12, None)
    assert planned("cogvlm", device, precisions=INT4_ENCODER).verdict == "fits"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("usable", "useable", 'key "useable" is unknown; did you mean "usable"?'),
        (
            'kind = "jetson"',
            'kind = "jetsom"',
            "\"kind\" is \"jetsom\", expected 'jetson' or 'rtx' or 'datacenter' or 'cpu'",
        ),
        ("memory", "#", 'key "memory" is missing; needed are name, kind, memory, bandwidth_gb_s'),
        ("100.0", '"fast"', '"bandwidth_gb_s" is "fast", expected a number'),
        ("100.0", "nan", '"bandwidth_gb_s" is nan, expected 0.001 to 1e9'),
        ("100.0", "5e-324", '"bandwidth_gb_s" is 5e-324, expected 0.001 to 1e9'),
        ("100.0", "true", '"bandwidth_gb_s" is true, expected a number'),
        ('"16GB"', '"16GiB"', '"memory" "16GiB": expected a size'),
        ('"16GB"', "-1", '"memory" is -1, expected a size'),
        ('"13GB"', '"17GB"', '"usable" is 17000000000 bytes, more than "memory", 16000000000'),
        ('"board"', "7", '"name" is 7, expected a string'),
        ("kind =", "kind", "not TOML"),
    ],
)
def test_profile_with_a_mistake_is_one_clear_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(PROFILE.replace(old, new))
    result = run_cli("plan", "--family", "cogvlm", "--device", str(path))
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert str(path) in result.stderr and message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--family", "cogvlm"], 2, "Missing option '--device'"),
        (["--device", "orin-nx-16"], 2, "give --ckpt or --family"),
        (["--family", "cogvlm", "--device", "orin-nx-61"], 1, "did you mean orin-nx-16?"),
        (["--family", "cogvlm", "--device", "a-toaster"], 1, "choose one of orin-nano-8, orin-nx-16"),
        (["--family", "cogvlm", "--device", "none.toml"], 1, "none.toml: no such file"),
        (["--family", "glm", "--device", "thor"], 1, 'family "glm" is not known: choose one of cogvlm, cogvlm2'),
        (["--ckpt", "nowhere", "--device", "thor"], 1, "nowhere: no such folder"),
        (["--family", "cogvlm", "--device", "thor", "--images", "2"], 1, "--images is 2, expected 0 or 1"),
        (
            ["--family", "cogvlm", "--device", "thor", "--context", "9999"],
            1,
            "--context is 9999, expected 1230 (an image and a word) to 2048 (the model's own context)",
        ),
        (["--family", "cogvlm", "--device", "thor", "--context", "1291"], 1, "a prompt of 1291 tokens"),
        (["--family", "cogvlm", "--device", "thor", "--context", "1229", "--images", "0"], 1, "--context is 1229"),
        (["--family", "cogvlm", "--device", "thor", "--kv", "fp32"], 1, "--kv is fp32, but the cache of trt-int4"),
        (["--family", "cogvlm", "--device", "host", "--target", "trt-int4"], 1, "device host has no GPU"),
        (["--family", "cogvlm", "--device", "thor", "--power-mode", "fast"], 1, "it has MAXN, 120W, 90W, 70W"),
        (["--family", "cogvlm", "--device", "h100", "--power-mode", "fast"], 1, "it has none"),
        (["--family", "cogvlm", "--device", "thor", "--group", "48"], 1, "group size 48 is not supported"),
        (["--family", "cogvlm", "--device", "thor", "--swap", "big"], 1, '--swap "big": expected a size'),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], status: int, message: str) -> None:
    result = run_cli("plan", *arguments)
    assert result.exit_code == status
    assert message in result.stderr.splitlines()[-1]


def test_decoding_is_as_slow_as_its_arithmetic() -> None:
    """A CPU may multiply slower than its memory reads: then the products decide, not bandwidth alone."""
    weights, head, tokens = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008), 32000 * 4096, 1291
    flop = 2 * (weights + head) + 4 * tokens * 4096 * 32
    slow = replace(plan_device("thor"), cpu_flop_per_s=30e9)
    found = planned("cogvlm", slow, target="ort-int4").speed.decode_tok_s
    assert found == pytest.approx((0.5 * 30e9 / flop, 1.6 * 30e9 / flop), rel=1e-9)
    unknown = planned("cogvlm", "thor", target="ort-int4")
    assert unknown.speed.decode_tok_s > found
    assert any("decoding may be slower than bandwidth allows" in line for line in unknown.assumptions)


def test_headline_names_what_does_not_fit() -> None:
    assert "(peak 11.9 GB, building 28.5 GB, usable 14.8 GB)" in headline(planned("cogvlm2", "orin-nx-16"))
    assert "building" not in headline(planned("cogvlm2", "agx-orin-64"))


def test_tables_say_what_is_there() -> None:
    cells = {row[0]: row[-1] for table in plan_tables(planned("cogvlm2", "orin-nx-16")) for row in table.rows}
    assert cells["memory to build engines, on the device"] == "28.5 GB", "the encoder is the largest, and is not cut"
    assert "on disk, engines included" in cells
    columns = [table.size_columns for table in plan_tables(planned("cogvlm2", "orin-nx-16"))]
    assert columns == [{2}, {1, 2, 3, 4, 5, 6}, set(), {1}], "sizes line up, words do not"
    table = plan_tables(planned("cogvlm", "thor", target="ort-int4"))[0]
    assert table.rows[-1][0] == "on disk", "there are no engines"


def test_power_mode_changes_the_rates() -> None:
    slow, fast = plan_device("orin-nx-16", "15W"), plan_device("orin-nx-16")
    assert slow.fp16_flop_per_s is not None and fast.fp16_flop_per_s is not None
    assert slow.fp16_flop_per_s < fast.fp16_flop_per_s
    assert slow.title == "Jetson Orin NX 16 GB, 15W"


def test_memory_of_onnxruntime_on_a_cpu_by_hand() -> None:
    """CogVLM as ort-int4 with an fp32 encoder: what ONNX Runtime was seen to hold, worked out a second time."""
    plan = planned("cogvlm", "thor", target="ort-int4", precisions={"vision": "fp16", "connector": "fp16"})
    layer, hidden, mlp, vocab = 4 * 4096 * 4096 + 3 * 4096 * 11008, 4096, 11008, 32000
    packed = {4: 1 / 2 + 12 / 128, 8: 1 + 12 / 128}  # bytes of a code, its share of two floats and a block sum
    text = 32 * layer * packed[4] + vocab * hidden * packed[8] + 4 * 65 * hidden
    wide = 4 * (63 * (4 * 1792**2 + 2 * 1792 * 15360) + 4096 * 1792 + 3 * 4096 * 11008)
    memory = plan.memory
    assert memory["decode"].weights == pytest.approx(text, rel=1e-6)
    assert memory["vision"].weights == pytest.approx(1.15 * wide, rel=0.003), "widened, with pieces left behind"
    assert memory["vision"].activations == 4 * 1226 * (13 * 1792 + 9 * 15360 // 4)
    texts, images = (rows * (6 * mlp + 4 * hidden + 32 * 1291) * 4 for rows in (64, 256))
    assert (memory["prefill"].activations, memory["decode"].activations) == (texts + images, texts)
    assert memory["decode"].buffers == 4 * (3 * 490 * 490 + 1227 * hidden)
    assert memory["decode"].kv == 2 * 2048 * 524288, "fp32"


def test_a_session_that_keeps_all_keeps_what_it_worked_in() -> None:
    one, all_ = (planned("cogvlm", "thor", target="ort-int4", residency=kind).memory for kind in ("phase", "all"))
    assert all_["decode"].activations == one["vision"].activations + one["prefill"].activations
    assert all_["decode"].weights == one["vision"].weights + one["prefill"].weights, "no fp16 matrix is widened here"


def test_loading_again_is_reading_all_graphs_from_disk() -> None:
    plan = planned("cogvlm2", "thor")
    graphs = plan.memory["vision"].weights + plan.memory["prefill"].weights
    assert plan.speed.reload_s == pytest.approx((graphs / 3e9, graphs / 1e9))
    assert planned("cogvlm2", "thor", residency="all").speed.reload_s == (0, 0)
    assert planned("cogvlm2", "thor", images=0).speed.reload_s == (0, 0)


def test_disk_holds_graphs_and_engines() -> None:
    plan = planned("cogvlm", "thor")
    weights, embedding = sum(plan.weights_bytes.values()), plan.weights_bytes["embedding"]
    assert plan.disk_bytes == 2 * weights - embedding
    ort = planned("cogvlm", "thor", target="ort-int4")
    assert ort.disk_bytes == sum(ort.weights_bytes.values())


def test_head_is_built_with_the_last_layer() -> None:
    """An fp32 head beside narrow layers: the largest piece is not a layer, and not the head, but both."""
    build = planned("glm4v", "thor", precisions={**INT4_ENCODER, "lm_head": "fp32"}).build
    layer = 4096 * 4608 + 4096 * 4096 + 3 * 4096 * 13696
    assert build is not None
    assert build.least_ram_bytes == build_bytes(4 * 151552 * 4096 + layer * 33 // 64)


def test_bandwidth_follows_the_power_mode() -> None:
    assert plan_device("orin-nx-16", "10W").bandwidth_bytes_per_s == pytest.approx(2133e6 * 2 * 16)
    assert plan_device("thor", "70W").bandwidth_bytes_per_s == plan_device("thor").bandwidth_bytes_per_s
