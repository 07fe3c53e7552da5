"""tq.info(): what a bug report needs, as plain JSON."""

from __future__ import annotations

import json
import platform

import torch

import turboquant_rs as tq


def test_info_is_json_with_the_documented_keys():
    facts = tq.info()
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts) == {"isa", "isas", "compiled_isas", "threads", "thread_pool", "versions", "cuda"}
    assert set(facts["versions"]) == {"turboquant_rs", "python", "torch", "numpy", "safetensors"}
    assert set(facts["cuda"]) == {"available", "device", "cupy", "reason"}


def test_the_active_instruction_set_is_one_of_this_cpu_which_are_some_of_this_build():
    facts = tq.info()
    assert facts["isa"] in facts["isas"] and set(facts["isas"]) <= set(facts["compiled_isas"])
    assert facts["isas"][-1] == "scalar"


def test_threads_are_those_of_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert tq.info()["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_versions_are_those_that_run():
    versions = tq.info()["versions"]
    assert versions["turboquant_rs"] == tq.__version__
    assert (versions["torch"], versions["python"]) == (torch.__version__, platform.python_version())


def test_without_cuda_the_reason_is_given():
    cuda = tq.info()["cuda"]
    assert cuda["available"] == torch.cuda.is_available()
    assert cuda["available"] or "CUDA" in cuda["reason"]
