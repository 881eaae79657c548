"""The benchmark of films on the real server, in its small form, on the server of these tests."""

from __future__ import annotations

import contextlib

import benches


def test_films_on_the_server_are_measured_and_play_while_they_grow(server, tmp_path):
    film_server, harness = benches.module("film_server"), benches.module("harness")
    report = film_server.run(server.base, tmp_path, True, harness.Report("film_server"),
                             servers=lambda base, log: contextlib.nullcontext(server))
    rows = {row["name"]: row for row in report.rows}
    assert all(check["green"] for check in report.checks)
    # The file with the last block is replaced by the finished one at once: whether it is seen growing that far is luck.
    assert rows["film_server_plays_60s"]["value"] >= film_server.TINY_BLOCKS["60s"] - 1
    assert rows["film_server_fps_30s"]["value"] > 0 and rows["film_server_fps_30s"]["ratio_vs_at_once"] > 0
    assert rows["film_server_host_peak_60s"]["value"] > 0.1
    assert not (server.base / "output" / "sana_video" / "bench_60s").exists()
