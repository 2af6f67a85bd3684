"""Sixteen float32 numbers at a time, for compiled kernels.

LLVM often leaves short loops over small arrays scalar. These operations are vectors by
construction; LLVM splits them into what the processor has (one AVX-512 register, two of AVX2).
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_FLAGS = ("contract", "reassoc", "nsz")
# Arrays promise no more than the alignment of their elements.
_ALIGNMENT = 4


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
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


def _splat(builder, x):
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    zero = ir.Constant(ir.IntType(32), 0)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
    return builder.shuffle_vector(builder.insert_element(undefined, x, zero), undefined, zeros)


@intrinsic
def load(typing, array, index):
    """Elements index … index + 15 of a contiguous 1-D array."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], *args)
        return builder.load(address, align=_ALIGNMENT)

    return _lanes(array, types.intp), generate


@intrinsic
def store(typing, array, index, value):
    """Writes elements index … index + 15 of a contiguous 1-D array."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], address, align=_ALIGNMENT)
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
