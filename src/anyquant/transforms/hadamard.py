"""Hadamard matrices as Kronecker products of small factors, so that applying one of order n costs far less than n^2.

Orders: powers of two (Sylvester), and those with a factor of Paley's two constructions ("On orthogonal matrices", 1933)
over the integers modulo a prime. That covers the widths of published models (896 = 28 x 32, 5120 = 20 x 256 ...).
"""

import math
from functools import cache

import numpy as np

from anyquant.core.dtypes import Float32

LARGEST_SYLVESTER = 64  # a factor of this size is applied as one small matrix product


@cache
def hadamard_factors(order: int) -> tuple[Float32, ...] | None:
    """Matrices of +1 and -1 whose Kronecker product, in this order, is a Hadamard matrix H: H H^T = order * I.

    None when no matrix of this order is known here. The factors are read-only.
    """
    odd = order & -order
    factors: list[Float32] = []
    rest = order
    if odd != order:
        found = next((seed for size in _candidates(order) if (seed := _paley(size)) is not None), None)
        if found is None:
            return None
        factors.append(found)
        rest = order // len(found)
    while rest > 1:
        size = min(rest, LARGEST_SYLVESTER)
        factors.append(_sylvester(size))
        rest //= size
    if not factors:
        factors.append(np.ones((1, 1), dtype=np.float32))
    for factor in factors:
        factor.setflags(write=False)
    return tuple(factors)


def hadamard_product(vectors: Float32, factors: tuple[Float32, ...]) -> Float32:
    """H x for each x = vectors[i, :, j] of `vectors` (count, order, width), H the Kronecker product of `factors`.

    Not normalised. With width 1 the result of a vector does not depend on which others are given.
    """
    count, order, width = vectors.shape
    result = np.ascontiguousarray(vectors, dtype=np.float32)
    before = 1
    for factor in factors:
        size = len(factor)
        before *= size
        after = order // before * width
        if after == 1:
            result = np.matmul(result.reshape(count, before // size, size), factor.T)
        else:
            result = np.matmul(factor, result.reshape(count, before // size, size, after))
    return result.reshape(vectors.shape)


def _candidates(order: int) -> list[int]:
    """Divisors of `order` that hold all of its odd part, smallest first; what remains is a power of two."""
    odd = order // (order & -order)
    return [odd << shift for shift in range(2, (order & -order).bit_length())]


def _sylvester(order: int) -> Float32:
    matrix: Float32 = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _paley(order: int) -> Float32 | None:
    """Paley's first construction for order q + 1, q = 3 modulo 4, or his second for 2 (q + 1), q = 1 modulo 4."""
    if _is_prime(order - 1) and order % 4 == 0:
        skew = _bordered(order - 1, -1)
        first: Float32 = skew + np.eye(order, dtype=np.float32)
        return first
    prime = order // 2 - 1
    if order % 2 == 0 and prime % 4 == 1 and _is_prime(prime):
        diagonal = np.array([[1, -1], [-1, -1]], dtype=np.float32)
        other = np.array([[1, 1], [1, -1]], dtype=np.float32)
        second: Float32 = np.kron(_bordered(prime, 1), other) + np.kron(np.eye(order // 2, dtype=np.float32), diagonal)
        return second.astype(np.float32)
    return None


def _bordered(prime: int, sign: int) -> Float32:
    """Quadratic characters of i - j modulo `prime`, bordered by ones above and `sign` on the left."""
    character = -np.ones(prime, dtype=np.float32)
    character[np.square(np.arange(1, prime, dtype=np.int64)) % prime] = 1
    character[0] = 0
    index = np.arange(prime)
    matrix = np.zeros((prime + 1, prime + 1), dtype=np.float32)
    matrix[0, 1:] = 1
    matrix[1:, 0] = sign
    matrix[1:, 1:] = character[(index[:, None] - index[None, :]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 2 and number % 2 == 1 and all(number % divisor for divisor in range(3, math.isqrt(number) + 1, 2))
