"""What the training scripts share: processes, clock, optimiser, weight average. Not covered: losses and data."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .muon import Muon


class Processes:
    """One process a GPU (torchrun) or just this one. Gradients are averaged by hand: the models are small."""

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if self.count > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, *words) -> None:
        """Print, from the first process only."""
        if self.first:
            print(*words, flush=True)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its mean over the processes, in one message."""
        tensors = list(tensors)
        if self.count > 1 and tensors:
            flat = torch.cat([t.reshape(-1).float() for t in tensors])
            dist.all_reduce(flat)
            flat /= self.count
            for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(piece.view_as(t))

    def agree(self, value: float) -> float:
        """The largest value of all processes, so that all of them stop at the same step."""
        if self.count == 1:
            return value
        box = torch.tensor([value], device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return float(box)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Everyone takes the first process's tensors."""
        if self.count > 1:
            for t in tensors:
                dist.broadcast(t, 0)

    def close(self) -> None:
        if self.count > 1:
            dist.barrier()
            dist.destroy_process_group()


class Clock:
    """Progress 0..1 of a run of so many seconds, and the learning rate that belongs to it (warm-up, then half a cosine)."""

    EVERY = 8

    def __init__(self, processes: Processes, seconds: float, warmup: float = 0.02, floor: float = 0.01):
        self.processes, self.seconds, self.warmup, self.floor = processes, seconds, warmup, floor
        self.start, self.step = time.time(), 0

    def tick(self) -> float:
        """Progress so far, the same in every process; 1 or more means stop. Looks at the clock at every EVERYth step only:
        agreeing makes the processor wait for the GPU."""
        if self.step % self.EVERY == 0:
            self.progress = self.processes.agree((time.time() - self.start) / self.seconds)
        self.step += 1
        return self.progress

    def factor(self, progress: float) -> float:
        if progress < self.warmup:
            return max(progress / self.warmup, 0.01)
        x = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * x))


class Graphed:
    """A loss and its gradients as one CUDA graph: a network this small is otherwise held up by launching its kernels.

    ``work(*tensors)`` gives the loss; it must not wait for the GPU nor bring numbers to it. Random numbers go on as usual.
    Afterwards ``graphed(*tensors)`` with tensors of the same shapes fills ``.grad`` of every parameter anew and returns the
    loss. Give :class:`Optimiser` ``keep_grads``. On a CPU the work simply runs.
    """

    WARM_UP = 3

    def __init__(self, work: Callable[..., Tensor], tensors: Iterable[Tensor], parameters: Iterable[nn.Parameter]):
        self.work, self.parameters = work, list(parameters)
        self.inputs = [t.clone() for t in tensors]
        self.graph = torch.cuda.CUDAGraph() if self.inputs[0].is_cuda else None
        if self.graph is None:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                self._forget()
                self.work(*self.inputs).backward()
        torch.cuda.current_stream().wait_stream(side)
        self._forget()
        # Only this thread's calls can break the recording: the watchdog of the other processes' link has its own.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss = self.work(*self.inputs)
            self.loss.backward()
        self.grads = [p.grad for p in self.parameters]

    def _forget(self) -> None:
        for p in self.parameters:
            p.grad = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        if self.graph is None:
            self._forget()
            loss = self.work(*tensors)
            loss.backward()
            return loss.detach()
        torch._foreach_copy_(self.inputs, list(tensors))
        self.graph.replay()
        for p, grad in zip(self.parameters, self.grads, strict=True):  # another graph may have put its own there
            p.grad = grad
        return self.loss.detach().clone()


class Optimiser:
    """Muon for the hidden matrices and kernels, AdamW for everything else; plain AdamW when ``muon`` is off."""

    def __init__(self, modules: Iterable[nn.Module], lr: float, muon: bool = True, weight_decay: float = 0.0,
                 keep_grads: bool = False):
        matrices, rest = [], []
        for module in modules:
            for name, p in module.named_parameters():
                hidden = p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 8 and not any(
                    part in name for part in ("embed", "table", "final_layer", "t_block", "depth_conv", "head", "encoder.conv1"))
                (matrices if hidden and muon else rest).append(p)
        self.parts = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=weight_decay,
                                        fused=bool(rest) and rest[0].is_cuda)]
        if matrices:
            self.parts.append(Muon(matrices, lr, weight_decay=weight_decay))
        self.lr, self.parameters, self.keep_grads = lr, matrices + rest, keep_grads

    def step(self, factor: float, processes: Processes, clip: float = 1.0) -> float:
        """Average the gradients, clip their norm, step with ``lr * factor``; returns the norm before clipping."""
        processes.average(p.grad for p in self.parameters if p.grad is not None)
        norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * factor
            part.step()
            if not self.keep_grads:
                part.zero_grad(set_to_none=True)
        return norm


class Average:
    """Exponential moving average of a module's weights; the span grows with the steps made, up to ``decay``."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.module, self.decay = copy.deepcopy(module).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, step / (step + 10))
        mine, theirs = list(self.module.parameters()), list(module.parameters())
        torch._foreach_lerp_(mine, theirs, weight)


class Record:
    """The smoothed loss of a run: a row, and a line on the screen, every so many steps.

    ``rows`` are (step, progress, loss). ``rate`` is the weight of a new loss in the smoothed one.
    """

    def __init__(self, name: str, processes: Processes, clock: Clock, every: int, rate: float = 0.02):
        self.name, self.processes, self.clock, self.every, self.rate = name, processes, clock, every, rate
        self.rows: list[tuple[int, float, float]] = []
        self.smooth: Tensor | None = None

    def add(self, loss: Tensor, progress: float, more: str = "") -> None:
        """The loss of the step just made; stops a run that has left the numbers."""
        step = self.clock.step
        self.smooth = loss if self.smooth is None else torch.lerp(self.smooth, loss, self.rate)
        if step % self.every == 1:
            value = check_finite(self.smooth, step)
            self.rows.append((step, round(progress, 4), round(value, 5)))
            self.processes.say(f"{self.name} {progress:4.0%} step {step} loss {value:.4f}{more}")

    def finish(self) -> list[tuple[int, float, float]]:
        """All rows, after a last line."""
        steps = self.clock.step - 1  # the last tick only ended the run
        self.processes.say(f"{self.name}: {steps} steps, loss {check_finite(self.smooth, steps):.4f}")
        return self.rows


def check_finite(loss: Tensor, step: int) -> float:
    """The loss as a number; a run that has left the numbers is stopped at once."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ArithmeticError(f"the loss became {value} at step {step}")
    return value
