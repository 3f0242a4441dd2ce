"""The GPU switches of Paddle, on a build without a GPU."""

from __future__ import annotations

import pytest

from paddle_medcls.core.paddle_setup import configure_gpu, paddle


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The flags that a CUDA build would have."""
    found: dict[str, object] = {}
    monkeypatch.delenv("FLAGS_cudnn_deterministic", raising=False)
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle, "set_flags", found.update)
    monkeypatch.setattr(paddle.incubate.autotune, "set_config", found.update)
    return found


def expected(deterministic: bool, layout: bool) -> dict[str, object]:
    return {
        "FLAGS_cudnn_deterministic": deterministic,
        "FLAGS_embedding_deterministic": int(deterministic),
        "FLAGS_cudnn_exhaustive_search": not deterministic,
        "layout": {"enable": layout},
    }


@pytest.mark.parametrize("before", [(False, False), (False, True), (True, False), (True, True)])
def test_no_switch_is_left_from_an_earlier_run(before: tuple[bool, bool], flags: dict[str, object]) -> None:
    for deterministic, amp, layout in [(False, False, False), (False, True, True), (True, True, False)]:
        configure_gpu(*before)
        configure_gpu(deterministic, amp)
        assert flags == expected(deterministic, layout)


def test_determinism_asked_for_in_the_environment_is_kept(
    flags: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAGS_cudnn_deterministic", "1")
    configure_gpu(deterministic=False, amp=True)
    assert flags == expected(True, False)


def test_a_cpu_build_has_no_switches(flags: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: False)
    configure_gpu(deterministic=True, amp=True)
    assert flags == {}
