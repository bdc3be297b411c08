"""Speech detection frame by frame with an engine that cannot be captured: ``python -m bench.vad --engines DIR``.

The engine of silero-vad refuses to be enqueued into a capture; done carelessly, that leaves an empty graph which
replays and returns whatever was in the buffers. Here every frame must be answered eagerly and right, the reason be
given once, and other engines must still be captured afterwards.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import record, store

RATE = 16_000
FRAME = 512
CONTEXT = 64
SEED = 0

_PROBABILITY_TOLERANCE = 0.02
_STATE_TOLERANCE = 0.02
_SIZES = (1, 8, 3, 8, 1)

Detector = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def speech(seconds: float = 10.0, seed: int = SEED) -> np.ndarray:
    """A synthesised voice: harmonics of a wandering pitch under moving formants, hissed consonants, pauses.

    Args:
        seconds: How long.
        seed: Of pitch, timing and noise.

    Returns:
        Samples in -1..1 at 16 kHz, fp32.
    """
    draw = np.random.default_rng(seed)
    count = int(seconds * RATE)
    time = np.arange(count) / RATE
    targets, loudness, hiss = _syllables(draw, time)
    knots = np.arange(0, seconds + 1, 0.25)
    wander = np.interp(time, knots, draw.normal(0, 1, len(knots)))
    pitch = 125 * (1 + 0.08 * np.sin(2 * np.pi * 0.35 * time) + 0.05 * wander)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = np.zeros(count)
    for harmonic in range(1, 30):
        frequency = harmonic * pitch
        gain = sum(
            strength / (1 + ((frequency - formant) / width) ** 2)
            for formant, width, strength in zip(targets, (70, 90, 130), (1.0, 0.6, 0.25), strict=True)
        )
        voice += gain * harmonic**-0.5 * np.sin(harmonic * phase)
    noise = np.diff(draw.normal(0, 1, count + 1))  # differences of white noise: bright, like an s
    sound = loudness * voice + 0.15 * hiss * noise + 0.001 * draw.normal(0, 1, count)
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)


def detect(detector: Detector, audio: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Run a detector over a recording, as silero-vad does: each frame led by the end of the last, the state fed back.

    Args:
        detector: Takes the samples ``(1, 576)`` and the state ``(2, 1, 128)``; returns probability and new state.
        audio: ``(samples,)`` on the detector's device; what does not fill a frame is left out.

    Yields:
        Probability of speech ``(1, 1)`` and new state of each frame.
    """
    state = torch.zeros(2, 1, 128, device=audio.device)
    padded = torch.cat([audio.new_zeros(CONTEXT), audio])
    for start in range(0, len(audio) - FRAME + 1, FRAME):
        probability, state = detector(padded[None, start : start + CONTEXT + FRAME].contiguous(), state)
        yield probability, state


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recording through graphcache and hold every frame against onnxruntime."""
    parser = argparse.ArgumentParser(prog="python -m bench.vad", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    parser.add_argument("--default-stream", action="store_true", help="call on torch's default stream")
    options = parser.parse_args(arguments)
    device = record.require_cuda("bench.vad")
    silero, mlp8 = (store.load(options.engines, name) for name in ("silero", "mlp8"))
    with record.stream_scope(options.default_stream), torch.inference_mode():
        result, failures = _run(silero, mlp8, device)
    payload = {
        "benchmark": "vad",
        "environment": record.environment(SEED),
        "engine": dict(silero.facts),
        "default_stream": options.default_stream,
        **result,
        "failures": failures,
    }
    file = record.write("vad", payload, options.out)
    figures = [[key, value] for key, value in result.items() if key != "message"]
    record.table("silero-vad, frame by frame", ["figure", "value"], figures)
    print(f"said once: {result['message']}")
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"written to {file}")
    return 1 if failures else 0


class _Heard(logging.Handler):
    """Keeps what graphcache warns about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _run(silero: store.Bundle, mlp8: store.Bundle, device: torch.device) -> tuple[dict[str, object], list[str]]:
    import graphcache
    from graphcache.errors import Reason

    failures: list[str] = []
    heard = _Heard()
    logger = logging.getLogger("graphcache")
    logger.addHandler(heard)
    try:
        before = graphcache.wrap(graphcache.load(mlp8.engine), max_graphs=8)
        failures += _other_engine(before, mlp8, device, "before")
        wrapped = graphcache.wrap(graphcache.load(silero.engine))
        answers, times = _frames(wrapped, silero, device)
        info = wrapped.cache_info()
        # After the failed capture: the engine that has graphs, and one that has none yet.
        failures += _other_engine(before, mlp8, device, "captured before, replayed after")
        after = graphcache.wrap(graphcache.load(mlp8.engine), max_graphs=8)
        failures += _other_engine(after, mlp8, device, "captured after")
    finally:
        logger.removeHandler(heard)
    names = list(wrapped.module.output_binding_names)
    probabilities = np.array([float(answer[names.index("output")]) for answer in answers], dtype=np.float64)
    states = torch.stack([answer[names.index("stateN")] for answer in answers]).cpu()
    reference = torch.from_numpy(silero.arrays["state"])
    probability_error = float(np.abs(probabilities - silero.arrays["probability"]).max())
    state_error = max(record.relative_error(a, b) for a, b in zip(states, reference, strict=True))
    decisions = int(((probabilities > 0.5) != (silero.arrays["probability"] > 0.5)).sum())
    warnings = [message for message in heard.messages if Reason.NOT_CAPTURABLE.value in message]
    if not probability_error < _PROBABILITY_TOLERANCE:
        failures.append(f"probabilities are off by up to {probability_error:.3g}, allowed {_PROBABILITY_TOLERANCE}")
    if not state_error < _STATE_TOLERANCE:
        failures.append(f"states have relative errors up to {state_error:.3g}, allowed {_STATE_TOLERANCE}")
    if dict(info.eager) != {Reason.NOT_CAPTURABLE: len(answers)}:
        failures.append(f"eager calls are {dict(info.eager)}; expected all {len(answers)} with NOT_CAPTURABLE")
    if info.captures or info.hits or info.graphs:
        failures.append(f"{info.captures} captures, {info.hits} hits and {info.graphs} graphs; expected none")
    if len(warnings) != 1:
        failures.append(f"the reason was logged {len(warnings)} times, expected once: {warnings[:3]}")
    elif "silero" not in warnings[0]:
        failures.append(f"the warning does not name the engine: {warnings[0]}")
    return {
        "frames": len(answers),
        "frames_of_speech": int((probabilities > 0.5).sum()),
        "decisions_unlike_onnxruntime": decisions,
        "largest_probability_error": probability_error,
        "largest_state_relative_error": state_error,
        "eager": {reason.value: count for reason, count in info.eager.items()},
        "captures": info.captures,
        "message": warnings[0] if warnings else "",
        "frame_total_us": record.summarise(times),
        "frame_budget_us": 1e6 * FRAME / RATE,
    }, failures


def _frames(wrapped: Any, silero: store.Bundle, device: torch.device) -> tuple[list[tuple[Tensor, ...]], list[int]]:
    # Bindings come in the engine's order, not in that of the ONNX file.
    order = list(wrapped.module.input_binding_names)
    outputs = list(wrapped.module.output_binding_names)
    on_host = order.index("sr") in wrapped.module.host_inputs
    rate = torch.tensor(RATE, device="cpu" if on_host else device)
    wait = record.synchroniser()
    answers: list[tuple[Tensor, ...]] = []
    times: list[int] = []

    def detector(frame: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        given = {"input": frame, "sr": rate, "state": state}
        start = perf_counter_ns()
        answer = wrapped(*(given[name] for name in order))
        wait()
        times.append(perf_counter_ns() - start)
        answers.append(answer)
        return answer[outputs.index("output")], answer[outputs.index("stateN")]

    for _ in detect(detector, torch.from_numpy(silero.arrays["audio"]).to(device)):
        pass
    return answers, times[1:]


def _other_engine(wrapped: Any, mlp8: store.Bundle, device: torch.device, when: str) -> list[str]:
    failures = []
    for size in _SIZES:
        for case in mlp8.cases(size, 4):
            error = record.relative_error(wrapped(*(value.to(device) for value in case.inputs)), case.answer)
            if not error < store.TOLERANCE:
                failures.append(f"mlp8 ({when}), batch {size}: relative error {error:.3g}")
    info = wrapped.cache_info()
    if info.captures != len(set(_SIZES)) or info.eager:
        failures.append(
            f"mlp8 ({when}): {info.captures} captures and eager calls {dict(info.eager)}; "
            f"expected {len(set(_SIZES))} captures, one per batch size, and no eager call"
        )
    return failures


def _syllables(draw: np.random.Generator, time: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """Formant frequencies in Hz, loudness of the voice and of the hiss, each over time."""
    vowels = ((730, 1090, 2440), (270, 2290, 3010), (530, 1840, 2480), (570, 840, 2410), (300, 870, 2240))
    knots: list[float] = [0.0]
    formants: list[tuple[int, ...]] = [vowels[0]]
    loudness, hiss = np.zeros_like(time), np.zeros_like(time)
    now = 0.8
    while now < time[-1] - 0.8:
        for _ in range(draw.integers(4, 9)):
            consonant, vowel = draw.uniform(0.05, 0.09), draw.uniform(0.12, 0.24)
            hiss += _bump(time, now, consonant) * (draw.uniform() < 0.4)
            loudness += _bump(time, now + 0.5 * consonant, vowel) * draw.uniform(0.7, 1.0)
            chosen = vowels[draw.integers(len(vowels))]
            for knot in (now + consonant, now + 0.8 * vowel):
                knots.append(knot)
                formants.append(chosen)
            now += consonant + vowel
        now += draw.uniform(0.7, 1.3)
    tracks = tuple(np.interp(time, knots, track) for track in np.array(formants, dtype=float).T)
    return tracks, loudness, hiss


def _bump(time: np.ndarray, start: float, length: float) -> np.ndarray:
    """Rises and falls smoothly: 0 outside of ``start .. start + length``, 1 in the middle."""
    inside = np.clip((time - start) / length, 0, 1)
    return np.sin(np.pi * inside) ** 0.7


if __name__ == "__main__":
    raise SystemExit(main())
