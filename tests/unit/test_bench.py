"""The benchmarks' own honesty: no figure without a green check; the written layouts are the public ones."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import pytest
import torch

import sana_video_core as svc
from sana_video_core.checkpoint import convert
from sana_video_core.dit import SanaVideoTransformer


@pytest.fixture(scope="module")
def bench(root):
    """The package ``bench`` by its place on disk."""
    folder = root / "bench"
    spec = importlib.util.spec_from_file_location("bench", folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])
    from bench import cli, dit, harness, operators, prepare, profile, weights

    return type("Bench", (), {"cli": cli, "dit": dit, "harness": harness, "operators": operators, "prepare": prepare,
                              "profile": profile, "weights": weights})


@pytest.fixture(scope="module")
def network(bench):
    """The mini network with random weights and its spec."""
    spec = svc.get_spec("sana-video-mini")
    return bench.weights.fill(SanaVideoTransformer(spec)).eval(), spec


def test_no_figure_before_a_check(bench):
    with pytest.raises(bench.harness.BenchError, match="green check"):
        bench.harness.Report("x").add("time", 1.0)


@pytest.mark.parametrize("error", [0.2, math.nan, math.inf])
def test_red_check_stops_and_keeps_figures_away(bench, error):
    report = bench.harness.Report("x")
    report.check("fine", 0.0, 0.1)
    with pytest.raises(bench.harness.BenchError, match="red"):
        report.check("wrong", error, 0.1)
    with pytest.raises(bench.harness.BenchError, match="green check"):
        report.add("time", 1.0)


def test_report_file_has_the_agreed_form(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("SANA_VIDEO_COMMIT", "abc")
    report = bench.harness.Report("step")
    report.check("same", 0.0, 1e-3)
    report.add("a", bench.harness.Timing(2.0, 1.5, 2.5, 3), ratio_vs_peer=1.5, floor_ratio=1.2)
    data = json.loads(report.write(tmp_path).read_text())
    assert set(data) == {"machine", "versions", "commit", "checks", "rows"} and data["commit"] == "abc"
    assert data["rows"] == [{"name": "a", "value": 2.0, "unit": "ms", "low": 1.5, "high": 2.5, "repeats": 3,
                             "ratio_vs_peer": 1.5, "floor_ratio": 1.2}]
    assert data["versions"]["torch"] == torch.__version__ and data["checks"][0]["green"]


def test_commit_falls_back_to_git(bench, monkeypatch):
    monkeypatch.delenv("SANA_VIDEO_COMMIT", raising=False)
    found = bench.harness.commit()
    assert found == "unknown" or (len(found) == 40 and set(found) <= set("0123456789abcdef"))


def test_measure_times_every_run_after_the_warm_up(bench):
    calls = []
    timing = bench.harness.measure(lambda: calls.append(1), warmup=2, repeats=5, device="cpu")
    assert len(calls) == 7 and timing.repeats == 5 and timing.low <= timing.median <= timing.high


def test_relative_error_never_lets_nan_pass(bench):
    x = torch.ones(4)
    assert bench.harness.relative_error(x, x) == 0
    assert bench.harness.relative_error(x + 0.1, x) == pytest.approx(0.1, rel=1e-5)
    assert bench.harness.relative_error(x * math.nan, x) == math.inf


def test_cost_of_the_480p_forward_is_that_of_the_spec(bench):
    flop, moved = bench.dit.forward_cost(svc.get_spec("sana-video-2b-480p"), 32760)
    assert flop / 1e12 == pytest.approx(121.2, rel=0.02)  # performance spec 1.1
    assert moved / (20 * 32760 * 2240 * 2) == 45


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_written_names_and_values_equal_the_core_converter(bench, network, layout):
    model, spec = network
    ours = bench.weights.official(model.state_dict(), spec)
    if layout == "diffusers":
        ours = bench.weights.diffusers(ours, spec)
    theirs = convert(model.state_dict(), spec, to=layout)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_three_layouts_load_bit_equal(bench, tmp_path):
    bench.prepare.write_all(tmp_path, tiny=True)
    spec = bench.dit.workload(tiny=True).spec
    expected = {name: t.to(torch.bfloat16) for name, t in bench.prepare.network(spec).items()}
    for layout, path in bench.prepare.layouts(tmp_path).items():
        state = svc.load_transformer(path).state_dict()
        assert set(state) == set(expected), layout
        assert all(torch.equal(state[name], expected[name]) for name in expected), layout


def test_official_file_of_the_2b_model_has_the_public_size(bench):
    """model spec 2.3: SANA_Video_2B_480p.pth has 8,245,160,990 bytes, about 0.2 MB of them container."""
    spec = svc.get_spec("sana-video-2b-480p")
    with torch.device("meta"):
        state = SanaVideoTransformer(spec).state_dict()
    payload = sum(t.numel() * 4 for t in state.values()) + 1800 * 2240 * 4 + 300 * 2304 * 2
    assert 0 < 8_245_160_990 - payload < 300_000


def test_random_network_is_neither_flat_nor_wild(bench, network):
    model, spec = network
    args = bench.dit.inputs(spec, (3, 8, 8), 2, "cpu", torch.float32)
    with torch.inference_mode():
        out = model(**args)
    assert torch.isfinite(out).all() and 0.1 < float(out.std()) < 100
    assert args["caption_mask"].sum(-1).tolist() == list(bench.dit.TEXT_TOKENS)


def test_list_of_benchmarks_names_modules_that_exist(bench, root, capsys):
    assert bench.cli.main([]) == 2 and bench.cli.main(["nonsense"]) == 2
    listed = capsys.readouterr().err
    for name in bench.cli.BENCHMARKS:
        assert (root / "bench" / f"{name}.py").is_file() and name in listed


def test_every_operator_is_checked_before_it_is_timed(bench, monkeypatch):
    """At small sizes on the CPU: all rows, each with its check; one wrong operator and there are no more figures."""
    report = bench.harness.Report("operators")
    bench.operators.run(report, "cpu", True)
    sizes = bench.operators.SIZES
    assert [row["name"] for row in report.rows] == [f"{size}_{name}" for size in sizes for name in bench.operators.FLOORS]
    assert all("floor_ratio" not in row for row in report.rows)  # the table is an H200's
    assert len(report.checks) == sum("ratio_vs_plain" in row for row in report.rows) == 8 * len(sizes)
    wrong = svc.ops.OPERATORS["gated_depthwise"]
    monkeypatch.setattr(wrong, "reference", lambda x, w, b, grid: x[..., ::2] * 1.01)
    report = bench.harness.Report("operators")
    with pytest.raises(bench.harness.BenchError, match="480p gated_depthwise"):
        bench.operators.run(report, "cpu", True)
    with pytest.raises(bench.harness.BenchError, match="green check"):
        report.add("time", 1.0)


def test_a_profile_names_the_kinds_of_work(bench):
    times = [("nvjet_sm90_tst", 5.0, 2), ("gated_depthwise_kernel", 2.0, 1), ("void at::native::copy", 1.0, 3),
             ("pair_residual_kernel", 0.5, 1), ("attention_keys_kernel", 0.25, 1), ("text_attention_kernel", 0.125, 1),
             ("cutlass::Kernel", 1.0, 1)]
    found = bench.profile.by_kind(times)
    assert found == {"products": 6.0, "gated_depthwise": 2.0, "rest": 1.0, "temporal": 0.5, "linear_attention": 0.25,
                     "text_attention": 0.125} and list(found)[0] == "products"
