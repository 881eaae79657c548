"""Kernels in Gluon on the CPU: their own source, with stand-ins for Gluon's language and for what Hopper does beside a program.

Triton's interpreter cannot run them. Here a tensor is torch's, layouts are not looked at, and what is asynchronous on the card
happens at a random time within what the barriers allow: copies at the latest when someone waits for them, products with the
shared memory of when they began or of when they are waited for. The partitions of a program take turns at random. Wrong are: a
value read before it was waited for, bytes that a barrier does not expect, an access outside of a tensor, and programs that wait
for ever. Not covered: what a thread holds, rounding within a product, speed.
"""

from __future__ import annotations

import importlib
import math
import random
import sys
import threading
import types
from collections.abc import Callable, Sequence

import torch

PARTITION_STOP = 60.0  # seconds after which a partition that does not come back is given up


class Dtype:
    """Gluon's name of one of torch's."""

    def __init__(self, kind: torch.dtype):
        self.kind, self.primitive_bitwidth = kind, 8 * kind.itemsize


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float8e4nv": torch.float8_e4m3fn,
          "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
NAMED = {name: Dtype(kind) for name, kind in DTYPES.items()}


class Constexpr(int):
    """A number of a kernel's source."""

    value = property(int)


class Layout:
    """Any layout: nothing here depends on one."""

    def __init__(self, *_, **__):
        pass


class MBarrierLayout(Layout):
    """That of barriers."""


def raw(x):
    return x.t if isinstance(x, Value) else x


class Value:
    """A tensor or number of a kernel; with ``op``, of a product that may not have been made yet."""

    def __init__(self, t=None, op: Product | None = None):
        self._t, self.op = t, op

    @property
    def t(self) -> torch.Tensor:
        if self.op is not None:
            if self.op.result is None:
                raise AssertionError("a product was read before it was waited for")
            return self.op.result
        return self._t

    shape = property(lambda self: tuple(self.t.shape))
    type = property(lambda self: types.SimpleNamespace(layout=None))

    def to(self, dtype: Dtype, bitcast: bool = False) -> Value:
        if bitcast:
            return Value(self.t.view(dtype.kind))
        if dtype.kind == torch.float8_e4m3fn:  # cuts, as the card does
            return Value(self.t.float().clamp(-448, 448).to(dtype.kind))
        return Value(self.t.to(dtype.kind))

    def reshape(self, *shape) -> Value:
        return Value(self.t.reshape(shape[0] if isinstance(shape[0], tuple) else shape))

    def permute(self, *order) -> Value:
        return Value(self.t.permute(order[0] if isinstance(order[0], tuple) else order))

    def split(self) -> tuple[Value, Value]:
        return tuple(Value(t) for t in self.t.unbind(-1))

    def __getitem__(self, key) -> Value:
        return Value(self.t[key])

    def __bool__(self) -> bool:
        return bool(self.t)

    def __index__(self) -> int:
        return int(self.t)

    def __neg__(self) -> Value:
        return Value(-self.t)


def _operator(name: str) -> Callable:
    def apply(self, other):
        return NotImplemented if isinstance(other, Pointer) else Value(getattr(self.t, name)(raw(other)))
    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "and",
              "or", "xor", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Places in the storage of a tensor."""

    def __init__(self, storage: torch.Tensor, at):
        self.storage, self.at = storage, at

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Pointer:
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return cls(whole, torch.tensor(tensor.storage_offset()))

    def __add__(self, other) -> Pointer:
        return Pointer(self.storage, self.at + raw(other))

    def places(self, mask) -> torch.Tensor:
        inside = torch.as_tensor(True if mask is None else raw(mask))
        at, inside = torch.broadcast_tensors(self.at, inside)
        at = torch.where(inside, at, 0)
        if int(at.min()) < 0 or int(at.max()) >= len(self.storage):
            raise AssertionError("an access outside of a tensor")
        return at


class Shared:
    """Shared memory: NaN until something is written."""

    def __init__(self, t: torch.Tensor):
        self.t = t

    def index(self, i) -> Shared:
        return Shared(self.t[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.t.narrow(dim, start, length))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.t.view(tuple(shape)))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.t.permute(tuple(order)))

    def _reinterpret(self, dtype: Dtype, shape: Sequence[int], layout) -> Shared:
        """Other numbers from the same place on, which may be more than this piece."""
        begin = self.t.storage_offset() * self.t.element_size() // dtype.kind.itemsize
        steps = [math.prod(shape[i + 1:]) for i in range(len(shape))]
        return Shared(torch.empty(0, dtype=dtype.kind).set_(self.t.untyped_storage(), begin, tuple(shape), steps))

    def load(self, layout) -> Value:
        return Value(self.t.clone())

    def store(self, value: Value) -> None:
        assert self.t.shape == value.t.shape and self.t.dtype == value.t.dtype
        self.t.copy_(value.t)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self):
        self.count = self.missing = self.bytes = self.phase = 0

    def change(self, arrived: int, expected: int) -> None:
        self.missing, self.bytes = self.missing - arrived, self.bytes + expected
        if self.missing < 0:
            raise AssertionError("more arrived at a barrier than it counts")
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Barriers:
    def __init__(self, count: int):
        self.all = [Barrier() for _ in range(count)]

    def index(self, i) -> Barrier:
        return self.all[int(i)]


class Descriptor:
    """A tensor in pieces, as ``ops/descriptors.py`` makes it."""

    layout = None

    def __init__(self, tensor: torch.Tensor, *block: int):
        assert tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1
        assert all(step * tensor.element_size() % 16 == 0 for step in tensor.stride()[:-1])
        self.tensor, self.block = tensor, block
        self.dtype = next(d for d in NAMED.values() if d.kind == tensor.dtype)

    def part(self, corner: Sequence, piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what a piece there covers of the tensor, that part of the piece)."""
        assert tuple(piece.shape) == tuple(self.block)
        here, there = [], []
        for at, size, whole in zip(map(int, corner), self.block, self.tensor.shape):
            length = max(0, min(size, whole - at))
            here.append(slice(at, at + length))
            there.append(slice(0, length))
        return self.tensor[tuple(here)], piece[tuple(there)]


class Product:
    """One product of a warp group. ``early``: reads shared memory when it begins, not when it is waited for."""

    def __init__(self, a, b, acc: Value, use_acc: bool, early: bool):
        self.a, self.b, self.acc, self.use_acc, self.result = a, b, acc, use_acc, None
        if early:
            self.a, self.b = (Value(x.t.clone()) if isinstance(x, Shared) else x for x in (a, b))

    def make(self) -> None:
        product = self.a.t.float() @ self.b.t.float()
        self.result = self.acc.t + product if self.use_acc else product


class Partition:
    """The warps of one function: a thread that runs until it waits."""

    def __init__(self, program: Program, function: Callable, arguments: Sequence):
        self.program, self.wish, self.done, self.error = program, None, False, None
        self.products: list[Product] = []
        self.leaving: list[Callable[[], None]] = []
        self.go, self.back = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self.thread.start()

    def _run(self, function: Callable, arguments: Sequence) -> None:
        self.go.wait()
        try:
            function(*arguments)
            if self.products or self.leaving:
                raise AssertionError("a partition ends before its products or what leaves it")
        except BaseException as error:  # comes out where the program was started
            self.error = error
        self.done = True
        self.back.set()

    def step(self) -> None:
        self.program.current = self
        self.back.clear()
        self.go.set()
        if not self.back.wait(PARTITION_STOP):
            raise AssertionError("a partition does not come back")
        if self.error is not None:
            raise self.error

    def pause(self, wish: Callable[[], bool]) -> None:
        self.wish = wish
        self.go.clear()
        self.back.set()
        self.go.wait()


class Program:
    """One program of a grid, its copies in flight, and who runs now."""

    def __init__(self, place: Sequence[int], grid: Sequence[int], seed: int):
        self.place, self.grid, self.random = place, grid, random.Random(seed)
        self.coming: list[Callable[[], None]] = []
        self.partitions: list[Partition] = []
        self.current: Partition | None = None

    def some_happen(self) -> None:
        """Any of what is in flight, in any order between copies; what leaves one partition does so in its order."""
        while self.coming and self.random.random() < 0.5:
            self.coming.pop(self.random.randrange(len(self.coming)))()
        for partition in self.partitions:
            while partition.leaving and self.random.random() < 0.3:
                partition.leaving.pop(0)()

    def specialise(self, functions: Sequence) -> None:
        self.partitions = [Partition(self, function, arguments) for function, arguments in functions]
        while not all(p.done for p in self.partitions):
            self.some_happen()
            ready = [p for p in self.partitions if not p.done and (p.wish is None or p.wish())]
            if ready:
                self.random.choice(ready).step()
            elif self.coming:
                self.coming.pop(self.random.randrange(len(self.coming)))()
            else:
                raise AssertionError("all partitions wait for each other")
        if self.coming:
            raise AssertionError("a copy is in flight when the program ends")


NOW: list[Program] = []


class Kernel:
    """What ``gluon.jit`` makes of a function."""

    seed = 0

    def __init__(self, function: Callable):
        self.function, self.__name__ = function, function.__name__

    def __call__(self, *args, **options):
        return self.function(*args, **options)

    def __getitem__(self, grid: Sequence[int]) -> Callable:
        def launch(*args, num_warps=None, **options):
            names = list(self.function.__annotations__)
            code = self.function.__code__
            for name, value in zip(code.co_varnames[:code.co_argcount], args):
                options[name] = value
            for name, value in options.items():
                if isinstance(value, torch.Tensor):
                    options[name] = Pointer.of(value)
                elif name not in names and isinstance(value, int):
                    options[name] = Value(torch.tensor(value))
            for number in range(math.prod(grid)):
                place = [number // math.prod(grid[:i]) % grid[i] for i in range(len(grid))]
                NOW.append(Program(place, grid, 1000 * Kernel.seed + number))
                try:
                    self.function(**options)
                finally:
                    NOW.pop()
        return launch


def jit(function=None, **_):
    return jit if function is None else Kernel(function)


def load(pointer: Pointer, mask=None, other=0) -> Value:
    found = pointer.storage[pointer.places(mask)]
    return Value(found if mask is None else torch.where(raw(mask), found, torch.tensor(other, dtype=found.dtype)))


def store(pointer: Pointer, value: Value, mask=None) -> None:
    at, inside = pointer.places(mask), torch.as_tensor(True if mask is None else raw(mask))
    inside, values = inside.expand(at.shape), value.t.to(pointer.storage.dtype).expand(at.shape)
    pointer.storage[at[inside]] = values[inside]


def inline_asm(source: str, _, args: Sequence[Value], **__) -> Value:
    if source.startswith("cvt.rn.bf16x2"):
        first, second = (a.t.bfloat16().view(torch.int16).int() for a in args)
        return Value(first & 0xFFFF | second << 16)
    if source.startswith("ex2.approx"):
        return Value(torch.exp2(args[0].t))
    if source.startswith("prefetch"):
        return args[0]
    raise AssertionError(f"no stand-in for {source}")


def allocate(dtype: Dtype, shape: Sequence[int], layout, value: Value | None = None):
    if isinstance(layout, MBarrierLayout):
        return Barriers(shape[0])
    size = math.prod(shape) * dtype.kind.itemsize
    memory = torch.full((size,), 0xFF, dtype=torch.uint8).view(dtype.kind).view(tuple(shape))  # NaN in every format
    if value is not None:
        memory.copy_(value.t)
    return Shared(memory)


def wait(barrier: Barrier, parity) -> None:
    parity = int(parity)
    NOW[-1].current.pause(lambda: barrier.phase % 2 != parity)


def copy_in(descriptor: Descriptor, corner, barrier: Barrier, place: Shared) -> None:
    def arrive() -> None:
        place.t.zero_()
        source, goal = descriptor.part(corner, place.t)
        goal.copy_(source)
        barrier.change(0, -place.t.numel() * place.t.element_size())
    place.t.view(torch.uint8).fill_(0xFF)  # from here on nobody may read what was there
    NOW[-1].coming.append(arrive)


def copy_out(descriptor: Descriptor, corner, place: Shared) -> None:
    def leave() -> None:
        goal, source = descriptor.part(corner, place.t)
        goal.copy_(source)
    NOW[-1].current.leaving.append(leave)


def store_wait(pending: int) -> None:
    leaving = NOW[-1].current.leaving
    while len(leaving) > pending:
        leaving.pop(0)()


def multiply(a, b, acc: Value, use_acc=True, is_async: bool = False) -> Value:
    program = NOW[-1]
    product = Product(a, b, acc, bool(use_acc), program.random.random() < 0.5)
    program.current.products.append(product)
    if not is_async:
        multiplied(0)
    return Value(op=product)


def multiplied(pending: int, deps: Sequence[Value] = ()):
    products = NOW[-1].current.products
    while len(products) > pending:
        products.pop(0).make()
    return deps[0] if len(deps) == 1 else tuple(deps)


def smaller(a, b):
    return Value(torch.minimum(torch.as_tensor(raw(a)), torch.as_tensor(raw(b))))


def larger(a, b):
    """NaN is the smaller one, as on the card."""
    return Value(torch.fmax(torch.as_tensor(raw(a)), torch.as_tensor(raw(b), dtype=raw(a).dtype)))


def language() -> types.ModuleType:
    """``gluon.language``."""
    gl = types.ModuleType("triton.experimental.gluon.language")
    for name, kind in NAMED.items():
        setattr(gl, name, kind)
    for name in ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "NVMMASharedLayout"):
        setattr(gl, name, Layout)
    functions = {
        "constexpr": Constexpr, "static_range": range, "barrier": lambda: None, "load": load, "store": store,
        "minimum": smaller, "maximum": larger, "inline_asm_elementwise": inline_asm, "allocate_shared_memory": allocate,
        "program_id": lambda axis: Value(torch.tensor(NOW[-1].place[axis])), "num_programs": lambda axis: NOW[-1].grid[axis],
        "arange": lambda start, end, layout=None: Value(torch.arange(start, end)),
        "zeros": lambda shape, dtype, layout: Value(torch.zeros(shape, dtype=dtype.kind)),
        "full": lambda shape, value, dtype, layout: Value(torch.full(shape, value, dtype=dtype.kind)),
        "zeros_like": lambda x: Value(torch.zeros_like(x.t)), "convert_layout": lambda x, layout: x,
        "sum": lambda x, axis: Value(x.t.sum(axis)), "max": lambda x, axis: Value(x.t.amax(axis)),
        "abs": lambda x: Value(x.t.abs()), "where": lambda c, a, b: Value(torch.where(c.t, raw(a), raw(b))),
        "warp_specialize": lambda functions, *_: NOW[-1].specialise(functions),
    }
    for name, function in functions.items():
        setattr(gl, name, function)
    return gl


def hopper() -> types.ModuleType:
    """``gluon.language.nvidia.hopper``."""
    module = types.ModuleType("triton.experimental.gluon.language.nvidia.hopper")

    def begin(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = int(count)

    module.mbarrier = types.SimpleNamespace(
        MBarrierLayout=MBarrierLayout, init=begin, wait=wait, expect=lambda barrier, size: barrier.change(1, int(size)),
        arrive=lambda barrier, count=1: barrier.change(count, 0))
    module.tma = types.SimpleNamespace(async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out,
                                       store_wait=store_wait)
    module.fence_async_shared = lambda: None
    module.warpgroup_mma, module.warpgroup_mma_wait, module.warpgroup_mma_init = multiply, multiplied, lambda x: x
    return module


def kernels(*names: str) -> dict[str, types.ModuleType]:
    """{name: a copy of that module of ``ops/``, whose kernels run here}. ``names``: with all that they import from each other."""
    gl, package = language(), "sana_video_core.ops"
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.language = jit, gl
    stand_ins = {"triton.experimental.gluon": gluon, gl.__name__: gl, "triton.experimental.gluon.language.nvidia":
                 types.ModuleType("triton.experimental.gluon.language.nvidia"), hopper().__name__: hopper()}
    parent = importlib.import_module(package)
    places = [*stand_ins, *(f"{package}.{name}" for name in names)]
    kept = {place: sys.modules.pop(place, None) for place in places}
    sys.modules.update(stand_ins)
    try:
        return {name: importlib.import_module(f"{package}.{name}") for name in names}
    finally:
        for place, module in kept.items():
            sys.modules.pop(place, None)
            vars(parent).pop(place.rpartition(".")[2], None)
            if module is not None:
                sys.modules[place] = module
