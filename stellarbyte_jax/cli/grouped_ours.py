"""Our side of ``benchmark grouped_matmul``. All programs are compiled before the first one is timed.

S rows, as they are or with the empty ones of blocks, D inputs, F outputs, E experts, B blocks of 64 inputs.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from stellarbyte_jax.cli.grouped_speed import (
    LOADS,
    PRODUCTS,
    SHAPES,
    WEIGHT_SCALE,
    Result,
    Shape,
    calls,
    choices,
    figures,
    loads,
    products,
)
from stellarbyte_jax.cli.measurements import REPEATS, tell
from stellarbyte_jax.launch import environment
from stellarbyte_jax.ops.expert_layout import lay_out
from stellarbyte_jax.ops.grouped_matmul import Groups, Unaligned, grouped_matmul
from stellarbyte_jax.ops.pallas import compat

_WAYS = ("pallas", "xla")
_BEGUN_WITHIN = 75.0  # seconds, of programs of XLA, which tries many tilings of each product
_THREADS, _THREADS_OF_XLA = 4, 8  # tracing a kernel holds Python's lock; XLA has further threads of its own
_BLOCK = 64  # inputs whose sums of a gradient of matrices are checked together


class Arrays(NamedTuple):
    """Operands of a product and of its gradients.

    Attributes:
      x: [S, D], bfloat16.
      w: [E, D, F].
      dy: [S, F].
      groups: of the rows.
      owner: int32 [S], the expert of each row; any for an empty one.
    """

    x: Array
    w: Array
    dy: Array
    groups: Groups | Unaligned
    owner: Array


class _Case(NamedTuple):
    name: str
    rows: int
    load: str
    way: str

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]


class _Program(NamedTuple):
    run: Callable[..., Any]
    seconds: float


_Jobs = dict[Hashable, Callable[[], _Program | Exception]]
_Programs = Mapping[Hashable, _Program | Exception]


def measure_ours(names: Sequence[str]) -> Result:
    """Both ways of ours, in this process.

    Args:
      names: of the shapes.

    Returns:
      By shape, rows, product, load and way what :func:`figures` tells, in ``shapes``; in ``left_out`` how many programs
      of XLA were not begun in time.

    Raises:
      NotImplementedError: the kernels do not run here.
    """
    interpreted = jax.default_backend() == "cpu"
    with compat.interpreted() if interpreted else contextlib.nullcontext():
        if not compat.runs_here():
            raise NotImplementedError("the kernels need an NVIDIA Hopper GPU (compute capability 9.0)")
        cases = [_Case(*made) for name in names for made in itertools.product([name], SHAPES[name].rows, LOADS, _WAYS)]
        start = time.perf_counter()
        jobs, of_xla = _jobs(cases)
        programs = _compiled(jobs, of_xla)
        seconds = time.perf_counter() - start
        tell(f"{len(programs)} programs compiled after {seconds:.1f} s")
        shapes: Result = {}
        for case in cases:
            of_rows = shapes.setdefault(case.name, {}).setdefault(str(case.rows), {})
            for product, found in _measured(case, programs, 1 if interpreted else REPEATS):
                of_rows.setdefault(product, {}).setdefault(case.load, {})[case.way] = found
        left_out = len(jobs) + len(of_xla) - len(programs)
        more = {"left_out": left_out} if left_out else {}
        return {"shapes": shapes, "compile_seconds": round(seconds, 1), **more, "on": environment()}


def product_of(name: str, way: str) -> Callable[[Array, Array, Array, Groups | Unaligned], Array]:
    """The product, or one gradient alone, as a function of rows, matrices, cotangent and groups."""

    def run(x: Array, w: Array, dy: Array, groups: Groups | Unaligned) -> Array:
        def forward(x: Array, w: Array) -> Array:
            return grouped_matmul(x, w, groups, implementation=way)

        if name == "forward":
            return forward(x, w)
        if name == "dx":
            return jax.vjp(lambda x: forward(x, w), x)[1](dy)[0]
        return jax.vjp(lambda w: forward(x, w), w)[1](dy)[0]

    return jax.jit(run)  # lowered once, however often a program calls it


def looped(name: str, way: str, count: int) -> Callable[[Arrays], Array]:
    """``count`` calls, each of which needs a number of the one before: none can be dropped, joined or moved.

    Returns:
      A function that returns the last result.
    """
    product = product_of(name, way)
    # XLA's product of blocks, one for each expert, knows no numbers of rows, and the one in dw none of any blocks: they
    # must depend on the call before through the rows themselves, of which one element is written in place.
    through, other = ("dy", "x") if name == "dx" else ("x", "dy")

    def run(arrays: Arrays) -> Array:
        through_rows = way == "xla" and (name == "dw" or _one_block_each(arrays.groups))

        def call(zero: Array, rows: Array) -> Array:
            operands = {through: rows, other: getattr(arrays, other)}
            groups = jax.tree.map(lambda numbers: numbers + zero, arrays.groups)
            return product(operands["x"], arrays.w, operands["dy"], groups)

        def turn(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            out, rows = call(*carry), carry[1]
            zero = (out[(0,) * out.ndim] * 0).astype(jnp.int32)
            if through_rows:  # ``rows.at`` would be a scatter, which copies them
                rows = lax.dynamic_update_slice(rows, rows[:1, :1] + zero.astype(rows.dtype), (0, 0))
            return zero, rows

        return call(*lax.fori_loop(0, count - 1, turn, (jnp.int32(0), getattr(arrays, through))))

    return run


def _one_block_each(groups: Groups | Unaligned) -> bool:
    return isinstance(groups, Groups) and groups.experts_G is None


def drawn(owner_S: Array, shape: Shape, way: str, per_token: int) -> Arrays:
    """Normal numbers, in rows as this way wants them.

    Args:
      owner_S: int32, the expert of each row, in order.
      shape: of the product.
      way: of ours.
      per_token: choices of a token, by which XLA's blocks are cut.
    """
    D, F, E, _ = shape
    S = owner_S.shape[0]
    of_x, of_dy, of_w = jax.random.split(jax.random.key(0), 3)
    x, dy = jax.random.normal(of_x, (S, D), jnp.bfloat16), jax.random.normal(of_dy, (S, F), jnp.bfloat16)
    w = jax.random.normal(of_w, (E, D, F), jnp.bfloat16) * jnp.asarray(WEIGHT_SCALE, jnp.bfloat16)
    if way == "pallas":
        return Arrays(x, w, dy, Unaligned(jnp.zeros(E, jnp.int32).at[owner_S].add(1)), owner_S)
    layout = lay_out(owner_S.reshape(-1, per_token), E)
    x, dy, owner = (rows.at[layout.pairs_S].get(mode="fill", fill_value=0) for rows in (x, dy, owner_S))
    return Arrays(x, w, dy, layout.groups, owner)


def worst_error(name: str, arrays: Arrays, out: Array) -> Array:
    """How far sums of a result are from float32, in parts of the largest one; not finite where the result is not.

    Sums of each row with random signs s, of a gradient of matrices those of 64 rows together: by ``sum_f s_f (x w)_f =
    x (sum_f s_f w_f)`` they depend on every element, and float32 needs no matrix product for them.
    """
    x, w, dy = (array.astype(jnp.float32) for array in arrays[:3])
    out, owner = out.astype(jnp.float32), arrays.owner
    E, D, F = w.shape
    a_D, b_F = (jax.random.rademacher(jax.random.key(seed), (n,), jnp.float32) for seed, n in ((1, D), (2, F)))
    if name == "forward":
        found, right = _sum(out * b_F[None]), _sum(x * _sum(w * b_F[None, None])[owner])
    elif name == "dx":
        found, right = _sum(out * a_D[None]), _sum(dy * jnp.sum(w * a_D[None, :, None], axis=1)[owner])
    else:
        found = _sum((_sum(out * b_F[None, None]) * a_D[None]).reshape(E, -1, _BLOCK))
        terms_SB = _sum((x * a_D[None]).reshape(x.shape[0], -1, _BLOCK)) * _sum(dy * b_F[None])[:, None]
        right = lax.map(lambda e: jnp.sum(jnp.where((owner == e)[:, None], terms_SB, 0.0), axis=0), jnp.arange(E))
    return jnp.max(jnp.abs(found - right)) / jnp.max(jnp.abs(right))


def _sum(values: Array) -> Array:
    return jnp.sum(values, axis=-1)


def _draw(case: _Case) -> Callable[[Array], Arrays]:
    return functools.partial(drawn, shape=case.shape, way=case.way, per_token=choices(case.load, case.rows))


def _drawing(case: _Case) -> Hashable:
    return "draw", case.shape, case.rows, case.way, choices(case.load, case.rows)


def _timing(product: str, case: _Case, arrays: Arrays) -> Hashable:
    return "time", product, case.way, jax.tree.map(jnp.shape, arrays)


def _checking(product: str, arrays: Arrays) -> Hashable:
    return "check", product, jax.tree.map(jnp.shape, arrays)


def _measures(product: str, case: _Case) -> bool:
    if compat.is_interpreted() and case.way == "pallas" and product != "forward" and jax.__version_info__ < (0, 11):
        return False  # the interpreter of jax 0.10 does not know transposed matrices
    return product in products(case.rows)


def _count(case: _Case) -> int:
    if compat.is_interpreted():
        return 1
    count = calls(case.shape, case.rows)
    return count if case.way == "pallas" else max(4, count // 3)  # whose calls take longer


def _jobs(cases: Sequence[_Case]) -> tuple[_Jobs, _Jobs]:
    """What compiles each program that is needed, and apart from them what compiles XLA's products.

    What decides between ways of decoding comes first, then products before their gradients.
    """
    jobs: _Jobs = {}
    of_xla: _Jobs = {}
    for product, case in itertools.product(PRODUCTS, sorted(cases, key=lambda case: case.rows)):
        if not _measures(product, case):
            continue
        draw, owner = _draw(case), jax.ShapeDtypeStruct((case.rows,), jnp.int32)
        arrays = jax.eval_shape(draw, owner)
        run, check = looped(product, case.way, _count(case)), functools.partial(worst_error, product)
        out = {"forward": arrays.dy, "dx": arrays.x, "dw": arrays.w}[product]
        timed = jobs if case.way == "pallas" else of_xla
        timed[_timing(product, case, arrays)] = functools.partial(_compile, run, arrays)
        jobs[_drawing(case)] = functools.partial(_compile, draw, owner)
        jobs[_checking(product, arrays)] = functools.partial(_compile, check, arrays, out)
    return jobs, of_xla


def _compile(run: Callable[..., Any], *shapes: Any) -> _Program | Exception:
    start = time.perf_counter()
    try:
        program = jax.jit(run).lower(*shapes).compile()
    except Exception as error:  # of kernels, XLA and its tuning; told as the result of this product
        return error
    return _Program(program, time.perf_counter() - start)


def _compiled(jobs: _Jobs, of_xla: _Jobs) -> _Programs:
    """All that is needed, and of XLA's products those that were begun in time; no thread works afterwards."""
    if compat.is_interpreted():  # which is not for several threads
        return {key: job() for key, job in (jobs | of_xla).items()}
    with ThreadPoolExecutor(_THREADS) as pool, ThreadPoolExecutor(_THREADS_OF_XLA) as another:
        needed = {key: pool.submit(job) for key, job in jobs.items()}
        optional = {key: another.submit(job) for key, job in of_xla.items()}
        wait(optional.values(), timeout=_BEGUN_WITHIN)
        for future in optional.values():
            future.cancel()
    return {key: future.result() for key, future in (needed | optional).items() if not future.cancelled()}


def _measured(case: _Case, programs: _Programs, repeats: int) -> Iterator[tuple[str, Result]]:
    """Figures of each product of a case, or ``error``; without those whose programs were not begun."""
    shape, rows = case.shape, case.rows
    owner_S = np.repeat(np.arange(shape.experts, dtype=np.int32), loads(shape.experts, rows)[case.load])
    shapes = jax.eval_shape(_draw(case), owner_S)
    arrays = None
    for product in PRODUCTS:
        key = _timing(product, case, shapes)
        if not _measures(product, case) or key not in programs:
            continue
        try:
            program, count = _ready(programs[key]), _count(case)
            if arrays is None:
                arrays = jax.block_until_ready(_ready(programs[_drawing(case)]).run(owner_S))
            error = float(_ready(programs[_checking(product, shapes)]).run(arrays, program.run(arrays)))
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                jax.block_until_ready(program.run(arrays))
                seconds.append((time.perf_counter() - start) / count)
            told = figures(shape, rows, seconds, error, jax.devices()[0].device_kind)
            told |= {"calls": count, "compile_seconds": round(program.seconds, 1)}
        except Exception as problem:  # whatever a program could not be compiled or run for
            told = {"error": f"{type(problem).__name__}: {str(problem)[:300]}"}
        tell(f"{case.name}, {rows} rows, {case.load}, {case.way}, {product}: {told.get('error', told.get('tflops'))}")
        yield product, told


def _ready(program: _Program | Exception) -> _Program:
    if isinstance(program, Exception):
        raise program
    return program
