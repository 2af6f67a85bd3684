"""Sixteen float32 numbers at a time, for compiled kernels.

LLVM often leaves short loops over small arrays scalar. These operations are vectors by
construction; LLVM splits them into what the processor has (one AVX-512 register, two of AVX2).

Arrays hold float32, or bfloat16 as uint16, which NumPy has instead: the upper half of a float32's
bits. It is widened as it is read and rounded to the nearest, ties to even, as it is written.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_BITS, _HALVES = (ir.VectorType(ir.IntType(bits), LANES) for bits in (32, 16))
_FLAGS = ("contract", "reassoc", "nsz")


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes")


_lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _VECTOR)


def _address(context, builder, kind, array, index):
    data = context.make_array(kind)(context, builder, array).data
    vector = _HALVES if kind.dtype == types.uint16 else _VECTOR
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _bits(number):
    return ir.Constant(_BITS, [number] * LANES)


def _widened(builder, halves):
    return builder.bitcast(builder.shl(builder.zext(halves, _BITS), _bits(16)), _VECTOR)


def _rounded(builder, value):
    """Half of the last kept bit is added, or a little less where that bit is 0: ties to even."""
    bits = builder.bitcast(value, _BITS)
    odd = builder.and_(builder.lshr(bits, _bits(16)), _bits(1))
    near = builder.add(bits, builder.add(odd, _bits(0x7FFF)))
    # Rounding up must not turn NaN into an infinity.
    near = builder.select(builder.fcmp_unordered("uno", value, value), bits, near)
    return builder.trunc(builder.lshr(near, _bits(16)), _HALVES)


def _splat(builder, x):
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    zero = ir.Constant(ir.IntType(32), 0)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
    return builder.shuffle_vector(builder.insert_element(undefined, x, zero), undefined, zeros)


@intrinsic
def load(typing, array, index):
    """Elements index … index + 15 of a contiguous 1-D array."""

    # Arrays promise no more than the alignment of their elements.
    def generate(context, builder, signature, args):
        kind = signature.args[0]
        value = builder.load(
            _address(context, builder, kind, *args), align=kind.dtype.bitwidth // 8
        )
        return _widened(builder, value) if kind.dtype == types.uint16 else value

    return _lanes(array, types.intp), generate


@intrinsic
def store(typing, array, index, value):
    """Writes elements index … index + 15 of a contiguous 1-D array."""

    def generate(context, builder, signature, args):
        kind, value = signature.args[0], args[2]
        value = _rounded(builder, value) if kind.dtype == types.uint16 else value
        address = _address(context, builder, kind, *args[:2])
        builder.store(value, address, align=kind.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, _lanes), generate


@intrinsic
def fill(typing, x):
    """X in every lane."""

    def generate(context, builder, signature, args):
        return _splat(builder, args[0])

    return _lanes(types.float32), generate


@intrinsic
def add(typing, a, b):
    """A + b."""

    def generate(context, builder, signature, args):
        return builder.fadd(*args, flags=_FLAGS)

    return _lanes(_lanes, _lanes), generate


@intrinsic
def add_product(typing, a, b, c):
    """A + b · c."""

    def generate(context, builder, signature, args):
        a, b, c = args
        return builder.fadd(a, builder.fmul(b, c, flags=_FLAGS), flags=_FLAGS)

    return _lanes(_lanes, _lanes, _lanes), generate


@intrinsic
def swap(typing, a):
    """Lanes 1, 0, 3, 2, …, 15, 14."""
    order = [lane ^ 1 for lane in range(LANES)]

    def generate(context, builder, signature, args):
        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), order)
        return builder.shuffle_vector(args[0], args[0], mask)

    return _lanes(_lanes), generate


def wide(x) -> Any:
    """One element as float32."""


def narrow(x, array) -> Any:
    """A float32 as an element of an array."""


@overload(wide, inline="always")
def _wide(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@overload(narrow, inline="always")
def _narrow(x, array):
    if array.dtype != types.uint16:
        return lambda x, array: x

    def rounded(x, array):
        bits = np.float32(x).view(np.uint32)
        near = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        return np.uint16((near if x == x else bits) >> np.uint32(16))

    return rounded
