"""What a service's metrics say of where its time goes."""

from __future__ import annotations

from captionserve_server.bench.peers.service import stage_seconds_of, standing_still

METRICS = """
# TYPE nv_inference_compute_infer_duration_us counter
nv_inference_compute_infer_duration_us{model="vision_encoder",version="1"} 2000000
nv_inference_compute_infer_duration_us{model="captioner",version="1"} 9000000
nv_inference_queue_duration_us{model="vision_encoder",version="1"} 7000000
captionserve_image_seconds_total{version="1"} 3
captionserve_prefill_seconds_total{version="1"} 0.5
captionserve_step_seconds_total{version="1"} 4
captionserve_top_seconds_total{version="1"} 0.25
captionserve_engine_seconds_total{version="1"} 8
captionserve_engine_steps_total{version="1"} 80
captionserve_request_seconds_sum{method="Caption"} 9
captionserve_request_seconds_sum{method="StreamCaption"} 2
captionserve_request_seconds_count{method="Caption"} 4
"""


def test_stages_are_read_from_metrics_and_labels_are_summed() -> None:
    assert stage_seconds_of(METRICS) == {
        "vision_encoder": 2.0,
        "image": 3.0,
        "prefill": 0.5,
        "step": 4.0,
        "top": 0.25,
        "engine": 8.0,
        "request": 11.0,
    }


def test_figures_that_lag_are_waited_for() -> None:
    readings = iter([{"step": 1.0}, {"step": 2.0}, {"step": 3.0}, {"step": 3.0}, {"step": 4.0}])
    assert standing_still(lambda: next(readings), pause=0.0) == {"step": 3.0}


def test_figures_that_never_stand_still_are_not_waited_for_without_end() -> None:
    readings = iter(range(1000))
    found = standing_still(lambda: {"step": float(next(readings))}, pause=0.0)
    assert found["step"] < 100.0
