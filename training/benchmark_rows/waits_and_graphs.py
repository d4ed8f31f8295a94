"""Rows that count: how often the host waits for the device, and how many graphs `torch.compile` makes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config as symbolic_shapes
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from adaptive_llava.modeling.placeholder_layout import build_layout
from adaptive_llava.training.benchmark_rows.measurement import Measurement
from adaptive_llava.training.benchmark_workload import Workload
from adaptive_llava.training.stand_in_device import StandInDevice


_ROWS = 3
_STEPS = 8


def waits_of_forward(work: Workload) -> Measurement:
    """Times that a forward pass over pixels, routed by DFMR, makes the host wait; once, for the lengths."""
    waits = _waits(work, work.dfmr, work.prompt(_ROWS))
    what = f"host waits for the device in a forward pass, {_where(work)} / one for the lengths"
    return Measurement(what, [(float(len(waits)), 1.0)], "waits", 1.0, 1.0, notes={"waits": waits})


def waits_on_padded_rows(work: Workload) -> Measurement:
    """The same where texts differ in length, over stock LLaVA: transformers' language models look at the mask too."""
    ours, peer = work.prompt(_ROWS), work.prompt(_ROWS, work.patches)
    for prompts in (ours, peer):
        prompts["attention_mask"][1, :5] = 0
    waits = _waits(work, work.dfmr, ours), _waits(work, work.stock, peer)
    what = f"host waits of a forward pass over padded rows, {_where(work)}, DFMR / stock"
    notes = {"waits": waits[0], "waits_of_stock": waits[1]}
    return Measurement(what, [(float(len(waits[0])), float(len(waits[1])))], "waits", notes=notes)


def _where(work: Workload) -> str:
    return "profiler trace" if work.device == "cuda" else "on a stand-in for a GPU"


@torch.no_grad()
def _waits(work: Workload, model: Any, prompts: dict[str, Tensor]) -> list[str]:
    inputs = prompts | {"pixel_values": work.pixels(_ROWS)}
    model(**inputs)  # what is set up once, is set up
    return (_on_gpu if work.device == "cuda" else _on_stand_in)(model, inputs)


def _on_stand_in(model: Any, inputs: dict[str, Tensor]) -> list[str]:
    with StandInDevice() as device:
        device.adopt(model)
        try:
            model(**{name: device.hold(value) for name, value in inputs.items()})
        finally:
            device.release(model)
    return [f"{wait.call} in {wait.line}" for wait in device.waits]


def _on_gpu(model: Any, inputs: dict[str, Tensor]) -> list[str]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        model(**inputs)
    # a blocking copy waits for its stream; the profiler itself waits for the whole device, under another name
    names = [event.name for event in trace.events() or ()]
    return [name for name in names if name.startswith("cudaStreamSynchronize")]


def compressor_graphs(work: Workload, preset: str) -> Measurement:
    """Graphs that compiling `compress` makes over batches of changing size and choice, over the rungs there are."""
    model: Any = work.model(preset).model
    graphs = Graphs()
    model.compressor.compress = graphs.of(model.compressor.compress)
    rungs = model.compressor.num_rungs
    with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        for chosen in _choices(rungs):
            model.compressor(work.features(len(chosen)), chosen)
    what = f"{preset}: graphs of `compress` over {_STEPS} batches / rungs"
    return Measurement(what, [(float(graphs.number), float(rungs))], "graphs", 1.0, 1.0)


def other_graphs(work: Workload) -> Measurement:
    """Graphs that compiling router and splice makes over such batches, over one of each."""
    model: Any = work.dfmr.model
    graphs = Graphs()
    router = graphs.of(model.router)
    splice = graphs.of(lambda layout, text, visual: layout.gather(layout.splice(text, visual)))
    ladder = model.compressor.ladder(model.config.vision_grid)
    with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        for text_tokens, chosen in enumerate(_choices(len(ladder)), start=2):
            router(work.features(len(chosen)))
            lengths = [ladder[rung] for rung in chosen]
            ids = torch.full((len(chosen), text_tokens + 1), 5)
            ids[:, 1] = work.image_token
            visual = work.encoded(*lengths).values
            text = visual.new_zeros(*ids.shape, visual.shape[-1])
            splice(build_layout(ids, None, None, lengths, work.image_token), text, visual)
    what = f"graphs of router and splice over {_STEPS} batches of changing lengths / one each"
    return Measurement(what, [(float(graphs.number), 2.0)], "graphs", 1.0, 1.0)


class Graphs:
    """Compiles without making code, and counts the graphs; a break in one raises."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.number = 0

    def of(self, function: Callable) -> Any:
        """The function, compiled as one graph whose sizes may change."""
        return torch.compile(function, fullgraph=True, dynamic=True, backend=self._count)

    def _count(self, graph: nn.Module, inputs: Any) -> Callable:
        self.number += 1
        return graph.forward


def _choices(rungs: int) -> list[list[int]]:
    """A rung for each image of batches of changing size; the first has several images at each."""
    drawn = random.Random(0)
    sizes = [drawn.randint(1, 8) for _ in range(_STEPS - 1)]
    return [list(range(rungs)) * 2, *([drawn.randrange(rungs) for _ in range(size)] for size in sizes)]
