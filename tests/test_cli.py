"""The command `turboquant-rs`: what it prints, writes, refuses, and leaves behind when it is stopped."""

from __future__ import annotations

import json
import math
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import turboquant_rs as tq
from turboquant_rs.cli import main


@pytest.fixture
def run(capsys):
    """`run(*arguments)` → (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse ends the process itself
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(50, 96, generator=generator),
        "model.layers.0.q_proj.weight": torch.randn(40, 96, generator=generator).bfloat16(),
        "model.layers.0.q_proj.bias": torch.randn(40, generator=generator),
        "model.layers.0.up_proj.weight": torch.randn(130, 96, generator=generator),
        "model.layers.0.input_layernorm.weight": torch.ones(96),
        "model.rope.inv_freq": torch.arange(4),
        "lm_head.weight": torch.randn(50, 96, generator=generator),
    }


QUANTIZED = {"model.layers.0.q_proj.weight", "model.layers.0.up_proj.weight"}


@pytest.fixture
def file(tmp_path, weights) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def folder(tmp_path, weights) -> Path:
    """A model directory as transformers writes it: two shards, index, config, tokenizer."""
    path = tmp_path / "model"
    path.mkdir()
    names = list(weights)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, path / shard, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
        "weight_map": {name: shard for shard, members in shards.items() for name in members},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 96}))
    (path / "tokenizer.json").write_text("{}")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling": "mean"}')
    (path / "pytorch_model.bin").write_bytes(b"the same weights once more")
    return path


def leftovers(path: Path, *expected: str) -> set[str]:
    return {entry.name for entry in path.iterdir()} - set(expected)


# quantize: what it writes ---------------------------------------------


def test_quantize_file_equals_pack_of_every_tensor(run, file, tmp_path, weights):
    out = tmp_path / "out.safetensors"
    code, text, _ = run("quantize", file, out, "--bits", 4)
    assert code == 0 and "2 layers quantized" in text
    loaded = tq.load(out)
    assert set(loaded) == set(weights)
    for name, weight in weights.items():
        if name in QUANTIZED:
            expected = tq.pack(weight, bits=4)
            assert torch.equal(loaded[name].packed, expected.packed)
            assert torch.equal(loaded[name].scales, expected.scales)
            assert loaded[name].dtype == weight.dtype
        else:
            assert torch.equal(loaded[name], weight)


@pytest.mark.parametrize(
    ("arguments", "scheme"),
    [
        (["--bits", 7, "--group-size", 32], tq.Scheme(bits=7, group_size=32)),
        (["--bits", 3, "--asymmetric"], tq.Scheme(bits=3, symmetric=False)),
        (
            ["--bits", 5, "--scale", "mse", "--scale-dtype", "f32"],
            tq.Scheme(bits=5, scale="mse", scale_dtype="f32"),
        ),
        (["--nested"], tq.Scheme.nested()),
        (["--nested", "2,1,1,1,1,2", "--group-size", "row"], tq.Scheme.nested(None, (2, 1, 1, 1, 1, 2))),
        (["--levels", "nf4"], tq.Scheme(levels="nf4")),
        ([], tq.Scheme()),
    ],
)
def test_quantize_obeys_every_scheme_option(run, file, tmp_path, weights, arguments, scheme):
    out = tmp_path / "out.safetensors"
    assert run("quantize", file, out, *arguments)[0] == 0
    for name in QUANTIZED:
        found, expected = tq.load(out)[name], tq.pack(weights[name], scheme=scheme)
        assert found.scheme == scheme
        assert torch.equal(found.packed, expected.packed)
        assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("mode", ["iid", "systematic"])
@pytest.mark.parametrize("block", [1, 96 * 7, 1 << 20])
def test_blocks_do_not_change_the_codes_of_stochastic_rounding(
    run, file, tmp_path, weights, monkeypatch, mode, block
):
    monkeypatch.setattr("turboquant_rs.checkpoint.blocks.BLOCK_ELEMENTS", block)
    out = tmp_path / "out.safetensors"
    assert run("quantize", file, out, "--bits", 7, "--rounding", mode, "--seed", 7)[0] == 0
    for name in QUANTIZED:
        rounding = tq.Rounding.stochastic(7, stream=name, mode=mode)
        assert torch.equal(
            tq.load(out)[name].packed, tq.pack(weights[name], bits=7, rounding=rounding).packed
        )


def test_quantize_directory_keeps_sharding_and_files_and_tells_the_truth_in_the_config(
    run, folder, tmp_path, weights
):
    out = tmp_path / "out"
    code, text, _ = run("quantize", folder, out, "--bits", 8)
    assert code == 0 and "pytorch_model.bin" in text
    assert leftovers(out) == leftovers(folder, "pytorch_model.bin")
    assert (out / "1_Pooling" / "config.json").read_text() == '{"pooling": "mean"}'
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(out / shard, "pt") as opened:
            assert {k for k, v in index["weight_map"].items() if v == shard} == set(opened.keys())
    sizes = [t.nbytes for shard in out.glob("*.safetensors") for t in load_file(shard).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_size"] == 96
    assert config["quantization_config"]["quant_method"] == "turboquant_rs"
    assert set(config["quantization_config"]["tensors"]) == QUANTIZED
    loaded = tq.load(out)
    assert torch.equal(loaded["lm_head.weight"], weights["lm_head.weight"])
    assert loaded["model.layers.0.up_proj.weight"].scheme == tq.Scheme(bits=8)


def test_a_seed_without_random_rounding_is_refused(run, file, tmp_path):
    code, _, error = run("quantize", file, tmp_path / "out.safetensors", "--seed", 5)
    assert code == 2 and "--seed goes with a stochastic --rounding" in error
    assert not (tmp_path / "out.safetensors").exists()


def test_names_reach_no_terminal_but_as_text(run, tmp_path):
    """Lone surrogates, escape sequences: a file may call its tensors anything."""
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    ones = torch.ones(2, 64)
    tq.save(
        {"\ud800.weight": ones, "\x1b[31m.weight": ones + 1, "\x07": ones[0] + 2, "a\nb.weight": ones + 3},
        path,
    )
    for arguments in (("quantize", path, out), ("inspect", out), ("compare", path, out)):
        code, text, _ = run(*arguments)
        assert code == 0 and text.replace("\n", "").isprintable()
        assert "\\ud800.weight" in text and "\\x1b[31m.weight" in text and "\\x07" in text
        assert "a\\nb.weight" in text
    code, _, error = run("quantize", path, out, "--force", "--exclude", "\x1b")
    assert code == 1 and "\x1b" not in error


def test_include_replaces_the_rule_and_exclude_removes(run, file, tmp_path):
    out = tmp_path / "out.safetensors"
    code, text, _ = run(
        "quantize", file, out, "--include", "*embed*", "lm_*", "--exclude", "lm_head*", "--json"
    )
    assert code == 0
    report = json.loads(text)
    assert [layer["name"] for layer in report["layers"]] == ["model.embed_tokens.weight"]
    reasons = {layer["name"]: layer["reason"] for layer in report["skipped"]}
    assert reasons["lm_head.weight"] == "--exclude lm_head*"
    assert reasons["model.layers.0.q_proj.weight"] == "no --include pattern selects it"


def test_default_rule_gives_a_reason_for_every_tensor_it_leaves(run, file, tmp_path):
    code, text, _ = run("quantize", file, tmp_path / "out.safetensors", "--dry-run", "--json")
    assert code == 0 and not (tmp_path / "out.safetensors").exists()
    assert {layer["name"]: layer["reason"] for layer in json.loads(text)["skipped"]} == {
        "model.embed_tokens.weight": "an embedding",
        "model.layers.0.q_proj.bias": "1-dimensional",
        "model.layers.0.input_layernorm.weight": "1-dimensional",
        "model.rope.inv_freq": "int64: only f32, f64, f16 and bf16 are quantized",
        "lm_head.weight": "an output head",
    }


def test_dry_run_forecasts_the_bytes_that_come_out(run, file, tmp_path):
    out = tmp_path / "out.safetensors"
    for arguments in (["--bits", 5, "--asymmetric"], ["--nested"]):
        forecast = json.loads(run("quantize", file, out, *arguments, "--dry-run", "--json")[1])
        done = json.loads(run("quantize", file, out, *arguments, "--force", "--json")[1])
        assert forecast["bytes_after"] == done["bytes_after"]


# quantize: what it refuses ---------------------------------------------


def test_wrong_command_lines_exit_2_with_one_line(run, file, tmp_path):
    out = tmp_path / "out.safetensors"
    for arguments in (
        [],
        ["nonsense"],
        ["quantize", file],
        ["quantize", file, out, "--bits", "many"],
        ["quantize", file, out, "--bits", 9],
        ["quantize", file, out, "--bits", 1, "--asymmetric"],
        ["quantize", file, out, "--group-size", 7],
        ["quantize", file, out, "--nested", "3,5"],
        ["quantize", file, out, "--nested", "--bits", 4],
        ["quantize", file, out, "--rounding", "stochastic"],
        ["bench", "--bits", 0],
    ):
        code, text, error = run(*arguments)
        assert (code, text) == (2, ""), arguments
        assert error.startswith("turboquant-rs") and error.count("\n") == 1, error
    assert leftovers(tmp_path, file.name) == set()


def failure(run, *arguments: object) -> str:
    code, text, error = run(*arguments)
    assert (code, text) == (1, "")
    assert error.startswith("turboquant-rs: ") and error.count("\n") == 1, error
    return error


def test_pattern_without_a_match_names_near_misses(run, file, tmp_path):
    error = failure(run, "quantize", file, tmp_path / "o.safetensors", "--include", "*q_prj.weight")
    assert "matches no" in error and "q_proj" in error


def test_conv1d_weights_are_left_alone_with_the_way_out(run, tmp_path):
    source, out = tmp_path / "gpt2.safetensors", tmp_path / "o.safetensors"
    save_file(
        {"h.0.attn.c_attn.weight": torch.randn(96, 288), "h.0.mlp.c_fc.weight": torch.randn(96, 384)}, source
    )
    assert "use tq.quantize_ and tq.save" in failure(run, "quantize", source, out)
    # The same names with the rows of nn.Linear are quantized.
    save_file(
        {"h.0.attn.c_attn.weight": torch.randn(288, 96), "h.0.mlp.c_fc.weight": torch.randn(384, 96)}, source
    )
    assert run("quantize", source, out)[0] == 0


def test_file_with_nothing_to_quantize_says_how_to_choose(run, tmp_path):
    save_file({"a": torch.randn(4, 4)}, tmp_path / "in.safetensors")
    error = failure(run, "quantize", tmp_path / "in.safetensors", tmp_path / "o.safetensors")
    assert "not named *.weight" in error and "--include" in error


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**121])
def test_value_outside_the_domain_names_the_tensor_and_leaves_nothing(run, file, tmp_path, weights, bad):
    weights["model.layers.0.up_proj.weight"][100, 3] = bad
    save_file(weights, file)
    error = failure(run, "quantize", file, tmp_path / "o.safetensors")
    assert "model.layers.0.up_proj.weight" in error
    assert leftovers(tmp_path, file.name) == set()


def test_nan_counts_as_zero_where_asked(run, file, tmp_path, weights):
    weights["model.layers.0.up_proj.weight"][100, 3] = math.nan
    save_file(weights, file)
    assert run("quantize", file, tmp_path / "o.safetensors", "--nan", "zero")[0] == 0
    weights["model.layers.0.up_proj.weight"][100, 3] = 0
    expected = tq.pack(weights["model.layers.0.up_proj.weight"])
    assert torch.equal(
        tq.load(tmp_path / "o.safetensors")["model.layers.0.up_proj.weight"].packed, expected.packed
    )


def test_existing_output_is_kept_unless_forced(run, file, folder, tmp_path, weights):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    assert "--force" in failure(run, "quantize", file, out)
    assert out.read_bytes() == b"precious"
    assert run("quantize", file, out, "--force")[0] == 0
    assert set(tq.load(out)) == set(weights)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_bytes(b"")
    assert "choose another name" in failure(run, "quantize", folder, taken, "--force")
    assert leftovers(taken) == {"precious"}


def test_output_onto_the_input_is_refused(run, file, folder):
    before = file.read_bytes()
    assert "itself" in failure(run, "quantize", file, file, "--force")
    assert "itself" in failure(run, "quantize", folder, folder)
    assert "inside" in failure(run, "quantize", folder, folder / "quantized")
    assert file.read_bytes() == before


def test_what_is_quantized_already_is_not_quantized_again(run, file, folder, tmp_path):
    for source, once in ((file, tmp_path / "once.safetensors"), (folder, tmp_path / "once")):
        assert run("quantize", source, once)[0] == 0
        assert "quantized already" in failure(run, "quantize", once, tmp_path / "twice")


def test_missing_and_broken_inputs_are_one_line(run, tmp_path):
    out = tmp_path / "o.safetensors"
    assert "does not exist" in failure(run, "quantize", tmp_path / "missing.safetensors", out)
    (tmp_path / "empty").mkdir()
    assert ".safetensors file" in failure(run, "quantize", tmp_path / "empty", out)
    (tmp_path / "broken.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    for verb in (
        ["quantize", tmp_path / "broken.safetensors", out],
        ["inspect", tmp_path / "broken.safetensors"],
    ):
        assert "broken.safetensors" in failure(run, *verb)
    assert leftovers(tmp_path, "empty", "broken.safetensors") == set()


def test_index_that_contradicts_its_shards_is_refused(run, folder, tmp_path):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    assert "files beside it" in failure(run, "quantize", folder, tmp_path / "out")
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    assert "lm_head.weight" in failure(run, "quantize", folder, tmp_path / "out")
    assert leftovers(tmp_path, "model") == set()


def test_unwritable_place_is_one_line_with_the_way_out(run, file, tmp_path):
    assert "create it before writing" in failure(run, "quantize", file, tmp_path / "no" / "o.safetensors")
    assert "could not be written" in failure(run, "quantize", file, "/proc/self/o.safetensors")


def test_debug_shows_the_traceback(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TURBOQUANT_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        run("inspect", tmp_path / "missing.safetensors")


# inspect, compare, info, bench, demo ---------------------------------------------


def test_inspect_counts_every_byte_and_measures_against_the_original(run, file, tmp_path, weights):
    out = tmp_path / "out.safetensors"
    run("quantize", file, out, "--bits", 4)
    code, text, _ = run("inspect", out, "--original", file, "--json")
    found = json.loads(text)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert code == 0 and set(tensors) == set(weights)
    assert sum(tensor["nbytes"] for tensor in tensors.values()) == found["nbytes"]
    assert found["nbytes"] == sum(tensor.nbytes for tensor in load_file(out).values())
    name = "model.layers.0.up_proj.weight"
    assert tensors[name]["shape"] == [130, 96] and tensors[name]["scheme"]["bits"] == 4
    error = weights[name] - tq.pack(weights[name]).dequantize()
    expected = 10 * math.log10(float(weights[name].square().sum() / error.square().sum()))
    assert found["against"]["tensors"][name]["sqnr_db"] == pytest.approx(expected, abs=1e-3)
    code, text, _ = run("inspect", out, "--original", file)
    assert (
        code == 0
        and f"{expected:.2f} dB" in text
        and "4 bits g64" in text
        and "7 tensors, 2 quantized" in text
    )


def test_inspect_of_a_directory_reads_all_shards(run, folder, weights):
    code, text, _ = run("inspect", folder, "--json")
    assert code == 0
    assert {tensor["name"] for tensor in json.loads(text)["tensors"]} == set(weights)


def test_compare_of_equal_files_says_equal_and_names_what_is_missing(run, file, folder, tmp_path, weights):
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "less.safetensors")
    code, text, _ = run("compare", folder, tmp_path / "less.safetensors")
    assert code == 0 and text.count("equal") == 7 and "only in A: lm_head.weight" in text
    found = json.loads(run("compare", folder, tmp_path / "less.safetensors", "--json")[1])
    assert found["total"]["sqnr_db"] is None and found["total"]["max_error"] == 0


def test_compare_refuses_what_has_nothing_in_common(run, file, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert "no tensor in common" in failure(run, "compare", file, tmp_path / "x.safetensors")
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    assert "lm_head.weight" in failure(run, "compare", file, tmp_path / "x.safetensors")


def test_info_is_the_library_s(run):
    code, text, _ = run("info", "--json")
    assert code == 0 and json.loads(text)["isa"] == tq.info()["isa"]
    assert tq.info()["isa"] in run("info")[1]


def test_bench_times_every_job(run):
    code, text, _ = run("bench", "--rows", 64, "--columns", 128, "--repeats", 1, "--bits", 4, "--json")
    timings = {timing["job"]: timing for timing in json.loads(text)["timings"]}
    assert code == 0
    assert {"pack 4 bits", "unpack 4 bits to f32", "matmul 4 bits, 1 rows"} <= set(timings)
    assert all(timing["seconds"] > 0 for timing in timings.values())
    assert "pack 4 bits" in run("bench", "--rows", 64, "--columns", 128, "--repeats", 1, "--bits", 4)[1]


def test_bench_of_a_model_times_what_quantize_would_quantize(run, file):
    arguments = ("bench", file, "--repeats", 1, "--bits", 4, 8, "--batches", 1, 2)
    code, text, _ = run(*arguments, "--json")
    assert code == 0
    models = json.loads(text)["models"]
    assert [speeds["scheme"]["bits"] for speeds in models] == [4, 8]
    rows = {(*row["shape"], row["m"]): row for row in models[0]["rows"]}
    assert {(40, 96, 1), (40, 96, 2), (130, 96, 1), (130, 96, 2)} <= set(rows)
    assert all(row["ratio"] > 0 for row in rows.values())
    assert "40 x 96" in run(*arguments)[1]


def test_bench_of_a_model_says_what_is_wrong(run, file, tmp_path):
    assert "no.safetensors" in failure(run, "bench", tmp_path / "no.safetensors")
    assert run("bench", file, "--batches", 0)[0] == 2


# Being stopped ---------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command as a terminal starts it: shells start background jobs with SIGINT ignored."""
    command = [sys.executable, "-m", "turboquant_rs", *map(str, arguments)]
    return subprocess.Popen(
        command,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Some 200 MB in eight matrices: long enough to be stopped in the middle."""
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    save_file({f"layers.{i}.weight": torch.randn(2048, 3072) for i in range(8)}, path)
    return path


@pytest.mark.parametrize(
    ("number", "code", "cleans_up"),
    [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, True), (signal.SIGKILL, -9, False)],
)
def test_being_stopped_leaves_nothing_under_the_final_name(large, tmp_path, number, code, cleans_up):
    out = tmp_path / "out.safetensors"
    process = start("quantize", large, out, "--bits", 8, "--scale", "mse", "--threads", 1)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.002)  # the temporary file shows that it runs
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert not out.exists()
    if cleans_up:
        assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in error


def test_full_disk_is_an_error_and_leaves_nothing(large, tmp_path):
    """A file size limit stands for the disk: write fails in the middle all the same."""
    command = [sys.executable, "-m", "turboquant_rs", "quantize", str(large), str(tmp_path / "o.safetensors")]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))

    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_peak_memory_stays_near_one_tensor(large, tmp_path):
    """Above what the interpreter and torch take by themselves, and far below the 200 MB of the file."""
    script = (
        "import resource, sys; from turboquant_rs.cli import main; peak = lambda: "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); code = main(sys.argv[1:]); "
        "print(peak() - before); sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "quantize", str(large), str(tmp_path / "o.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    growth = 1024 * int(done.stdout.splitlines()[-1])
    largest = 4 * 2048 * 3072
    assert growth < 3 * largest, f"{growth / 1e6:.0f} MB"


# Plans


class Small(torch.nn.Module):
    """The matrices of the checkpoint above as a model of tokens."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(50, 96)
        layer = torch.nn.Module()
        layer.q_proj, layer.up_proj = torch.nn.Linear(96, 40), torch.nn.Linear(96, 130)
        self.model.layers = torch.nn.ModuleList([layer])
        self.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, layer = self.model.embed_tokens(tokens), self.model.layers[0]
        return torch.cat([layer.q_proj(x), layer.up_proj(x)], -1)


@pytest.fixture
def plan(tmp_path, weights) -> tuple[Path, tq.Plan]:
    found = tq.sensitivity(Small(weights), [torch.arange(50).view(2, 25)], progress=False)
    made = tq.allocate(found, tq.Budget(bits=4.6))
    path = tmp_path / "plan.json"
    path.write_text(made.to_json())
    return path, made


def test_quantize_obeys_a_plan(run, file, tmp_path, weights, plan):
    path, made = plan
    target = tmp_path / "planned.safetensors"
    code, out, _ = run("quantize", file, target, "--plan", path, "--json")
    assert code == 0 and len(set(made.widths)) == 2
    packed = tq.load(target)
    for layer, bits in made.bits.items():
        expected = tq.pack(weights[f"{layer}.weight"], bits=bits)
        assert torch.equal(packed[f"{layer}.weight"].packed, expected.packed)
    reasons = {layer["name"]: layer["reason"] for layer in json.loads(out)["skipped"]}
    assert reasons["lm_head.weight"] == reasons["model.embed_tokens.weight"] == "not in the plan"


def test_a_plan_for_another_checkpoint_leaves_nothing(run, tmp_path, weights, plan):
    weights["model.layers.0.q_proj.weight"] = torch.zeros(41, 96)
    save_file(weights, tmp_path / "other.safetensors")
    said = failure(run, "quantize", tmp_path / "other.safetensors", tmp_path / "out", "--plan", plan[0])
    assert "model.layers.0.q_proj is 41 x 96 here, 40 x 96 in the plan" in said
    assert not (tmp_path / "out").exists()


def test_what_a_plan_says_is_not_said_twice(run, file, tmp_path, plan):
    code, _, said = run("quantize", file, tmp_path / "out", "--plan", plan[0], "--bits", 4)
    assert code == 2 and "--plan says what --bits would say; leave --bits out" in said
    (tmp_path / "broken.json").write_text("{}")
    said = failure(run, "quantize", file, tmp_path / "out", "--plan", tmp_path / "broken.json")
    assert "broken.json: this is no turboquant_rs plan" in said


@pytest.fixture
def language_model(tmp_path) -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {chr(32 + i): i for i in range(63)} | {"?": 31, "[UNK]": 63}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(
        folder
    )
    (tmp_path / "text.txt").write_text("THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG " * 20)
    return folder


def test_plan_writes_what_quantize_obeys(run, tmp_path, language_model):
    output = tmp_path / "p.json"
    options = ("--data", tmp_path / "text.txt", "--windows", 4, "--length", 32, "-o", output)
    code, out, said = run("plan", language_model, *options, "--bits", 4.0, "--tie", "q_proj|k_proj|v_proj")
    assert code == 0, said
    made = tq.Plan.from_json(output.read_text())
    assert 3.9 < made.effective_bits <= 4.0 and "bits an element with scales" in out
    assert len({made.bits[f"model.layers.0.self_attn.{x}_proj"] for x in "qkv"}) == 1
    code, *_ = run("quantize", language_model, tmp_path / "four", "--plan", output)
    assert code == 0
    code, _, said = run("plan", language_model, *options, "--bits", 4.0)
    assert code == 1 and "p.json exists; choose another name, or replace it with --force" in said
    code, _, said = run("plan", language_model, *options, "--bits", 1.0, "--force")
    assert code == 1 and "is infeasible" in said
    code, _, said = run("plan", language_model, *options, "--bits", 4.0, "--bytes", 10)
    assert code == 2 and "not allowed with" in said


def test_plan_for_phases_writes_a_plan_for_each(run, tmp_path, language_model):
    output = tmp_path / "p.json"
    options = ("--data", tmp_path / "text.txt", "--windows", 4, "--length", 32, "--bits", 4.0, "-o", output)
    code, out, said = run("plan", language_model, *options, "--phases", "0,4")
    assert code == 0, said
    made = tq.PhasedPlan.from_json(output.read_text())
    assert made.forwards == (1, 4, 12) and 3.8 < made.effective_bits <= 4.0
    assert "prefill (1 of 17 forwards)" in out and "tq.PhasedPlan.from_json" in out
    code, _, said = run("plan", language_model, *options, "--phases", "4,0")
    assert code == 2 and "'4,0' is no list of bounds from 0 on, such as 0,32" in said


def test_plan_names_what_is_missing(run, tmp_path, language_model):
    output = tmp_path / "none" / "p.json"
    options = ("--data", tmp_path / "text.txt", "--bits", 4)
    assert "none is no directory; create it" in failure(run, "plan", language_model, *options, "-o", output)
    said = failure(run, "plan", tmp_path / "nowhere", *options, "-o", tmp_path / "p.json")
    assert "nowhere is no directory with a model" in said
    (tmp_path / "text.txt").write_text("SHORT")
    said = failure(run, "plan", language_model, *options, "-o", tmp_path / "p.json")
    assert "1 windows of 512 tokens need 512 tokens, got 5; give a longer text" in said
    assert not (tmp_path / "p.json").exists()
